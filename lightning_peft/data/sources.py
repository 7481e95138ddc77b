"""Where rows come from: files, a data set of the Hugging Face hub, or the rules of `lightning_peft.data.synthetic`."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data import synthetic
from lightning_peft.data.token_data import TokenData

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    # Cells like "null" and "NA" are words here, not missing values.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


class SourcedData(TokenData):
    """Rows from CSV, JSON lines or Parquet files, from a dataset of the Hugging Face hub, or made by rules.

    Args:
        train: file of the training rows (.csv, .tsv, .json, .jsonl, .parquet); with ``dataset``, the name of a split.
        validation: the same for validation; None: the split of that name in ``dataset``, else a share of ``train``.
        test: the same for the test.
        predict: the same for prediction, needs no labels; None: the rows of the test.
        dataset: hub id or folder of a dataset, or ``made://NAME`` for rows that are made by rules; None: the splits are
            files.
        config: which of the configurations of ``dataset``, if it has several.
        validation_share: share of ``train`` drawn for validation where that has no rows of its own; 0: no validation.
        test_share: share of ``train`` drawn for the test where that has no rows of its own; 0: no test.
        **kwargs: as in `TokenData`.
    """

    def __init__(
        self,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset: str | None = None,
        config: str | None = None,
        validation_share: float = 0.1,
        test_share: float = 0.1,
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
        """The labelled rows, all at once, so that a mistake in those of the test shows before training."""
        found = {split: self._read(split) for split in ("train", "validation", "test") if self._has(split)}
        left, order = found["train"], np.random.default_rng(self.seed).permutation(len(found["train"]))
        for split, share in self.shares.items():
            if split not in found and share:
                count = round(share * len(left))
                found[split], order = left.select(np.sort(order[:count])), order[count:]
        if len(order) < len(left):
            found["train"] = left.select(np.sort(order))
        return found

    def _has(self, split: str) -> bool:
        return self.given[split] is not None or split in self._hub

    def _read(self, split: str) -> Dataset:
        name = self.given[split] or split
        if self.dataset is None:
            return _read_file(name, split)
        if name in self._hub:
            return self._hub[name]
        try:
            return load_dataset(self.dataset, self.config, split=name)  # a slice such as train[:1000]
        except (ValueError, OSError):
            raise TuningError(f"{self.dataset} has no split {name!r}{near(name, self._hub)}.") from None

    @cached_property
    def _hub(self) -> DatasetDict | dict[str, Dataset]:
        """The splits of ``dataset``."""
        if self.dataset is None:
            return {}
        if self.dataset.startswith(synthetic.SCHEME):
            return synthetic.load(self.dataset.removeprefix(synthetic.SCHEME))
        try:
            return load_dataset(self.dataset, self.config)
        except Exception as error:  # each builder raises its own
            raise TuningError(
                f"dataset={self.dataset!r} cannot be loaded ({_reason(error)}): give a hub id or a folder."
            ) from None


def _read_file(path: str, split: str) -> Dataset:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix in _FORMATS]
    if not suffixes:
        raise TuningError(f"{split}={path!r} ends in none of {', '.join(_FORMATS)}: give such a file, or dataset=.")
    if "://" not in path and not Path(path).is_file():
        raise TuningError(f"{split}={path!r} is no file: give the path of one.")
    builder, options = _FORMATS[suffixes[-1]]
    try:
        return load_dataset(builder, data_files={split: path}, split=split, **options)
    except Exception as error:  # each builder raises its own
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error) or "No columns" in _reason(error):
            raise TuningError(f"the {split} split is empty: {path} has no rows.") from None
        raise TuningError(f"{split}={path!r} is no readable {builder} file ({_reason(error)}): mend it.") from None


def _reason(error: BaseException) -> str:
    """Return the first line of the first error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
