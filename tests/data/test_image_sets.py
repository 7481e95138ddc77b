"""Sets of images as their authors have them: lists, names of classes, and the configurations that read them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

import lightning_peft
from lightning_peft import CLIPData, ImageClassificationData, TuningError
from lightning_peft.data.image_lists import listed
from lightning_peft.data.image_sets import image_set, image_sets
from tests.images import NAMES, folder, picture

CONFIGS = Path(__file__).parents[2] / "configs/benchmarks"
SPLITS = {"train": "train", "validation": "val", "test": "test"}


def drawn(base: Path, names: list[str]) -> None:
    """Draw a picture of each name, of the class that it begins with."""
    for number, name in enumerate(names):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        first = Path(name).parts[0]
        picture(NAMES.index(first) if first in NAMES else number // 2, number).save(base / name)


def laid_out(root: Path, layout: str) -> None:
    """Write a few pictures of three classes as the authors of a set have them."""
    known, family = image_set(layout), layout.partition("/")[0]
    base, images = root / known.folder, root / known.folder / known.images
    names = {split: [f"{name}/{split}{i}.jpg" for name in NAMES for i in range(2)] for split in SPLITS}
    if known.tree:
        folder(base, {"train": 2, "val": 2})
        (base / known.names).resolve().write_text("".join(f"{name} a {name}\n" for name in NAMES))
        return
    for split, own in names.items():
        flat = [f"{split}{i}.jpg" for i in range(len(own))] if known.train.startswith("images_variant") else own
        drawn(images, flat)
        rows = [(path, NAMES.index(Path(name).parts[0])) for path, name in zip(flat, own, strict=True)]
        if family == "fgvc":
            (base / vars(known)[split]).write_text(json.dumps({path: 1 + number for path, number in rows}))
        elif family == "vtab-1k":
            (base / vars(known)[split]).write_text("".join(f"{path} {number}\n" for path, number in rows))
        elif known.validation:
            lines = [f"{path.removesuffix('.jpg')} {NAMES[number]} 7-{number}\n" for path, number in rows]
            (base / vars(known)[split]).write_text("".join(lines))
    if family == "coop" and not known.validation:
        whole = {short: [[path, NAMES.index(Path(path).parts[0]), Path(path).parts[0]] for path in names[split]]
                 for split, short in SPLITS.items()}  # fmt: skip
        (base / known.train).write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "layout",
    ["vtab-1k/cifar", "fgvc/cub", "fgvc/stanford_cars", "coop/imagenet", "coop/caltech101", "coop/fgvc_aircraft"],
)
def test_each_set_is_read_as_its_authors_have_it(layout: str, tmp_path: Path) -> None:
    laid_out(tmp_path, layout)
    data = ImageClassificationData(dataset=str(tmp_path), layout=layout, image_size=16)
    assert [len(data.rows(split)) for split in ("train", "test")] == [6, 6]
    data.setup("fit")
    assert data.images("train")[0]["pixel_values"].shape == (3, 16, 16)
    assert data.images("test").labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images("test").pixels(4).mean((1, 2)).argmax() == 2, "the picture of a row is that of its class"
    called = {"coop/imagenet": "a stone", "coop/fgvc_aircraft": "stone 7-2"}
    expected = NAMES[2] if layout.startswith("coop") else "2" if layout.startswith("vtab") else "3"
    assert data.label_names[2] == called.get(layout, expected)


def test_counts_are_those_of_the_papers() -> None:
    every = image_sets()
    assert [sum(name.startswith(family) for name in every) for family in ("vtab-1k/", "fgvc/", "coop/")] == [19, 5, 11]
    lists = {(known.train, known.validation, known.test) for name, known in every.items() if name.startswith("vtab")}
    assert lists == {("train800.txt", "val200.txt", "test.txt")}
    of_coop = {name: known.train for name, known in every.items() if name.startswith("coop") and known.train}
    assert sum(file.startswith("split_zhou_") for file in of_coop.values()) == 9
    assert len(set(of_coop.values())) == len(of_coop) == 10
    groups = [known.group for known in every.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert {known.classes for name, known in every.items() if name.startswith("fgvc/")} == {200, 555, 102, 120, 196}


def test_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    rows = {"train": [["a.jpg", 5, "zebra"], ["b.jpg", 2, "ape"], ["c.jpg", 3, "bee"]], "val": [["d.jpg", 9, "cat"]]}
    (tmp_path / "all.json").write_text(json.dumps(rows))
    found = listed(str(tmp_path / "all.json"), "train")
    assert found.features["label"].names == ["ape", "bee", "zebra", "cat"]
    assert found["label"][:] == [2, 0, 1]
    with pytest.raises(TuningError, match="has no 'test': it has 'train', 'val'"):
        listed(str(tmp_path / "all.json"), "test")


def test_the_text_of_a_class_is_that_of_the_set() -> None:
    own, plain = (ImageClassificationData(dataset="data", layout=f"coop/{name}") for name in ("dtd", "sun397"))
    assert CLIPData(own).template == "{} texture."
    assert plain.template == "a photo of a {}."
    assert ImageClassificationData(dataset="data").template is None


def test_a_split_that_is_named_is_taken(tmp_path: Path) -> None:
    laid_out(tmp_path, "vtab-1k/kitti")
    base = tmp_path / "vtab-1k/kitti"
    whole = (base / "train800.txt").read_text() + (base / "val200.txt").read_text()
    (base / "train800val200.txt").write_text(whole)
    data = ImageClassificationData(
        dataset=str(tmp_path), layout="vtab-1k/kitti", train=str(base / "train800val200.txt"), image_size=16
    )
    assert len(data.rows("train")) == 12
    by_switch = ImageClassificationData(dataset=str(tmp_path), layout="vtab-1k/kitti", whole=True, image_size=16)
    assert by_switch.rows("train")[:] == data.rows("train")[:]
    assert len(by_switch.rows("validation")) == len(by_switch.rows("test")) == 6


def test_without_a_folder_it_is_the_copy_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*given: Any, **options: Any) -> dict[str, Dataset]:
        asked.append(given[0])
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
        rows = Dataset.from_dict({"image": [picture(i, i) for i in range(3)], "label": [0, 1, 2]}, features=features)
        return {"train": rows, "validation": rows}

    monkeypatch.setattr("lightning_peft.data.splits.load_dataset", load)
    data = ImageClassificationData(layout="coop/food101", image_size=16, validation_share=0)
    assert len(data.rows("test")) == 3
    assert set(asked) == {"ethz/food101"}
    with pytest.raises(TuningError, match=r"layout='fgvc/cub' has no copy on the hub: give dataset="):
        ImageClassificationData(layout="fgvc/cub")


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"layout='vtab-1k/cifer' is no set .* it has e\.g\. vtab-1k/cifar"):
        ImageClassificationData(layout="vtab-1k/cifer")
    (tmp_path / "a.txt").write_text("a.jpg\n")
    (tmp_path / "b.json").write_text("[1]")
    for name in ("a.txt", "b.json", "c.txt"):
        with pytest.raises(TuningError, match=rf"train='[^']*{name}' is no list of images .*: write lines of a path"):
            listed(str(tmp_path / name), "train")
    plain = folder(tmp_path / "tree", {"train": 1})
    (tmp_path / "names.txt").write_text("bird a bird\nriver a river\n")
    data = ImageClassificationData(dataset=plain, names=str(tmp_path / "names.txt"), image_size=16)
    with pytest.raises(TuningError, match="has no line for class 'stone': write 'stone NAME'"):
        data.setup("fit")
    (tmp_path / "names.txt").write_text("bird a bird\nriver a river\nstone a stone\n")
    data.setup("fit")
    assert data.label_names == ["a bird", "a river", "a stone"]


def configured(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["init_args"]


def test_split_cifar_100_is_read_as_the_hub_has_it(tmp_path: Path) -> None:
    fine = [f"class {i:02}" for i in range(20)]
    features = Features({"img": ImageFeature(), "fine_label": ClassLabel(names=fine), "coarse_label": ClassLabel(2)})
    columns = {"img": [picture(i % 3, i) for i in range(40)], "fine_label": [i % 20 for i in range(40)]}
    rows = Dataset.from_dict(columns | {"coarse_label": [0] * 40}, features=features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    given = configured("split_cifar100")
    own = given["data"]["init_args"] | {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    own["dataset"] = None
    data = lightning_peft.ContinualData(
        ImageClassificationData(**own, image_size=16, validation_share=0), given["tasks"], given["epochs_per_task"]
    )
    data.setup("fit")
    assert [len(classes) for classes in data.task_classes] == [2] * 10
    assert data.label_names == fine


def test_office_home_is_read_as_its_folders_are(tmp_path: Path) -> None:
    folder(tmp_path / "OfficeHomeDataset", {"Art": 10, "Clipart": 10})
    source, target = (
        ImageClassificationData(**given["init_args"] | {"dataset": str(tmp_path / given["init_args"]["dataset"])})
        for given in (configured("office_home")[name] for name in ("source", "target"))
    )
    data = lightning_peft.DomainData(source, target)
    assert data.label_names == NAMES
    assert [len(one.rows("train")) for one in (source, target)] == [27, 21]
