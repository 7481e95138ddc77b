"""Encodes rows as their raw columns, for a task that writes its own prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lightning_peft.data.bad_rows import check_any, numbered, problem_of
from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import LabelledRows, Rows


def as_fields(
    data: Rows, needed: Sequence[Sequence[str]], rows: Dataset, split: str
) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
    """Return the encoding by which a row of a batch is its columns, in ``fields``, and the number of its class, if any.

    Args:
        data: the data module of the rows.
        needed: groups of columns; of each, one column of a row must have something in it.
        rows: of the split.
        split: 'train', 'validation', 'test' or 'predict'.

    Raises:
        TuningError: a row has a class that the training rows lack.
    """
    how: dict[str, Any] = {
        "label": None,
        "numbers": None,
        "needed": [own for names in needed if (own := [n for n in names if n in rows.column_names])],
    }
    if split == "predict" or not isinstance(data, LabelledRows):
        return _fields, how
    numbers = class_numbers(rows, data.label, split, list(data.label_names), skip=True)
    return _fields, how | {"label": data.label, "numbers": numbers}


def _fields(
    rows: Mapping[str, list[Any]], label: str | None, numbers: list[tuple[Any, int]] | None, needed: list[list[str]]
) -> dict[str, list[Any]]:
    names = list(rows)
    found: dict[str, list[Any]] = {
        "fields": [dict(zip(names, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    }
    found["length"] = [sum(len(value) for value in row.values() if isinstance(value, str)) for row in found["fields"]]
    found["problem"] = [problem_of(_check_all, row, needed) for row in found["fields"]]
    if label is not None and numbers is not None:
        found["labels"], lacking = numbered(rows[label], label, dict(numbers))
        found["problem"] = [one or other for one, other in zip(found["problem"], lacking, strict=True)]
    return found


def _check_all(row: Mapping[str, Any], needed: list[list[str]]) -> None:
    for names in needed:
        check_any(row, names)
