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

PACKS = ("towers/contexts.py", "towers/text_towers.py")
"""Texts of classes, of which there are few, are packed on the CPU in each step: two questions for each tower."""
ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy", "nonzero")


class Syncs(L.Callback):
    """Watches the training steps after the first, from this callback to its `end`, which comes last in the list."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.end = _End()

    def on_train_batch_start(self, *args: Any) -> None:
        if args[3] > 0:
            for name in ASKING:
                setattr(Tensor, name, self.spy(name))
            Tensor.__getitem__ = self.spy("__getitem__")  # type: ignore[method-assign]

    def spy(self, name: str) -> Any:
        asked = getattr(Tensor, name)

        def see(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if name != "__getitem__" or _is_mask(args[0]):
                place = _asker(sys._getframe(1))
                if place is not None and not tensor.is_meta:
                    self.found[f"{name} at {place}"] += 1
            return asked(tensor, *args, **kwargs)

        return see


class _End(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        stop()

    def on_exception(self, *args: Any) -> None:
        stop()


def stop() -> None:
    for name in (*ASKING, "__getitem__"):
        if name in vars(Tensor):
            delattr(Tensor, name)


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
            if place.startswith(PACKS):
                return None
        frame = frame.f_back
    return place
