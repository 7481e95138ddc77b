"""Encodes rows as their raw columns, for a task that writes its own prompts."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from lightning_peft.data.classes import class_numbers
from lightning_peft.data.protocols import LabelledRows, Rows


def as_fields(data: Rows, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
    """Return the encoding by which a row of a batch is its columns, in ``fields``, and the number of its class, if any.

    Args:
        data: the data module of the rows.
        rows: of the split.
        split: 'train', 'validation', 'test' or 'predict'.

    Raises:
        TuningError: a row has a class that the training rows lack.
    """
    if split == "predict" or not isinstance(data, LabelledRows):
        return _fields, {"label": None, "numbers": None}
    return _fields, {"label": data.label, "numbers": class_numbers(rows, data.label, split, list(data.label_names))}


def _fields(
    rows: Mapping[str, list[Any]], label: str | None, numbers: list[tuple[Any, int]] | None
) -> dict[str, list[Any]]:
    names = list(rows)
    found: dict[str, list[Any]] = {
        "fields": [dict(zip(names, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    }
    found["length"] = [sum(len(value) for value in row.values() if isinstance(value, str)) for row in found["fields"]]
    if label is not None and numbers is not None:
        number = dict(numbers)
        found["labels"] = [number[value] for value in rows[label]]
    return found
