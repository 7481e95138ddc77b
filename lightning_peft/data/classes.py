"""Class names and class indices of a label column."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.columns import OWNERS
from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.bad_rows import is_blank

_TYPES = ("int", "uint", "bool", "string", "large_string")
"""How the names of the column types begin whose values can be classes."""
_FEW = 10
"""So many classes are never too many."""


def check_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """See that the rows have these columns.

    Raises:
        TuningError: one is missing.
    """
    for column in columns:
        if column not in rows.column_names:
            owners = [OWNERS[name] for name in rows.column_names if name in OWNERS and column not in OWNERS]
            other = f": such rows are those of {owners[0]}" if owners else ""
            alike = next((name for name in rows.column_names if _folded(name) == _folded(column)), None)
            has = near(column, rows.column_names) if alike is None else f"; it has {alike!r}"
            raise TuningError(
                f"the {split} split has no column {column!r}{has}{other or ': name the one that is meant'}."
            )


def class_names(rows: Dataset, column: str, split: str, skip: bool = False) -> dict[Any, str]:
    """Return value -> name of the class for the values of a label column, in the order of the classes.

    Raises:
        TuningError: the column holds no classes, or a row has none and is not to be skipped.
    """
    feature = rows.features[column]
    named = isinstance(feature, ClassLabel)
    kind = str(getattr(feature, "dtype", feature))
    if not named and not kind.startswith(_TYPES):
        raise TuningError(f"column {column!r} of the {split} split holds {kind}: give strings or integers as classes.")
    values = set(rows[column][:])
    lacking = {value for value in values if is_blank(value) or (named and value < 0)}
    if lacking and not skip:
        first = next(number for number, value in enumerate(rows[column], 1) if value in lacking)
        raise TuningError(
            f"the {split} split has rows without a label in column {column!r}, the first of them row {first}: leave "
            "them out, or set skip_bad_rows."
        )
    return dict(enumerate(feature.names)) if named else {value: str(value) for value in sorted(values - lacking)}


def class_numbers(
    rows: Dataset, column: str, split: str, names: Sequence[str], skip: bool = False
) -> list[tuple[Any, int]]:
    """Return ``(value, number)`` for the values of a label column; the number is the place of the name in ``names``.

    Raises:
        TuningError: a value is none of these classes, or there is none and the row is not to be skipped.
    """
    own = class_names(rows, column, split, skip)
    for value in sorted(set(rows[column][:]) & own.keys()):
        if own[value] not in names:
            raise TuningError(
                f"the {split} split has label {own[value]!r}, which train has not{near(own[value], names)}."
            )
    return [(value, names.index(name)) for value, name in own.items() if name in names]


def warn_of_odd(names: Sequence[str], column: str, rows: int) -> None:
    """Warn of classes that look like a slip: written alike, or nearly as many as there are rows."""
    written: dict[str, list[str]] = {}
    for name in names:
        written.setdefault(_folded(name), []).append(name)
    for alike in written.values():
        if len(alike) > 1:
            rank_zero_warn(
                f"the classes {alike} of column {column!r} differ by blanks or capitals alone, and are told apart: "
                "write them alike if one is meant."
            )
    if len(names) > max(_FEW, rows / 2):
        rank_zero_warn(
            f"column {column!r} has {len(names)} classes in {rows} rows, too many to learn from so few: see that it is "
            "the column of the label."
        )


def warn_of_unlearned(numbers: Sequence[tuple[Any, int]], names: Sequence[str], column: str) -> None:
    """Warn of classes that no training row has: all of theirs have been drawn for validation or test."""
    lacking = sorted({*range(len(names))} - {number for _, number in numbers})
    if lacking:
        named = ", ".join(repr(names[number]) for number in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
        rank_zero_warn(
            f"no training row has {named} in column {column!r}, whose rows were drawn for validation or test: give "
            "more of them, or files for those splits."
        )


def _folded(name: str) -> str:
    return name.strip().casefold()
