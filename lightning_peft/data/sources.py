"""Loads text rows from files, from the Hugging Face hub, or from the rules of `lightning_peft.data.synthetic`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, load_dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data import synthetic
from lightning_peft.data.conversions import Conversion, converted
from lightning_peft.data.splits import GivenSplits, is_file, reason
from lightning_peft.data.token_data import TokenData

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    # Cells like "null" and "NA" are words here, not missing values.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
ENDINGS = tuple(_FORMATS)
"""How files of rows end."""


class SourcedData(GivenSplits, TokenData):
    """Rows from CSV, JSON lines or Parquet files, from a dataset of the Hugging Face hub, or made by rules.

    The cells of a CSV file are separated by commas, or by semicolons or tabs if its first line has them and no comma.

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
        whole: train with the validation rows, too, as in a last run, once settings have been chosen on them; what is
            validated then are rows that are known.
        convert: name of a known data set, e.g. 'e2e' or 'boolq', whose rows are turned into the columns of the task;
            see `data.conversions`.
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
        whole: bool = False,
        convert: Conversion | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.convert = convert
        self._drawn: dict[str, Sequence[int]] = {}
        self.use(dataset, config, (train, validation, test, predict), validation_share, test_share, whole)

    def rows(self, split: str) -> Dataset | None:
        """Return the rows of a split, as read or drawn, in the columns of the task."""
        rows = super().rows(split)
        return rows if rows is None or self.convert is None else converted(rows, self.convert, split)

    def row_name(self, split: str, number: int) -> str:
        """Return what an error calls a row, counted from 1 as the user has the rows; ``number`` is from 0 as we do."""
        split = "test" if split == "predict" and not self.given[split] else split
        if split == "train" and self.whole and "validation" in self._splits:
            own = len(self._splits["train"]) - len(self._splits["validation"])
            if number >= own:
                return self.row_name("validation", number - own)
        if self.convert is not None:
            return f"row {number + 1} of the {split} split, as convert={self.convert!r} makes them,"
        if split not in self._drawn:
            return f"row {number + 1} of the {split} split"
        drawn = f", drawn for {split}," if split != "train" else ""
        return f"row {self._drawn[split][number] + 1} of the train split{drawn}"

    def all_classes(self) -> Dataset:
        """Return the training rows before any have been drawn from them."""
        rows = super().all_classes()
        return rows if self.convert is None else converted(rows, self.convert, "train")

    def draw(self, rows: Dataset, shares: dict[str, float]) -> dict[str, Dataset]:
        """Draw rows for each share, and keep the order of the rows."""
        order = np.random.default_rng(self.seed).permutation(len(rows))
        for split, share in shares.items():
            count = round(share * len(rows))
            self._drawn[split], order = np.sort(order[:count]).tolist(), order[count:]
        if len(order) < len(rows):
            self._drawn["train"] = np.sort(order).tolist()
        return {split: rows.select(numbers) for split, numbers in self._drawn.items()}

    def load(self, dataset: str, **options: Any) -> Any:
        """Return the splits of a dataset, or those that a rule makes."""
        if dataset.startswith(synthetic.SCHEME) and not options:
            return synthetic.load(dataset.removeprefix(synthetic.SCHEME))
        return super().load(dataset, **options)

    def read_file(self, path: str, split: str) -> Dataset:
        """Return the rows of a file of a known form.

        Raises:
            TuningError: there is no such file, or it cannot be read or is empty.
        """
        suffixes = [suffix for suffix in map(str.lower, Path(path).suffixes) if suffix in _FORMATS]
        if not suffixes:
            raise TuningError(f"{split}={path!r} ends in none of {', '.join(_FORMATS)}: give such a file, or dataset=.")
        if not is_file(path):
            raise TuningError(f"{split}={path!r} is no file: give the path of one.")
        builder, options = _FORMATS[suffixes[-1]]
        if Path(path).suffix.lower() == ".csv" and "://" not in path:
            options = options | {"sep": _separator(path)}
        try:
            with _silence():
                return load_dataset(builder, data_files={split: path}, split=split, **options)
        except Exception as error:  # each builder raises its own
            if (
                isinstance(error, StopIteration)
                or "corresponds to no data" in str(error)
                or "No columns" in reason(error)
            ):
                raise TuningError(f"the {split} split is empty: {path} has no rows.") from None
            said = f"{split}={path!r} is no readable {builder} file ({reason(error)})"
            raise TuningError(f"{said}: {_remedy(reason(error), path)}.") from None


def _separator(path: str) -> str:
    """Return what separates the cells of a CSV file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.readline()
    return next((mark for mark in ",;\t" if mark in head), ",")


def _remedy(said: str, path: str) -> str:
    """Return what to do about a file that cannot be read."""
    if "codec can't decode" in said:
        return f"save it as UTF-8 (iconv -f latin1 -t utf-8 {path} > NEW, or with -f utf-16)"
    return "put quotes around a text that has the separator in it" if "Expected" in said else "mend it"


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the library from logging the error that it raises."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
