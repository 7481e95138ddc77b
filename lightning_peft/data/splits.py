"""Train, validation, test and predict splits: from files, from a dataset's own splits, or drawn from train."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near

NAMED = ("train", "validation", "test")


class GivenSplits:
    """Rows of splits that are files, or those of a dataset, or drawn from the training rows.

    A subclass says how a file and a dataset are read, and how rows are drawn.
    """

    dataset: str | None
    config: str | None
    given: dict[str, str | None]
    """Split -> file, or the name of the split in the dataset."""
    shares: dict[str, float]
    """Split -> the share of the training rows that is drawn for it where it has none of its own."""
    whole: bool
    """Whether the validation rows are trained on, too."""
    known = "a hub id or a folder"
    """What ``dataset`` may be, for error messages."""

    def use(
        self,
        dataset: str | None,
        config: str | None,
        given: Sequence[str | None],
        validation_share: float,
        test_share: float,
        whole: bool,
    ) -> None:
        """Set where rows come from; ``given`` are train, validation, test and predict.

        Raises:
            TuningError: the shares leave nothing to train on.
        """
        if not (validation_share >= 0 and test_share >= 0 and validation_share + test_share < 1):
            raise TuningError(
                f"validation_share={validation_share} and test_share={test_share} leave nothing to train on: "
                "let them be 0 or more, and less than 1 together."
            )
        self.dataset, self.config = dataset, config
        self.given = dict(zip((*NAMED, "predict"), given, strict=True))
        self.shares = {"test": test_share, "validation": validation_share}
        self.whole = whole

    def rows(self, split: str) -> Dataset | None:
        """Return the rows of a split, as read or drawn; rows to predict need no others."""
        if split == "predict":
            return self._read(split) if self.given[split] else self._splits.get("test")
        return self._splits.get(split)

    def all_classes(self) -> Dataset:
        """Return the training rows before any have been drawn from them."""
        return self._read("train")

    def draw(self, rows: Dataset, shares: dict[str, float]) -> dict[str, Dataset]:
        """Return the training rows without those that are drawn, and the drawn ones of each split with a share."""
        raise NotImplementedError

    def read_file(self, path: str, split: str) -> Dataset:
        """Return the rows of a file."""
        raise NotImplementedError

    def load(self, dataset: str, **options: Any) -> Any:
        """Return the splits of a dataset."""
        return load_dataset(dataset, self.config, **options)

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        """The labelled rows, all at once, so that a mistake in those of the test shows before training."""
        found = {split: self._read(split) for split in NAMED if self.given[split] or split in self._whole}
        missing = {split: share for split, share in self.shares.items() if split not in found and share}
        found |= self.draw(found["train"], missing) if missing else {}
        if self.whole and "validation" in found:
            found["train"] = _together(found["train"], found["validation"])
        return found

    def _read(self, split: str) -> Dataset:
        name = self.given[split] or split
        if self.dataset is None:
            return self.read_file(name, split)
        if name in self._whole:
            return self._whole[name]
        try:
            return self.load(self.dataset, split=name)  # a slice such as train[:1000]
        except (ValueError, OSError):
            raise TuningError(f"{self.dataset} has no split {name!r}{near(name, self._whole)}.") from None

    @cached_property
    def _whole(self) -> DatasetDict | dict[str, Dataset]:
        """The splits of ``dataset``."""
        if self.dataset is None:
            return {}
        try:
            return self.load(self.dataset)
        except Exception as error:  # each builder raises its own
            raise TuningError(
                f"dataset={self.dataset!r} cannot be loaded ({reason(error)}): give {self.known}."
            ) from None


def _together(train: Dataset, validation: Dataset) -> Dataset:
    try:
        return concatenate_datasets([train, validation])
    except ValueError as error:
        raise TuningError(
            f"whole=True trains on the validation rows, too, which have other columns ({reason(error)}): leave it out."
        ) from None


def is_file(path: str) -> bool:
    """Tell whether a path is that of a file, or one that is not on this machine."""
    return "://" in path or Path(path).is_file()


def reason(error: BaseException) -> str:
    """Return the first line of the first error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
