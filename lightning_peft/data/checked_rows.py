"""The base class of data that may leave out rows that cannot be used, and look for rows that contradict others."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.data.sources import SourcedData


class CheckedRows(SourcedData):
    """Rows of which the function of `encoding` says in ``problem`` what is wrong with each, or nothing.

    Args:
        skip_bad_rows: leave out rows that cannot be used, and say how many; else the first of them is an error.
        **kwargs: as in `SourcedData` and `TokenData`.
    """

    def __init__(self, skip_bad_rows: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.skip_bad_rows = skip_bad_rows

    def sides(self, split: str) -> Sequence[str]:
        """Return the columns that no other row may have with the last two exchanged; none: rows may have any."""
        return ()

    def problems(self, encoded: Dataset, rows: Dataset, split: str) -> dict[int, str]:
        """Return what is wrong with a row, in itself or beside one that says the same the other way round."""
        names, found = self.sides(split), dict[int, int]()
        problems = super().problems(encoded, rows, split)
        if self.encodes_otherwise:
            return problems
        for number, values in enumerate(zip(*(rows[name] for name in names), strict=True)):
            *same, one, other = map(_key, values)
            turned = found.get(hash((*same, other, one)))
            if one != other and turned is not None:
                problems.setdefault(
                    number,
                    f"has in {names[-2]!r} and {names[-1]!r} what {self.row_name(split, turned)} has the other way "
                    "round: leave out the one that is wrong.",
                )
            else:
                found.setdefault(hash((*same, one, other)), number)
        return problems


def _key(value: Any) -> str:
    return value.strip() if isinstance(value, str) else repr(value)
