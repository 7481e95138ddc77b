"""Images and their classes from folders, Parquet files or the Hugging Face hub."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.image_data import ImageData

_SPLITS = ("train", "validation", "test")


class ImageClassificationData(ImageData):
    """Images and their classes from a folder, from Parquet files, or from a dataset of the Hugging Face hub.

    A folder has one folder of image files for each class, below folders named train, validation and test if it is split
    already: ``train/cat/1.png``. A split that is not there is drawn from ``train``, as many of each class as its share.

    Args:
        dataset: folder or hub id of a dataset; None: the splits are Parquet files.
        config: which of the configurations of a hub ``dataset``, if it has several.
        train: name of the split to train with (``train[:1000]`` is one, too); without ``dataset``, a Parquet file.
        validation: the same for validation; None: the split of that name, else a share of ``train``.
        test: the same for the test.
        predict: the same for prediction, needs no labels; None: the images of the test.
        image: column of the image.
        label: column of the class: strings, integers or class labels.
        validation_share: share of ``train`` drawn for validation where that has no images of its own; 0: no validation.
        test_share: share of ``train`` drawn for the test where that has no images of its own; 0: no test.
        **kwargs: as in `ImageData`.
    """

    def __init__(
        self,
        dataset: str | None = None,
        config: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image: str = "image",
        label: str = "label",
        validation_share: float = 0.1,
        test_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (validation_share >= 0 and test_share >= 0 and validation_share + test_share < 1):
            raise TuningError(
                f"validation_share={validation_share} and test_share={test_share} leave nothing to train on: "
                "let them be 0 or more, and less than 1 together."
            )
        self.dataset = dataset
        self.config = config
        self.image = image
        self.label = label
        self.given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.shares = {"test": test_share, "validation": validation_share}

    def rows(self, split: str) -> Dataset | None:
        """Return the rows of a split, as read or drawn; rows to predict need no others."""
        if split == "predict":
            return self._read(split) if self.given[split] else self._splits.get("test")
        return self._splits.get(split)

    def all_classes(self) -> Dataset:
        """Return the training rows before any have been drawn from them."""
        return self._read("train")

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        found = {split: self._read(split) for split in _SPLITS if self.given[split] or split in self._whole}
        train = found["train"]
        missing = {split: share for split, share in self.shares.items() if split not in found and share}
        if not missing or not len(train) or self.label not in train.column_names:
            return found
        values = np.asarray(train[self.label][:])
        parts: dict[str, list[np.ndarray]] = {split: [] for split in (*missing, "train")}
        for number, value in enumerate(np.unique(values)):
            own = np.random.default_rng((self.seed, number)).permutation(np.flatnonzero(values == value))
            counts = [round(share * len(own)) for share in missing.values()]
            for split, rows in zip(parts, np.split(own, np.cumsum(counts)), strict=True):
                parts[split].append(rows)
        drawn = {split: np.sort(np.concatenate(rows)) for split, rows in parts.items()}
        return found | {split: train.select(rows) for split, rows in drawn.items() if len(rows)}

    def _read(self, split: str) -> Dataset:
        name = self.given[split] or split
        if self.dataset is None:
            return _parquet(name, split)
        if name in self._whole:
            return self._whole[name]
        try:
            return self._load(split=name)
        except ValueError:
            raise TuningError(f"{self.dataset} has no split {name!r}{near(name, self._whole)}.") from None

    @cached_property
    def _whole(self) -> DatasetDict | dict[str, Dataset]:
        """The splits of ``dataset``."""
        if self.dataset is None:
            return {}
        try:
            return self._load()
        except Exception as error:  # each builder raises its own
            raise TuningError(
                f"dataset={self.dataset!r} cannot be loaded ({_reason(error)}): give a folder of images or a hub id."
            ) from None

    def _load(self, **kwargs: Any) -> Any:
        assert self.dataset is not None
        if Path(self.dataset).is_dir() and not any(Path(self.dataset).glob("*.parquet")):
            return load_dataset("imagefolder", data_dir=self.dataset, **kwargs)
        return load_dataset(self.dataset, self.config, **kwargs)


def _parquet(path: str, split: str) -> Dataset:
    if Path(path).suffix != ".parquet" or ("://" not in path and not Path(path).is_file()):
        raise TuningError(f"{split}={path!r} is no Parquet file: give the path of one, or a folder with dataset=.")
    try:
        return load_dataset("parquet", data_files={split: path}, split=split)
    except Exception as error:  # each builder raises its own
        raise TuningError(f"{split}={path!r} is no readable Parquet file ({_reason(error)}): mend it.") from None


def _reason(error: BaseException) -> str:
    """Return the first line of the first error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
