"""Rows as they are, for a task that writes its own prompts."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from lightning_peft.data.classes import class_numbers


def as_fields(data: Any, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
    """Return the encoding by which a row of a batch is its columns, in ``fields``, and the number of its class, if any.

    Args:
        data: a data module; one with classes has ``label`` and ``label_names``.
        rows: of the split.
        split: 'train', 'validation', 'test' or 'predict'.

    Raises:
        TuningError: a row has a class that the training rows lack.
    """
    label = getattr(data, "label", None)
    labelled = split != "predict" and isinstance(label, str) and hasattr(data, "label_names")
    numbers = class_numbers(rows, label, split, data.label_names) if labelled else None  # type: ignore[arg-type]
    return _fields, {"label": label if labelled else None, "numbers": numbers}


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
