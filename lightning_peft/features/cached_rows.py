"""The rows of a feature cache, each under a hash of all that the frozen part gets of it."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.core.host_copy import ask


@dataclass
class CachedRows:
    """The cached rows and the state of the current batch. A copy of a model starts with none.

    Attributes:
        limit: most bytes to keep.
        trained: the taps whose input comes from the frozen part alone; None: not known before a pass with gradients.
        found: those of them that this pass has come by.
        kept: key of a row -> its tensor for each tap, and how long the row was with its padding.
        seen: the training rows so far.
        expected: how many rows the training data have; None: unknown.
        training: whether the batch at hand is one of training.
        epochs: how many epochs of training are over.
    """

    limit: int
    trained: list[int] | None = None
    found: list[int] = field(default_factory=list)
    kept: dict[bytes, tuple[dict[int, Tensor], int]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    expected: int | None = None
    training: bool = False
    epochs: int = 0
    size: int = 0
    vectors: bool = True
    compared: bool = False
    mode: str = ""
    keys: list[tuple[bytes, int]] = field(default_factory=list)
    taps: set[int] = field(default_factory=set)
    stubs: dict[Any, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedRows, (self.limit, self.trained)

    def key(self, row: tuple[bytes, int]) -> bytes:
        """Return the key of a row: its hash, with its padding where that matters."""
        return row[0] if self.vectors else row[0] + row[1].to_bytes(8, "little")

    def begin(self, keys: list[tuple[bytes, int]]) -> bool:
        """Note the rows of a batch; tell whether all of them are known."""
        if self.mode and not self.taps:
            raise TuningError(
                "nothing has read the features of the last batch where the cache looks for them, at the head of the "
                "backbone: set cache_features=False, or give the method the module with the head as backbone=."
            )
        if self.training:
            self._check_new(keys)
        if self.trained is None and self.found:
            self.trained = self.found
        self.keys, self.taps = keys, set()
        known = all(self._knows(row) for row in keys)
        self.mode = "replay" if known else "record"
        return known

    def _knows(self, row: tuple[bytes, int]) -> bool:
        held, length = self.kept.get(self.key(row), ({}, 0))
        whole = self.trained is not None and all(index in held for index in self.trained)
        return whole and (self.compared or not self.vectors or length == row[1])

    def _check_new(self, keys: list[tuple[bytes, int]]) -> None:
        before = len(self.seen)
        self.seen.update(digest for digest, _ in keys)
        new = len(self.seen) - before
        if new and (len(self.seen) > self.expected if self.expected is not None else self.epochs > 0):
            known = f"the {self.expected} rows of the training data" if self.expected else "those of the first epoch"
            raise TuningError(
                f"cache_features=True met a training row beside {known}: rows that change from epoch to epoch "
                "(augmentation, random crops, prompts) cannot be cached, so set cache_features=False."
            )

    def tap(self, index: int, x: Tensor) -> Tensor:
        """Return the input of a trained part: ``x``, which is cached, or what was cached of these rows."""
        self.taps.add(index)
        if self.mode == "replay":
            assert self.trained is not None
            if index not in self.trained:
                return x
            return torch.stack([self.kept[self.key(row)][0][index] for row in self.keys])
        if not self.mode:
            return x
        if len(x) != len(self.keys):
            raise TuningError(
                f"a batch of {len(self.keys)} rows reaches the head as {len(x)}, so its features cannot be cached by "
                "row: set cache_features=False."
            )
        if self.trained is None and torch.is_grad_enabled() and not x.requires_grad:
            self.found.append(index)
        if index in (self.found if self.trained is None else self.trained):
            if x.requires_grad:
                raise TuningError(
                    "something is trained below the features to be cached, so they change: set cache_features=False."
                )
            self.keep(index, x)
        return x

    def keep(self, index: int, x: Tensor) -> None:
        """Keep the rows of ``x`` that are new; compare one that came with other padding."""
        vector = x.ndim == 2
        if not vector and self.vectors:
            self.vectors, self.kept, self.size = False, {}, 0
        new = []
        for i, row in enumerate(self.keys):
            known = self.kept.setdefault(self.key(row), ({}, row[1]))
            if index not in known[0]:
                new.append(i)
            elif known[1] != row[1]:
                self._compare(known[0][index], x[i])
        if not new:
            return
        self.size += len(new) * x[0].numel() * x.element_size()
        if self.size > self.limit:
            raise TuningError(
                f"the cached features take more than {self.limit / 2**30:.3g} GiB after {len(self.kept)} rows: raise "
                "cache_limit [GiB], or set cache_features=False."
            )
        with torch.inference_mode(False), torch.no_grad():
            for i, values in zip(new, x.detach()[new].clone(), strict=True):
                self.kept[self.key(self.keys[i])][0][index] = values

    def _compare(self, old: Tensor, new: Tensor) -> None:
        self.compared = True
        tolerance = torch.finfo(old.dtype).eps ** 0.5
        if not torch.allclose(old.float(), new.float(), rtol=tolerance, atol=tolerance):
            raise TuningError(
                "the features of a row depend on the padding beside it, so they cannot be cached: pad to a fixed "
                "length, or set cache_features=False."
            )


def identify(given: dict[str, Any]) -> tuple[list[tuple[bytes, int]], Any]:
    """Return, for each row of a batch, a hash and its length with padding; and what all rows of the batch share.

    Padding at the end, by the attention mask, is no part of the hash.

    Args:
        given: the arguments of a forward pass by name.

    Raises:
        TuningError: no argument is a tensor.
    """
    tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, Tensor)}
    if not tensors:
        raise TuningError("the frozen part is given no tensor to know its rows by: set cache_features=False.")
    options = repr(
        sorted((name, repr(value)) for name, value in given.items() if name not in tensors and value is not None)
    )
    main = tensors.get("input_ids", tensors.get("pixel_values", next(iter(tensors.values()))))
    count, lengths, padded = len(main), None, 0
    mask = tensors.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        padded = mask.shape[1]
        lengths = ask(mask, _lengths)
    hashes = [hashlib.blake2b(options.encode(), digest_size=16) for _ in range(count)]
    for name, tensor in tensors.items():
        values = ask(tensor, lambda given: given.detach().cpu().contiguous())
        by_row = values.ndim > 0 and len(values) == count
        cut = by_row and lengths is not None and values.ndim > 1 and values.shape[1] == padded
        for i, digest in enumerate(hashes):
            row = values[i] if by_row else values
            row = row[: lengths[i]] if cut and lengths is not None else row
            digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
            digest.update(_bytes(row))
    shapes = tuple((name, tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items())
    return [(digest.digest(), padded) for digest in hashes], (options, shapes)


def _lengths(mask: Tensor) -> list[int]:
    """Return the length of each row without the padding at its end."""
    return (torch.arange(1, mask.shape[1] + 1, device=mask.device) * (mask != 0)).amax(1).tolist()


def _bytes(row: Tensor) -> Any:
    return row.reshape(-1).view(torch.uint8).numpy().data
