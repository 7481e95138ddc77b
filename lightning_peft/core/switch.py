"""Which methods of a backbone compute now: one object, which all grafts of a backbone ask."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.core.streams import Stream


@dataclass
class Rows:
    """Rows of a batch for which the same methods compute.

    Attributes:
        numbers: of the rows, ascending.
        off: the methods that rest.
        stream: where what computes for these rows draws its random numbers from; None: where all draw from.
    """

    numbers: list[int]
    off: frozenset[str]
    stream: Stream | None = None


class Switch:
    """Knows the methods that rest, by the names of their owners; a copy of the backbone has one of its own.

    A graft whose owner rests returns what it gets, so that its host computes as if it were not there. Where methods
    rest for some rows of a batch alone, a host with grafts is called once for each group of rows: see `by_rows`.

    Attributes:
        off: the methods that rest, for all rows.
        groups: the groups of rows, which have their own; None: all rows are alike.
    """

    def __init__(self) -> None:
        self.off: frozenset[str] = frozenset()
        self.groups: list[Rows] | None = None

    def by_rows(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a call gives, of which each group of rows is called on its own with its own methods."""
        groups, off = self.groups, self.off
        assert groups is not None
        size = sum(len(group.numbers) for group in groups)
        _check_rows([*args, *kwargs.values()], size)
        outputs = []
        try:
            for group in groups:
                self.groups, self.off = None, group.off
                own = [_taken(value, group.numbers, size) for value in args]
                named = {n: v if n in _WHOLE else _taken(v, group.numbers, size) for n, v in kwargs.items()}
                with group.stream or nullcontext():
                    outputs.append(call(*own, **named))
        finally:
            self.groups, self.off = groups, off
        return _joined(outputs, [group.numbers for group in groups])


_WHOLE = ("cache_position",)
"""Arguments that are along the text and not along the batch."""


def _check_rows(values: Sequence[Any], size: int) -> None:
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim]
    if tensors and not any(len(tensor) % size == 0 or len(tensor) == 1 for tensor in tensors):
        raise TuningError(
            f"a batch of {len(tensors[0])} rows is routed by {size} names: give one name, or None, for each row."
        )
    for value in values:
        if not isinstance(value, Tensor) and callable(getattr(value, "get_seq_length", None)):
            raise TuningError(
                "a cache holds keys and values of all rows, and a delta that changes a whole attention or decoder "
                "cannot fill it by row: give use_cache=False."
            )


def _taken(value: Any, rows: list[int], size: int) -> Any:
    """Return these rows of a tensor, or of those in tuples and dictionaries; what has no rows is whole."""
    if isinstance(value, Tensor):
        if not value.ndim or (len(value) == 1 and size > 1) or len(value) % size:
            return value
        rows = _repeated(rows, len(value) // size)
        if rows == list(range(rows[0], rows[-1] + 1)):
            return value[rows[0] : rows[-1] + 1]
        return value[torch.tensor(rows, device=value.device)]
    if type(value) in (tuple, list):
        return type(value)(_taken(each, rows, size) for each in value)
    if isinstance(value, dict):
        return {name: _taken(each, rows, size) for name, each in value.items()}
    return value


def _joined(outputs: Sequence[Any], groups: Sequence[list[int]]) -> Any:
    """Return the outputs of groups of rows as one, in the order of the rows."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return _tensor(outputs, groups)
    if isinstance(first, Mapping):
        joined = {name: _joined([out[name] for out in outputs], groups) for name in first}
        return type(first)(**{name: value for name, value in joined.items() if value is not None})
    if type(first) in (tuple, list):
        return type(first)(_joined(list(each), groups) for each in zip(*outputs, strict=True))
    return None if callable(getattr(first, "get_seq_length", None)) else first


def _tensor(outputs: Sequence[Tensor], groups: Sequence[list[int]]) -> Tensor:
    if any(not out.ndim for out in outputs):
        raise TuningError(
            "a delta that changes the whole model is called for its rows alone, which have no common loss: leave out "
            "labels and compute it from the logits."
        )
    parts = []
    for out, rows in zip(outputs, groups, strict=True):
        parts.append(out.expand(len(rows), *out.shape[1:]) if len(out) == 1 and len(rows) > 1 else out)
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise TuningError(
            f"the deltas of these rows give outputs of shapes {shapes}, which are no batch: give the model what "
            "prepare(model, batch) returns, or route to deltas of equal length."
        )
    each = len(parts[0]) // len(groups[0])
    order = [row for rows in groups for row in _repeated(rows, each)]
    joined = torch.cat(parts)
    if order == list(range(len(order))):
        return joined
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return joined[place.to(joined.device)]


def _repeated(rows: list[int], each: int) -> list[int]:
    return rows if each == 1 else [row * each + i for row in rows for i in range(each)]
