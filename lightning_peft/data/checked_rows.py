"""The base class of data that look at every row before training, and name the first that cannot be used."""

import math
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.data.sources import SourcedData


def is_number(value: Any) -> bool:
    """Tell whether the value of a row is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class BadRowError(Exception):
    """What is wrong with a row: the end of a sentence that begins with its number."""


class CheckedRows(SourcedData):
    """Rows of which the function of `encoding` says in ``problem`` what is wrong with each, or nothing.

    Args:
        skip_bad_rows: leave out rows that cannot be used, and say how many; else the first of them is an error.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(self, skip_bad_rows: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.skip_bad_rows = skip_bad_rows

    def finished(self, encoded: Dataset, split: str) -> Dataset:
        """Return the rows of a split as they are loaded, from those that nothing is wrong with."""
        return encoded

    def _encode(self, rows: Dataset, split: str) -> Dataset:
        encoded = super()._encode(rows, split).with_format(None)
        done = self.finished(self._without_bad(encoded, split), split)
        return done.with_format(None, columns=[name for name in done.column_names if name != "length"])

    def _without_bad(self, encoded: Dataset, split: str) -> Dataset:
        """Return the rows that nothing is wrong with.

        Raises:
            TuningError: there are others, and they are not to be skipped, or there are no more rows.
        """
        problems = [(number, problem) for number, problem in enumerate(encoded["problem"]) if problem]
        encoded = encoded.remove_columns("problem")
        if not problems:
            return encoded
        first = f"row {problems[0][0]} of the {split} split {problems[0][1]}"
        if not self.skip_bad_rows or len(problems) == len(encoded):
            raise TuningError(first)
        rank_zero_warn(f"{len(problems)} of {len(encoded)} rows of the {split} split are left out, the first: {first}")
        bad = {number for number, _ in problems}
        return encoded.select([number for number in range(len(encoded)) if number not in bad])
