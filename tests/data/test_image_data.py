"""Images as batches: where they come from, how they are prepared, which of them, and what goes wrong."""

import copy
import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from lightning_peft import ColouredShapes, Digits, ImageClassificationData, TuningError
from lightning_peft.data import ImageData
from lightning_peft.data.coloured_shapes import COLOURS, SHAPES, STYLES
from lightning_peft.data.image_transforms import ImageTransform, crop_box, decode, load_processor, to_rgb
from tests.images import NAMES, folder, parquet, picture, save_vit, shapes
from tests.models import tiny


def labels_of(data: ImageData, split: str) -> list[int]:
    return data.images(split).labels.tolist()


def pixels_of(data: ImageData, split: str) -> torch.Tensor:
    return torch.stack([data.images(split).pixels(i) for i in range(len(data.images(split)))])


# Where they come from.


def test_folders(tmp_path: Path) -> None:
    data = ImageClassificationData(dataset=folder(tmp_path, {"train": 5, "test": 2}), image_size=16, batch_size=4)
    data.setup("fit")
    data.setup("test")
    assert data.label_names == NAMES
    assert [len(data.images(split)) for split in ("train", "validation", "test", "predict")] == [15, 0, 6, 6]
    batch = next(iter(data.test_dataloader()))
    expected = load_processor(None, 16)(images=[picture(0, 1000)], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0], expected)
    assert batch["labels"].tolist() == [0, 0, 1, 1]


def test_a_folder_that_is_not_split(tmp_path: Path) -> None:
    plain = folder(tmp_path, {"train": 20})
    data = ImageClassificationData(dataset=f"{plain}/train", image_size=16, test_share=0.25)
    counts = {split: Counter(labels_of(data, split)) for split in ("train", "validation", "test")}
    assert counts == {
        "train": dict.fromkeys(range(3), 13),
        "validation": dict.fromkeys(range(3), 2),
        "test": dict.fromkeys(range(3), 5),
    }


def test_parquet(tmp_path: Path) -> None:
    data = ImageClassificationData(
        train=parquet(tmp_path / "a.parquet", 4), test=parquet(tmp_path / "b.parquet", 2), image_size=16
    )
    assert data.label_names == NAMES
    assert len(data.images("test")) == 6
    assert len(data.images("train")) == 12  # a share of 0.1 of 4 rounds to none
    assert len(data.images("validation")) == 0


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    parquet(tmp_path / "train-00000.parquet", 4)
    data = ImageClassificationData(dataset=str(tmp_path), image_size=16, test_share=0.5, validation_share=0)
    assert [len(data.images(split)) for split in ("train", "test")] == [6, 6]


def test_digits() -> None:
    data = Digits()
    counts = {split: len(data.images(split)) for split in ("train", "validation", "test")}
    assert sum(counts.values()) == 1797
    assert counts["test"] > 340
    assert data.label_names[:3] == ["zero", "one", "two"]
    for split in counts:
        assert set(labels_of(data, split)) == set(range(10))
    from sklearn.datasets import load_digits

    (first, *_), (label, *_) = load_digits(return_X_y=True)
    row = next(iter(data._every))
    assert np.array_equal(np.asarray(row["image"]), (first.reshape(8, 8) * 255 / 16).astype("uint8"))
    assert row["label"] == label
    assert data.images("test").pixels(0).shape == (3, 32, 32)


def test_coloured_shapes_have_names_styles_and_halves() -> None:
    data = ColouredShapes(per_class=1, test_per_class=1)
    assert len(data.label_names) == 36
    base, new = (ColouredShapes(classes=half, per_class=1, test_per_class=1).label_names for half in ("base", "new"))
    assert base + new == data.label_names
    for half in (base, new):
        assert {name.split()[0] for name in half} == set(data.colours)
        assert {name.split()[1] for name in half} == set(data.shapes)


@pytest.mark.parametrize(("novel", "word"), [("colour", 0), ("shape", 1)])
def test_the_second_half_of_the_classes_may_have_words_of_its_own(novel: str, word: int) -> None:
    base, new = (ColouredShapes(classes=half, novel=novel, per_class=1).label_names for half in ("base", "new"))
    assert len(base) == len(new) == 18
    for i, shared in ((word, False), (1 - word, True)):
        first, second = ({name.split()[i] for name in half} for half in (base, new))
        assert first == second if shared else not first & second


def test_pictures_are_the_same_each_time_and_other_ones_in_each_split() -> None:
    train, again, test, other = (
        pixels_of(shapes(**arguments), split)
        for arguments, split in (({}, "train"), ({}, "train"), ({}, "test"), ({"drawing": 1}, "train"))
    )
    assert torch.equal(train, again)
    assert not any((picture == train).all() for picture in test)
    assert not any((picture == train).flatten(1).all(1).any() for picture in other)


@pytest.mark.parametrize("style", STYLES)
def test_a_picture_has_its_colour(style: str) -> None:
    """The hue of the most coloured pixels is that of the name."""
    data = ColouredShapes(style=style, colours=list(COLOURS), shapes=list(SHAPES), per_class=1, test_per_class=1)
    rows = data.rows("train")
    names = rows.features["label"].names
    for row in rows:
        hsv = np.asarray(row["image"].convert("HSV")).reshape(-1, 3).astype(float)
        strong = hsv[np.argsort(-hsv[:, 1] * hsv[:, 2])[:12]]
        angle = np.deg2rad(strong[:, 0] * 360 / 255)
        hue = np.rad2deg(np.arctan2(np.sin(angle).mean(), np.cos(angle).mean())) % 360
        distance = {name: abs((hue - degrees + 180) % 360 - 180) for name, degrees in COLOURS.items()}
        assert min(distance, key=distance.get) == names[row["label"]].split()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "photo"}, "style has no 'photo': take any of filled"),
        ({"colours": ["red", "gren"]}, "colours has no 'gren'.*green"),
        ({"shapes": ["star", "star"]}, "names something twice"),
        ({"per_class": 0}, "are too few"),
        ({"novel": "style"}, "novel='style' is nothing that classes have: take 'pair', 'shape' or 'colour'"),
        ({"novel": "shape", "shapes": ["star", "ring", "moon"]}, "halves the shapes star, ring, moon: give an even"),
    ],
)
def test_pictures_that_cannot_be_drawn(arguments: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        ColouredShapes(**arguments)


# How they are prepared.


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_any_image_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 256 * 200, "uint16"))
    else:
        image = Image.new("L" if mode == "I;16" else "RGB", (4, 4), (200, 200, 200)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    rgb = decode({"bytes": file.getvalue(), "path": None})
    assert rgb.mode == "RGB"
    assert all(abs(value - 200) < 60 for value in rgb.getpixel((0, 0)))


def test_what_is_transparent_is_white() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 255))).getpixel((0, 0)) == (10, 20, 30)


def test_a_photograph_is_upright() -> None:
    image, file = Image.new("RGB", (4, 2)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(file, "JPEG", exif=exif)
    assert decode({"bytes": file.getvalue(), "path": None}).size == (2, 4)


def test_the_models_processor_prepares_them(tmp_path: Path) -> None:
    data = shapes(processor=save_vit(tmp_path))
    assert data.images("test").pixels(0).shape == (3, 16, 16)
    processor = load_processor(str(tmp_path))
    assert processor.backend == "pil"


def test_without_a_processor_the_config_says_the_size(tmp_path: Path) -> None:
    save_vit(tmp_path, processor=False)
    assert load_processor(str(tmp_path)).size["height"] == 16
    tiny("clip_image").save_pretrained(tmp_path / "clip")
    assert load_processor(str(tmp_path / "clip")).size["height"] == 16
    assert load_processor(str(tmp_path), image_size=24).size["height"] == 24


def test_nothing_says_the_size(tmp_path: Path) -> None:
    data = ImageClassificationData(dataset=folder(tmp_path / "images", {"train": 2}))
    with pytest.raises(TuningError, match="nothing says how large"):
        data.setup("fit")
    tiny("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(TuningError, match="has no image processor"):
        load_processor(str(tmp_path / "bert"))


def test_random_changes_depend_on_seed_epoch_and_row() -> None:
    def first(epoch: int, seed: int = 0, split: str = "train") -> torch.Tensor:
        data = shapes(augment=["crop", "flip", "colour"], seed=seed)
        return data.images(split)[[(epoch, 0)]]["pixel_values"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert not torch.equal(first(0), first(0, seed=1))
    assert torch.equal(first(0, split="test"), first(1, split="test"))


def test_a_flip_is_half_of_them() -> None:
    image = Image.fromarray(np.arange(192).reshape(8, 8, 3).astype("uint8"))
    transform = ImageTransform(load_processor(None, 8), ["flip"])
    plain = transform(image)
    found = [transform(image, np.random.default_rng(i)) for i in range(200)]
    assert all(torch.equal(x, plain) or torch.equal(x, plain.flip(2)) for x in found)
    assert 70 < sum(torch.equal(x, plain) for x in found) < 130


def test_a_crop_lies_inside_and_has_its_share() -> None:
    for i in range(200):
        left, upper, right, lower = crop_box(40, 30, (0.2, 0.6), np.random.default_rng(i))
        assert 0 <= left < right <= 40
        assert 0 <= upper < lower <= 30
        assert 0.19 < (right - left) * (lower - upper) / 1200 < 0.61
        assert 0.74 < (right - left) / (lower - upper) < 1.34
    assert crop_box(100, 2, (1.0, 1.0), np.random.default_rng(0)) == (49, 0, 51, 2)


# Which of them.


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_few_shots(shots: int) -> None:
    data = shapes(shots=shots, validation_shots=1)
    assert Counter(labels_of(data, "train")) == dict.fromkeys(range(4), shots)
    assert Counter(labels_of(data, "validation")) == dict.fromkeys(range(4), 1)
    assert len(data.images("test")) == 12


def test_fewer_shots_are_a_part_of_more_and_another_seed_draws_others() -> None:
    one, two, other = (pixels_of(shapes(shots=n, seed=seed), "train") for n, seed in ((1, 0), (2, 0), (2, 1)))
    assert all(any(torch.equal(x, y) for y in two) for x in one)
    assert not torch.equal(two, other)


def test_validation_shots_are_at_most_four() -> None:
    assert shapes(shots=1).validation_shots == 1
    assert shapes(shots=16).validation_shots == 4
    assert shapes().validation_shots is None


def test_too_few_images_for_the_shots() -> None:
    with pytest.raises(TuningError, match=r"has 6 images of class 'red circle', and shots=7: take 6 or fewer"):
        shapes(shots=7).setup("fit")
    with pytest.raises(TuningError, match=r"the validation split has 2 images .* validation_shots=4"):
        shapes(shots=4).setup("fit")


@pytest.mark.parametrize(("count", "base"), [(1000, 500), (37, 19), (101, 51)])
def test_the_first_half_is_the_larger_one(count: int, base: int) -> None:
    class Numbered(ImageData):
        def rows(self, split: str) -> Dataset:
            return Dataset.from_dict({"label": list(range(count)), "image": [None] * count})

    assert [len(Numbered(classes=half).label_names) for half in ("base", "new")] == [base, count - base]


def test_a_half_is_numbered_from_zero() -> None:
    new, every = shapes(classes="new"), shapes()
    assert new.label_names == every.label_names[2:]
    assert set(labels_of(new, "train")) == {0, 1}
    theirs = pixels_of(every, "test")[torch.tensor(labels_of(every, "test")) >= 2]
    assert torch.equal(pixels_of(new, "test"), theirs)


# Batches.


def test_an_epoch_has_every_image_once_in_another_order() -> None:
    data = shapes()
    loader = data.train_dataloader()
    first = torch.cat([batch["pixel_values"] for batch in loader])
    loader.sampler.set_epoch(1)
    second = torch.cat([batch["pixel_values"] for batch in loader])
    assert not torch.equal(first, second)
    key = [tuple(x.flatten().tolist()) for x in first]
    assert sorted(key) == sorted(tuple(x.flatten().tolist()) for x in second)
    assert len(set(key)) == 24


def test_processes_share_an_epoch() -> None:
    from lightning_peft.data.images import EpochBatches

    parts = [list(EpochBatches(np.ones(11), 2, True, False, num_replicas=2, rank=rank)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(row for part in parts for batch in part for _, row in batch) == list(range(11))


def test_workers_prepare_what_the_main_process_would() -> None:
    alone, helped = (
        [batch["pixel_values"] for batch in shapes(augment=["crop"], num_workers=n).train_dataloader()] for n in (0, 1)
    )
    assert all(torch.equal(x, y) for x, y in zip(alone, helped, strict=True))


def test_kept_images_are_the_same() -> None:
    kept, plain = shapes(keep_in_memory=True), shapes()
    for _ in range(2):
        assert torch.equal(pixels_of(kept, "train"), pixels_of(plain, "train"))
    assert len(kept.images("train")._kept) == 24
    assert shapes(keep_in_memory=True, augment=["flip"]).images("train").keep is False


def test_an_epoch_goes_on_where_it_was_left() -> None:
    data = shapes(augment=["crop"])
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    state, rest = copy.deepcopy(loader.state_dict()), [batch["pixel_values"] for batch in iterator]
    again = shapes(augment=["crop"]).train_dataloader()
    again.load_state_dict(state)
    resumed = [batch["pixel_values"] for batch in again]
    assert len(rest) == len(resumed) == 4
    assert all(torch.equal(x, y) for x, y in zip(rest, resumed, strict=True))


def test_images_pickle() -> None:
    images = shapes(augment=["flip"]).images("train")
    assert torch.equal(pickle.loads(pickle.dumps(images)).pixels(3, 1), images.pixels(3, 1))


# What goes wrong.


def broken(tmp_path: Path) -> str:
    path = folder(tmp_path, {"train": 4})
    whole = (tmp_path / "train/river/1.png").read_bytes()
    (tmp_path / "train/river/1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/stone/2.png").write_bytes(b"no image")
    return path


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    data = ImageClassificationData(dataset=broken(tmp_path), image_size=16, test_share=0, validation_share=0)
    data.setup("fit")
    with pytest.raises(TuningError, match=r"river/1\.png is no readable image .*skip_corrupt=True"):
        list(data.plain_loader(data.images("train")))


def test_corrupt_files_are_skipped_if_asked(tmp_path: Path) -> None:
    data = ImageClassificationData(
        dataset=broken(tmp_path), image_size=16, test_share=0, validation_share=0, skip_corrupt=True
    )
    with pytest.warns(UserWarning, match=r"2 images of the train split cannot be read: .*1\.png, .*2\.png"):
        data.setup("fit")
    assert Counter(labels_of(data, "train")) == {0: 4, 1: 3, 2: 3}
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 10


def test_a_row_without_a_path_is_named_by_its_number() -> None:
    with pytest.raises(TuningError, match="row 7 is no readable image"):
        decode({"bytes": b"", "path": None}, 7)


def test_a_class_without_training_images_is_told(tmp_path: Path) -> None:
    path = folder(tmp_path, {"train": 2, "test": 2})
    for file in (tmp_path / "train/stone").iterdir():
        file.unlink()
    data = ImageClassificationData(dataset=path, image_size=16)
    with pytest.warns(UserWarning, match="no training images of stone"):
        data.setup("fit")


def test_a_class_that_train_has_not(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"image": [picture(0, 0), picture(1, 0)], "label": ["a", "b"]})
    rows.to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"image": [picture(0, 0)], "label": ["c"]}).to_parquet(tmp_path / "test.parquet")
    data = ImageClassificationData(
        train=str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet"), image_size=16
    )
    with pytest.raises(TuningError, match="the test split has label 'c', which train has not"):
        data.setup("test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots=0 is out of range"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"augment": ["rotate"]}, "augment has 'rotate'"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale=\(0.5, 0.1\) is no range"),
        ({"classes": "half"}, "classes='half' is no part"),
    ],
)
def test_arguments_that_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(TuningError, match=message):
        shapes(**arguments)


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="'train' is no Parquet file"):
        ImageClassificationData(image_size=16).setup("fit")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(TuningError, match="is no readable Parquet file"):
        ImageClassificationData(train=str(tmp_path / "a.parquet"), image_size=16).setup("fit")
    with pytest.raises(TuningError, match="cannot be loaded"):
        ImageClassificationData(dataset=str(tmp_path / "nowhere"), image_size=16).setup("fit")
    with pytest.raises(TuningError, match="leave nothing to train on"):
        ImageClassificationData(validation_share=0.5, test_share=0.5)
    with pytest.raises(TuningError, match="has no column 'photo'"):
        ImageClassificationData(dataset=folder(tmp_path / "f", {"train": 2}), image="photo", image_size=16).setup("fit")
