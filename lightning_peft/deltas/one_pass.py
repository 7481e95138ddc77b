"""One pass of a backbone for several deltas, each of which is computed on the same rows, and takes its part of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.routing import can_share, side_by_side
from lightning_peft.core.streams import Stream
from lightning_peft.core.switch import Rows
from lightning_peft.core.tuning import Tuning
from lightning_peft.training import patches


class OnePass:
    """Answers the calls of the core of a backbone, which runs when the first delta calls it, for all of them.

    The core is what a transformers model has below its head, so that each delta has its own call of the head, and the
    loss that the model computes itself is of its own rows.

    Args:
        backbone: the tuned backbone.
        names: of the deltas.
        streams: where each draws its random numbers from.
    """

    def __init__(self, backbone: nn.Module, names: Sequence[str], streams: Sequence[Stream]) -> None:
        tuning = Tuning.of(backbone)
        assert tuning is not None
        self.backbone, self.tuning, self.names, self.streams = backbone, tuning, list(names), list(streams)
        self.core = structure.base_model_of(backbone)
        self.keys = [frozenset(tuning.of_delta(name)) for name in names]
        self.others = tuning.switch.off.difference(*self.keys)
        self.current = 0
        self.calls: list[tuple[tuple[Any, Any], Any, int]] = []
        self.number = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Answer calls of the core inside the context, where the methods can share it."""
        if not can_share(self.backbone, self.tuning, self.core, sorted(frozenset().union(*self.keys))):
            yield
            return
        inner = vars(self.core).get("forward") or partial(type(self.core).forward, self.core)
        with patches.patched(self.core, "forward", partial(self._answer, inner)):
            yield

    def off(self, member: int) -> frozenset[str]:
        """Return the methods that rest while one delta computes."""
        return self.others.union(*self.keys) - self.keys[member]

    @contextmanager
    def turn(self, member: int) -> Iterator[None]:
        """Let the delta of this number compute, and draw from its stream, inside the context."""
        self.current, self.number = member, 0
        switch = self.tuning.switch
        before, switch.off = switch.off, self.off(member)
        try:
            with self.streams[member]:
                yield
        finally:
            switch.off = before

    def _answer(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        number, self.number = self.number, self.number + 1
        if number == len(self.calls) and self.current == 0:
            self.calls.append(((args, kwargs), *self._run(inner, args, kwargs)))
        if number >= len(self.calls) or not _same(self.calls[number][0], (args, kwargs)):
            raise TuningError(
                f"the step calls the {type(self.core).__name__} with other inputs for {self.names[self.current]} than "
                f"for {self.names[0]}, so one pass does not do for all: draw at random in the data, not in the step."
            )
        _, output, rows = self.calls[number]
        return _part(output, self.current * rows, rows, len(self.names))

    def _run(self, inner: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        if not tensors:
            raise TuningError(f"{type(self.core).__name__} is called without a tensor of rows: give it a batch.")
        rows, count = len(tensors[0]), len(self.names)
        groups = [
            Rows(list(range(i * rows, (i + 1) * rows)), self.off(i), stream) for i, stream in enumerate(self.streams)
        ]
        with side_by_side(self.backbone, self.tuning, self.core, groups):
            output = inner(*_repeated(args, rows, count), **_repeated(kwargs, rows, count))
        return output, rows


def _repeated(value: Any, rows: int, count: int) -> Any:
    """Return a tensor of rows with all of them ``count`` times, one time after the other, or those in a collection."""
    if isinstance(value, Tensor):
        return value.repeat(count, *[1] * (value.ndim - 1)) if value.ndim and len(value) == rows else value
    if isinstance(value, Mapping):
        return {name: _repeated(each, rows, count) for name, each in value.items()}
    return type(value)(_repeated(each, rows, count) for each in value) if type(value) in (tuple, list) else value


def _part(output: Any, first: int, rows: int, count: int) -> Any:
    """Return some rows of an output; a cache, which has no rows, is left out."""
    if isinstance(output, Tensor):
        if not output.ndim or len(output) % (rows * count):
            raise TuningError(
                f"the core of the backbone gives a tensor of shape {list(output.shape)} for {count} x {rows} rows, of "
                "which no delta has a part: compute the loss outside of it, from the outputs of the rows."
            )
        each = len(output) // (rows * count)
        return output[first * each : (first + rows) * each]
    if isinstance(output, Mapping):
        parts = {name: _part(each, first, rows, count) for name, each in output.items()}
        return type(output)(**{name: part for name, part in parts.items() if part is not None})
    if type(output) in (tuple, list):
        return type(output)(_part(each, first, rows, count) for each in output)
    return None if callable(getattr(output, "get_seq_length", None)) else output


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and (one is other or (one.shape == other.shape and torch.equal(one, other)))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if type(one) in (tuple, list):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return one is other or type(one) is not type(other) or type(one).__module__ != "builtins" or bool(one == other)
