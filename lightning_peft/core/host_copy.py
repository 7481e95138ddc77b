"""Answers questions about a batch from its copy in host memory, since asking a GPU waits for all that it has to do.

A Trainer reads a batch on the CPU and then moves it. `note` keeps the one with the other, and `ask` asks the CPU as
long as the tensor on the GPU is as it was moved. Any other tensor is asked itself. What stays the same from step to
step, as the texts of classes do, is copied to the CPU once, by `keep`, and what the CPU makes of it goes to the GPU by
`send`, which does not wait either.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_peft.core.private_torch import times_written

T = TypeVar("T")
_HELD = "_lightning_peft_held"


def note(moved: Any, before: Any) -> None:
    """Let each tensor of a batch know what it was moved from, where the two batches have it at the same place."""
    if isinstance(moved, Tensor):
        if isinstance(before, Tensor) and before.device.type == "cpu" and not moved.is_inference():
            _hold(moved, before)
    elif isinstance(moved, Mapping) and isinstance(before, Mapping):
        for name in moved.keys() & before.keys():
            note(moved[name], before[name])
    elif isinstance(moved, (list, tuple)) and isinstance(before, (list, tuple)):
        for one, other in zip(moved, before, strict=False):
            note(one, other)


def keep(tensor: Tensor) -> Tensor:
    """Return a tensor, which has a copy of itself in host memory from now on: it will be asked again."""
    if not tensor.is_meta and not tensor.is_inference() and _copy_of(tensor) is None:
        _hold(tensor, tensor if tensor.device.type == "cpu" else tensor.detach().cpu())
    return tensor


def ask(tensor: Tensor, question: Callable[[Tensor], T]) -> T:
    """Return the answer of a function to a tensor, or to its copy on the CPU, which has the same values."""
    before = _copy_of(tensor)
    return question(tensor) if before is None else _ask_host(before, question)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of host memory on a device, beside its copy, without waiting for what the device has to do."""
    if values.device == device:
        return values
    moved = values.to(device, non_blocking=True)
    note(moved, values)
    return moved


def _hold(tensor: Tensor, copy: Tensor) -> None:
    vars(tensor)[_HELD] = id(tensor), None if tensor is copy else copy, times_written(tensor)


def _copy_of(tensor: Tensor) -> Tensor | None:
    """Return the copy in host memory, or None: there is none, or the tensor has been written to since."""
    owner, copy, version = vars(tensor).get(_HELD, (None, None, -1))
    if owner != id(tensor) or tensor.is_inference() or version != times_written(tensor):
        return None  # a deep copy of the tensor has its attributes, and a tensor of inference mode counts no writing
    return tensor if copy is None else copy


def _ask_host(tensor: Tensor, question: Callable[[Tensor], T]) -> T:
    return question(tensor)
