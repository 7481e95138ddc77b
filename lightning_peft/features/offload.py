"""Keeps what autograd saves in the host's memory, weights left out, which are there anyway."""

from collections.abc import Iterable

import torch
from torch import Tensor

Packed = tuple[Tensor, torch.device | None]


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """A context in which large tensors that are saved on a GPU wait in pinned host memory for the backward pass.

    ``torch.autograd.graph.save_on_cpu`` would copy each frozen weight, too, and wait for every copy. Copies here go
    through the stream that computes, so that no tensor is reused before it is copied. On a CPU nothing happens.

    Args:
        ignore: tensors that stay where they are, such as parameters and buffers.
        least: the size [bytes] from which a tensor goes.
        at_home: the type of device whose tensors do not go.
    """

    def __init__(self, ignore: Iterable[Tensor], least: int = 2**16, at_home: str = "cpu") -> None:
        self._ignore = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self._least, self._at_home = least, at_home
        super().__init__(self._pack, _unpacked)

    def goes(self, tensor: Tensor) -> bool:
        """Tell whether a tensor goes to the host."""
        large = tensor.device.type != self._at_home and tensor.nbytes >= self._least
        return large and tensor.untyped_storage().data_ptr() not in self._ignore

    def _pack(self, tensor: Tensor) -> Packed:
        if not self.goes(tensor):
            return tensor, None
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return host.copy_(tensor, non_blocking=pinned), tensor.device


def _unpacked(packed: Packed) -> Tensor:
    tensor, device = packed
    return tensor if device is None else tensor.to(device, non_blocking=tensor.is_pinned())
