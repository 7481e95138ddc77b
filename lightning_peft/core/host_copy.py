"""Answers questions about a batch from its copy in host memory, since asking a GPU waits for all that it has to do.

A Trainer reads a batch on the CPU and then moves it. `note` keeps the one with the other, and `ask` asks the CPU as
long as the tensor on the GPU is as it was moved. Any other tensor is asked itself.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from lightning_peft.core.private_torch import times_written

T = TypeVar("T")
_HELD = "_lightning_peft_held"


def note(moved: Any, before: Any) -> None:
    """Let each tensor of a batch know what it was moved from, where the two batches have it at the same place."""
    if isinstance(moved, Tensor):
        if isinstance(before, Tensor) and before.device.type == "cpu" and not moved.is_inference():
            vars(moved)[_HELD] = None if moved is before else before, times_written(moved)
    elif isinstance(moved, Mapping) and isinstance(before, Mapping):
        for name in moved.keys() & before.keys():
            note(moved[name], before[name])
    elif isinstance(moved, (list, tuple)) and isinstance(before, (list, tuple)):
        for one, other in zip(moved, before, strict=False):
            note(one, other)


def ask(tensor: Tensor, question: Callable[[Tensor], T]) -> T:
    """Return the answer of a function to a tensor, or to its copy on the CPU, which has the same values."""
    before, version = vars(tensor).get(_HELD, (None, -1))
    if tensor.is_inference() or version != times_written(tensor):  # of inference mode, which counts no writing
        return question(tensor)
    return _ask_host(tensor if before is None else before, question)


def _ask_host(tensor: Tensor, question: Callable[[Tensor], T]) -> T:
    return question(tensor)
