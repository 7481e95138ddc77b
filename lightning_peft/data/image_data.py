"""The base class of image data: classes, few-shot draws, transforms and loaders, wherever the images come from."""

import copy
import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.classes import check_columns, class_names
from lightning_peft.data.images import EpochBatches, Images
from lightning_peft.data.module import SPLITS, DataModule, check_least

if TYPE_CHECKING:
    from lightning_peft.data.image_transforms import ImageTransform

AUGMENTATIONS = ("crop", "flip", "colour")
MOST_VALIDATION_SHOTS = 4
"""Validation images of each class in few-shot training, as in Zhou et al. 2021, arXiv 2109.01134, section 4.1."""


class ImageData(DataModule):
    """Labelled images; a subclass says in `rows` where they come from and names the columns, ``image`` and ``label``.

    A batch is a dict of ``pixel_values`` [B, 3, H, W] and ``labels`` [B], except for prediction. The rows of a training
    batch and their random changes are a function of the seed and the epoch, so a run resumes exactly inside an epoch.

    Args:
        processor: folder or hub id of the model whose image processor prepares the images; its Pillow form is used,
            which needs no torchvision. None: scale to ``image_size`` and to [-1, 1].
        image_size: height and width [pixels]; None: those of the model.
        augment: random changes of the training images: 'crop', 'flip', 'colour'; see `ImageTransform`.
        crop_scale: the least and the greatest share of the area that 'crop' keeps.
        shots: train with that many images of each class, drawn by ``seed``; fewer shots are a part of more. None: all.
        validation_shots: the same for validation; None: all, and with ``shots`` the smaller of it and 4.
        classes: 'all', or the first half of the classes ('base', the larger one of an odd number) or the second
            ('new'); a half is numbered from 0 and leaves the images of the other out of every split.
        batch_size: images of a batch on each device.
        num_workers: how many processes decode images.
        keep_in_memory: keep prepared images that no random change is made to; without worker processes.
        skip_corrupt: look at every image first and leave out, with a warning that names them, those that cannot be
            read. Otherwise the first of them is an error when it is read.
        seed: of the order of the training rows, their random changes, the shots, and the splits that are drawn.
    """

    image: str = "image"
    """The column of the image."""
    label: str = "label"
    """The column of the class."""
    size: int | None = None
    """Height and width where neither a model nor ``image_size`` says them [pixels]."""
    template: str | None = None
    """The text of a class for models like CLIP, where the data have one of their own."""

    def __init__(
        self,
        processor: str | None = None,
        image_size: int | None = None,
        augment: Sequence[Literal["crop", "flip", "colour"]] = (),
        crop_scale: tuple[float, float] = (0.08, 1.0),
        shots: int | None = None,
        validation_shots: int | None = None,
        classes: Literal["all", "base", "new"] = "all",
        batch_size: int = 32,
        num_workers: int = 0,
        keep_in_memory: bool = False,
        skip_corrupt: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_least(1, shots=shots, validation_shots=validation_shots, image_size=image_size, batch_size=batch_size)
        check_least(0, seed=seed)
        _check_arguments(augment, crop_scale, classes)
        self.processor = processor
        self.image_size = image_size
        self.augment = tuple(augment)
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.shots = shots
        few = min(shots, MOST_VALIDATION_SHOTS) if shots is not None else None
        self.validation_shots = validation_shots if validation_shots is not None else few
        self.classes = classes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.keep_in_memory = keep_in_memory
        self.skip_corrupt = skip_corrupt
        self.seed = seed
        self._images: dict[str, Images] = {}

    @cached_property
    def all_label_names(self) -> list[str]:
        """The names of all classes, of whichever part ``classes`` says."""
        rows = self.all_classes()
        check_columns(rows, "train", [self.label])
        names = list(class_names(rows, self.label, "train").values())
        least = 2 if self.classes == "all" else 3
        if len(names) < least:
            raise TuningError(
                f"column {self.label!r} holds the classes {names}: classes={self.classes!r} needs {least} or more."
            )
        return names

    @property
    def label_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers in a batch."""
        names = self.all_label_names
        middle = (len(names) + 1) // 2
        return {"all": names, "base": names[:middle], "new": names[middle:]}[self.classes]

    def part(self, classes: Literal["all", "base", "new"]) -> Self:
        """Return the same data with another part of the classes.

        >>> from lightning_peft import Digits
        >>> Digits().part("new").label_names
        ['five', 'six', 'seven', 'eight', 'nine']
        """
        other = copy.copy(self)
        other.classes, other._images = classes, {}
        return other

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.label_names)

    def transform(self, split: str) -> "ImageTransform":
        """Return how the images of a split are prepared: at random those to train with, the others always alike."""
        from lightning_peft.data.image_transforms import ImageTransform, load_processor

        size = self.size if self.processor is None and self.image_size is None else self.image_size
        processor = load_processor(self.processor, size)
        return ImageTransform(processor, self.augment if split == "train" else (), self.crop_scale)

    def setup(self, stage: str) -> None:
        """Find the images of the splits that 'fit', 'validate', 'test' or 'predict' needs.

        Raises:
            TuningError: a split is empty, lacks a column, has a class that the training rows lack, or too few images of
                a class for the shots or of all for the processes.
        """
        for split in SPLITS[stage]:
            images = self.images(split)
            if self.share and split != "predict" and len(images):
                self.loader(images)  # refuses fewer images than processes, before Lightning asks for it

    def images(self, split: str) -> Images:
        """Return the images of a split, prepared when they are asked for.

        Raises:
            TuningError: there is no such split, or what is said at `setup`.
        """
        if split not in self._images:
            rows = self.rows(split)
            if rows is None and split == "validation":
                return Images.none()
            if rows is None:
                raise TuningError(f"{type(self).__name__} has no {split} rows: give it a {split} split.")
            self._images[split] = self._chosen(rows, split)
        return self._images[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in another order each epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation batches, or none where there is no such split."""
        return self._loader("validation") if len(self.images("validation")) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to predict in their own order."""
        return self.plain_loader(self.images("predict"))

    def has(self, split: str) -> bool:
        """Return whether a split has images."""
        return len(self.images(split)) > 0

    def class_loader(self, split: str, classes: Sequence[int], shuffle: bool = False) -> DataLoader[Any] | None:
        """Return batches of the images of these classes, or None where a split has none of them."""
        images = self.images(split)
        chosen = np.flatnonzero(np.isin(images.labels, classes))  # type: ignore[arg-type]
        return self.loader(images.select(chosen), shuffle) if len(chosen) else None

    def loader(self, images: Any, shuffle: bool = False) -> DataLoader[Any]:
        """Return batches of these images, or of their features, shared out to the processes of the Trainer."""
        lengths = np.ones(len(images), "int8")
        batches = EpochBatches(lengths, self.batch_size, shuffle, bucket=False, seed=self.seed, **self.share)
        return self.batches_loader(images, batches)

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        images = self.images(split)
        return self.plain_loader(images) if self.overfits else self.loader(images, shuffle)

    def _chosen(self, rows: Dataset, split: str) -> Images:
        labelled = split != "predict"
        check_columns(rows, split, [self.image, self.label] if labelled else [self.image])
        if not len(rows):
            raise TuningError(f"the {split} split is empty: give it at least one row.")
        rows = rows.cast_column(self.image, ImageFeature(decode=False))
        if self.skip_corrupt:
            rows = self._readable(rows, split)
        rows, labels = self._labelled(rows, split) if labelled else (rows, None)
        keep = self.keep_in_memory and self.num_workers == 0
        return Images(rows, self.image, labels, self.transform(split), self.seed, keep)

    def _labelled(self, rows: Dataset, split: str) -> tuple[Dataset, np.ndarray]:
        """Return the rows of the classes and shots that are asked for, and the numbers of their classes."""
        labels = self._numbers(rows, split)
        kept = np.flatnonzero(labels >= 0)
        shots = {"train": self.shots, "validation": self.validation_shots}.get(split)
        if shots is not None:
            kept = self._few(labels, kept, shots, split)
        if not len(kept):
            raise TuningError(f"the {split} split has no images of the classes {', '.join(self.label_names)}.")
        labels = labels[kept]
        if split == "train" and (absent := sorted(set(range(self.num_labels)) - set(labels.tolist()))):
            names = ", ".join(self.label_names[number] for number in absent)
            rank_zero_warn(f"there are no training images of {names}: they cannot be learnt.")
        return rows.select(kept), labels

    def _numbers(self, rows: Dataset, split: str) -> np.ndarray:
        """Return the number of each row's class, -1 for a class that is left out."""
        own = class_names(rows, self.label, split)
        values = rows[self.label][:]
        for value in sorted(set(values)):
            if own[value] not in self.all_label_names:
                raise TuningError(
                    f"the {split} split has label {own[value]!r}, which train has not"
                    f"{near(own[value], self.all_label_names)}."
                )
        number = {name: i for i, name in enumerate(self.label_names)}
        return np.array([number.get(own[value], -1) for value in values])

    def _few(self, labels: np.ndarray, kept: np.ndarray, shots: int, split: str) -> np.ndarray:
        """Return the rows drawn: ``shots`` of each class, in the order of the rows."""
        chosen = []
        for number, name in enumerate(self.label_names):
            own = kept[labels[kept] == number]
            if len(own) < shots:
                argument = "shots" if split == "train" else "validation_shots"
                raise TuningError(
                    f"the {split} split has {len(own)} images of class {name!r}, and {argument}={shots}: "
                    f"take {len(own)} or fewer."
                )
            chosen.append(np.random.default_rng((self.seed, number)).permutation(own)[:shots])
        return np.sort(np.concatenate(chosen))

    def _readable(self, rows: Dataset, split: str) -> Dataset:
        from lightning_peft.data.image_transforms import decode

        kept, skipped = [], []
        for i, value in enumerate(rows[self.image]):
            try:
                decode(value, i + 1)
                kept.append(i)
            except TuningError:
                skipped.append(value["path"] or f"row {i + 1}")
        if skipped:
            rank_zero_warn(f"{len(skipped)} images of the {split} split cannot be read: {', '.join(skipped)}")
        return rows.select(kept) if skipped else rows


def _check_arguments(augment: Sequence[str], crop_scale: tuple[float, float], classes: str) -> None:
    if importlib.util.find_spec("PIL") is None:
        raise TuningError("images need Pillow, which is not there: pip install 'lightning-peft[vision]'.")
    if odd := [name for name in augment if name not in AUGMENTATIONS]:
        raise TuningError(f"augment has {odd[0]!r}{near(odd[0], AUGMENTATIONS)}.")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise TuningError(f"crop_scale={crop_scale} is no range of shares: give two numbers in 0 to 1.")
    if classes not in ("all", "base", "new"):
        raise TuningError(f"classes={classes!r} is no part of the classes: take 'all', 'base' or 'new'.")
