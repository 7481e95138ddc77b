"""Counts the bytes that autograd saves in a forward pass for the backward pass, parameters left out."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)


class Kept:
    """A context that counts the bytes of all tensors that autograd saves in it, each storage once.

    Args:
        ignore: tensors that are there anyway, such as parameters, buffers and the batch.
    """

    def __init__(self, ignore: Iterable[Tensor]) -> None:
        self._ignore = {tensor.untyped_storage().data_ptr() for tensor in ignore}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """The number of bytes so far."""
        return sum(storage.nbytes() for address, storage in self._storages.items() if address not in self._ignore)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor
