"""Class names and class indices of a label column."""

from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from lightning_peft.core.columns import OWNERS
from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near

_TYPES = ("int", "uint", "bool", "string", "large_string")
"""How the names of the column types begin whose values can be classes."""


def check_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """See that the rows have these columns.

    Raises:
        TuningError: one is missing.
    """
    for column in columns:
        if column not in rows.column_names:
            owners = [OWNERS[name] for name in rows.column_names if name in OWNERS and column not in OWNERS]
            other = f": such rows are those of {owners[0]}" if owners else ""
            raise TuningError(f"the {split} split has no column {column!r}{near(column, rows.column_names)}{other}.")


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
    lacking = {value for value in values if value is None or value == "" or (named and value < 0)}
    if lacking and not skip:
        first = next(number for number, value in enumerate(rows[column], 1) if value in lacking)
        raise TuningError(
            f"the {split} split has rows without a label in column {column!r}, the first of them row {first}: leave "
            "them out."
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
