"""Counts where a training step of this package waits for a GPU: where Python asks a tensor for its values.

What is asked of a batch's copy in host memory (`lightning_peft.core.host_copy`) waits for nothing, and what
transformers or torch ask is theirs.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy", "nonzero")


class Syncs(L.Callback):
    """Watches the training steps after the first, from this callback to its `end`, which comes last in the list.

    A mode of torch sees the calls; methods of its own on `Tensor`, set and deleted, would leave that a sequence.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.end = _End(self)
        self.watch: _Watch | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        if args[3] > 0:
            self.watch = _Watch(self.found)
            self.watch.__enter__()

    def stop(self) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.watch = None


class _Watch(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, asked: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(asked, "__name__", "")
        if name in ASKING or (name == "__getitem__" and _is_mask(args[1])):
            place = _asker(sys._getframe(1))
            if place is not None and not args[0].is_meta:
                self.found[f"{name} at {place}"] += 1
        return asked(*args, **(kwargs or {}))


class _End(L.Callback):
    def __init__(self, begun: Syncs) -> None:
        self.begun = begun

    def on_train_batch_end(self, *args: Any) -> None:
        self.begun.stop()

    def on_exception(self, *args: Any) -> None:
        self.begun.stop()


def _is_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _asker(frame: FrameType | None) -> str | None:
    """Return the line of this package that asks, or None: another does, or the CPU is asked."""
    place = None
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code.co_name in ("_ask_host", "project"):  # DiffPruning chooses its entries once a run
            return None
        if place is None and "/torch/" not in file:
            if "/lightning_peft/" not in file or "/site-packages/" in file:
                return None
            place = f"{file.rpartition('/lightning_peft/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return place
