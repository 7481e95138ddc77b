"""Checksums that see every bit of a tensor, at the speed of the memory, and without gathering what is sharded.

A tensor is read as 64-bit words, of which two sums are taken modulo 2^64: the plain one, and one in which each word
counts by its place, since a plain sum does not see a change of order. Both are exact, the same on every device, and
those of the parts of a sharded tensor add up to those of the whole. The weight of word k is
``p (k // 1021) + k % 1021 + 1`` with a large odd p, so that sums of rows and columns do instead of a product for each.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.core.quantized import unpacked
from lightning_peft.core.sharded import is_part, leading_rows, whole

_RUN = 1021  # a prime, so that rows of this length end at other places than those of a matrix
_ROW = 0x9E3779B97F4A7C15 - 2**64  # p
_MASK = 2**64 - 1
_CHUNK = 128  # units that are summed at a time, so that their words stay in the cache
_FEW = 1 << 17  # values that are summed at once, since a call costs more than a copy of them


@torch.no_grad()
def sums(tensor: Tensor, *roundings: torch.dtype) -> list[tuple[int, int]]:
    """Return the plain and the weighted sum of a tensor as it is stored, and rounded to each of some dtypes.

    Integers are not rounded. Every rank must call it for a tensor of which each has a part.
    """
    flat, first, group = _flat(tensor)
    wanted = [flat.dtype, *(roundings if flat.is_floating_point() else [flat.dtype] * len(roundings))]
    forms = list(dict.fromkeys(wanted))
    unit = 8 * _RUN // min(form.itemsize for form in forms)  # of so many values all forms are whole rows of words
    head = min(-first % unit, len(flat)) if len(flat) > _FEW or len(forms) > 1 else len(flat)
    tail = head + (len(flat) - head) // unit * unit
    totals = torch.zeros(len(forms), 2, dtype=torch.int64, device=flat.device)
    if tail > head:
        totals += _of_rows(flat[head:tail], forms, unit, first + head)
    for begin, part in ((first, flat[:head]), (first + tail, flat[tail:])):
        if len(part):
            ends = [_of_words(part.contiguous().to(form), begin * form.itemsize // 8) for form in forms]
            totals += torch.stack(ends)
    if group is not None:
        dist.all_reduce(totals, group=group)
    found = {form: (plain, weighted) for form, (plain, weighted) in zip(forms, totals.tolist(), strict=True)}
    return [found[form] for form in wanted]


def checksum(value: Any) -> str:
    """Return a checksum of a tensor, or of plain values and tensors in dictionaries and lists, whatever their order.

    Dictionaries are alike if they have the same entries, lists and tuples if they have the same in the same order. Of
    other objects the type counts alone. Every rank must call it where tensors are sharded.
    """
    if isinstance(value, Tensor):
        ((plain, weighted),) = sums(value)
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}:{plain & _MASK:016x}{weighted & _MASK:016x}"
        )
    return hashlib.sha256(_text(value).encode()).hexdigest()[:32]


def has_parts(value: Any) -> bool:
    """Tell whether a tensor among these values is sharded."""
    if isinstance(value, Mapping):
        return any(map(has_parts, value.values()))
    return any(map(has_parts, value)) if isinstance(value, (list, tuple)) else is_part(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{key!r}:{_text(entry)}" for key, entry in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, Tensor):
        return checksum(value)
    plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return repr(value) if plain else type(value).__name__


def _flat(tensor: Tensor) -> tuple[Tensor, int, Any]:
    """Return the values that this rank shall sum, the number of the first one, and the group that sums the rest."""
    part = leading_rows(tensor)
    if part is not None:
        rows, start, group = part
        row = rows.shape[1:].numel()  # by the shape, since all ranks must go one way, those without rows, too
        if group is None or row * min(rows.element_size(), 2) % 8 == 0:  # else a word would lie on two ranks
            return unpacked(rows).reshape(-1), start * row, group
    return unpacked(whole(tensor)).reshape(-1), 0, None


def _of_rows(flat: Tensor, forms: list[torch.dtype], unit: int, first: int) -> Tensor:
    """Return the plain and the weighted sum [forms, 2] of whole units of values, of which ``first`` is the number."""
    size = min(_CHUNK * unit, len(flat))
    rounded = {form: flat.new_empty(size, dtype=form) for form in forms[1:]}
    # torch rounds one kind of half precision to the other ten times slower than by way of single precision.
    single = flat.new_empty(size if rounded and flat.dtype.itemsize == 2 else 0, dtype=torch.float32)
    rows = [flat.new_empty(len(flat) * form.itemsize // (8 * _RUN), dtype=torch.int64) for form in forms]
    columns = torch.zeros(len(forms), _RUN, dtype=torch.int64, device=flat.device)
    for begin in range(0, len(flat), size or 1):
        chunk = _aligned(flat[begin : begin + size])
        source = single[: len(chunk)].copy_(chunk) if len(single) else chunk
        for i, form in enumerate(forms):
            values = rounded[form][: len(chunk)].copy_(source) if i else chunk
            table = values.view(torch.int64).view(-1, _RUN)
            start = begin * form.itemsize // (8 * _RUN)
            # In this order: along the rows is how a value comes fastest from memory.
            torch.sum(table, 1, out=rows[i][start : start + len(table)])
            columns[i] += table.sum(0)
    places = torch.arange(1, _RUN + 1, device=flat.device)
    found = [
        torch.stack((row.sum(), (row * _numbers(row, first * form.itemsize // (8 * _RUN))).sum() * _ROW))
        for row, form in zip(rows, forms, strict=True)
    ]
    totals = torch.stack(found)
    totals[:, 1] += (columns * places).sum(1)
    return totals


def _numbers(rows: Tensor, first: int) -> Tensor:
    return torch.arange(first, first + len(rows), device=rows.device)


def _aligned(values: Tensor) -> Tensor:
    """Return values that can be read as words; a part of another tensor may begin within one."""
    values = values.contiguous()
    return values.clone() if values.storage_offset() * values.element_size() % 8 else values


def _of_words(values: Tensor, first: int) -> Tensor:
    """Return the plain and the weighted sum [2] of values that begin with the word of number ``first`` of a tensor."""
    words = _padded(_aligned(values).view(torch.uint8), 0, 8).view(torch.int64)
    table = _padded(words, first % _RUN, _RUN).view(-1, _RUN)
    rows, columns = table.sum(1), table.sum(0)
    by_row = rows * (torch.arange(len(rows), device=values.device) + first // _RUN)
    by_column = columns * torch.arange(1, _RUN + 1, device=values.device)
    return torch.stack((rows.sum(), by_row.sum() * _ROW + by_column.sum()))


def _padded(flat: Tensor, before: int, multiple: int) -> Tensor:
    after = -(before + len(flat)) % multiple
    return F.pad(flat, (before, after)) if before or after else flat
