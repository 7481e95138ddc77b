"""Counts the bytes of live tensors, operation by operation, and extrapolates them to larger batches."""

import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

# Not public by its path, but what torch.utils.flop_counter is made of, and the one way to see every operation:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/utils/_python_dispatch.py
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.features.activation_memory import tensors_in


class LiveBytes(TorchDispatchMode):
    """A context that notes after each operation how many bytes of tensors are alive; a storage counts once.

    It works on the meta device, too, where nothing is stored. What a kernel takes for itself while it runs is not seen.

    Args:
        there: the tensors that are there already.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.series: list[int] = []
        self._bytes = 0
        self._alive: dict[int, Any] = {}
        for tensor in there:
            self._note(tensor)
        self.start = self._bytes
        self.series.append(self._bytes)

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return max(self.series)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._note(tensor)
        self.series.append(self._bytes)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        self._alive.clear()

    def _note(self, tensor: Tensor) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        try:
            storage = local.untyped_storage()
        except NotImplementedError:  # a sparse tensor has none
            return
        key = id(storage)  # of the one Python object that a storage has as long as it lives
        if key not in self._alive:
            size = storage.nbytes()
            self._bytes += size

            def free(_: Any) -> None:
                if self._alive.pop(key, None) is not None:
                    self._bytes -= size

            self._alive[key] = weakref.ref(storage, free)


def extrapolate(few: tuple[int, Sequence[int]], more: tuple[int, Sequence[int]], rows: int) -> int:
    """Return the peak of a step of ``rows`` rows, from ``(rows, series)`` of two smaller ones.

    The bytes alive after any one operation are linear in the rows, so each point of the series is drawn on by itself:
    the peak may lie at another operation than in the small steps.

    >>> extrapolate((1, [10, 30, 20]), (2, [10, 31, 40]), 4)
    80
    """
    (first, low), (second, high) = few, more
    if len(low) != len(high):  # other kernels for other sizes
        low, high = [max(low)], [max(high)]
    step = rows - first
    return max(a + (b - a) * step // (second - first) for a, b in zip(low, high, strict=True))
