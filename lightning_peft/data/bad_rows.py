"""What is wrong with a row, and looking at the values of one."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED


class BadRowError(Exception):
    """What is wrong with a row: the end of a sentence that begins with its number."""


def is_number(value: Any) -> bool:
    """Tell whether the value of a row is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_blank(value: Any) -> bool:
    """Tell whether there is nothing in the value of a row."""
    return value is None or (isinstance(value, str) and not value.strip())


def shown(value: Any) -> str:
    """Return a value as an error shows it: its first letters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_text(value: Any, name: str) -> str:
    """Return the text in a column of this name.

    Raises:
        BadRowError: there is none.
    """
    if not isinstance(value, str) or is_blank(value):
        raise BadRowError(f"has {shown(value)} in column {name!r}: give a text.")
    return value


def check_any(row: Mapping[str, Any], names: Sequence[str]) -> None:
    """See that one of these columns of a row has something in it.

    Raises:
        BadRowError: all are empty.
    """
    if names and all(is_blank(row[name]) for name in names):
        raise BadRowError(f"has nothing in {' and '.join(map(repr, names))}: give a text, or leave the row out.")


def check_label(value: Any, name: str, numbers: Mapping[Any, int]) -> None:
    """See that a row has a class; ``numbers`` has all that others have.

    Raises:
        BadRowError: it has none.
    """
    if value not in numbers:
        raise BadRowError(f"has no label in column {name!r}: give one, or leave the row out.")


def numbered(values: Sequence[Any], name: str, numbers: Mapping[Any, int]) -> tuple[list[int], list[str]]:
    """Return the numbers of the classes in a column, -100 where there is none, and what is wrong with each row."""
    problems = [problem_of(check_label, value, name, numbers) for value in values]
    return [numbers.get(value, IGNORED) for value in values], problems


def problem_of(check: Callable[..., Any], *args: Any) -> str:
    """Return what a check says is wrong, or nothing."""
    try:
        check(*args)
    except BadRowError as error:
        return str(error)
    return ""


def other_names(rows: Dataset, number: int, names: Sequence[str]) -> str:
    """Return what is wrong with a row that lacks a column and has one that the first row has not, else nothing."""
    first, row = rows[0], rows[number]
    missing = [name for name in names if row[name] is None and first[name] is not None]
    others = [name for name in rows.column_names if row[name] is not None and first[name] is None]
    if not missing or not others:
        return ""
    return f"has {others[0]!r} and no {missing[0]!r}, unlike the first row: give all rows the same names."


def check_good(bad: int, of: int, first: str, skip: bool, split: str) -> None:
    """See that no row is bad, or that bad ones are to be skipped and others are left; say how many are.

    Raises:
        TuningError: they are not to be skipped, or all are bad.
    """
    if not bad:
        return
    if not skip or bad == of:
        raise TuningError(first)
    rank_zero_warn(f"{bad} of {of} rows of the {split} split are left out, the first: {first}")
