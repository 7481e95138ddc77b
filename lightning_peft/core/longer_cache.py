"""Keys and values of an attention outside of transformers' attention interface: reached where it fills its cache.

Models with an attention of their own (BLOOM, GPT-Neo, Falcon, RemBERT ...) let a cache have their keys and values and
go on with what it gives back. An attention is given a cache that puts columns before what it is told; its mask,
its ALiBi and the causal mask that it keeps get columns for them.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.cache_argument import argument_of
from lightning_peft.core.graft import Graft, overrides

_MASKS = ("attention_mask", "mask")
_SOURCES = ("key_value_states", "encoder_hidden_states", "kv")
Lengthen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LongerCache(Graft):
    """Lets the grafts of an attention, its host, add columns to its keys and values by the joint `key_value`."""

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the attention over the columns that grafts add and over its own."""
        at_work = [child for child in host.children() if isinstance(child, Graft) and not child.rests]
        routes = [child for child in at_work if isinstance(child, LongerCache)]
        added = [child for child in at_work if overrides(child, "key_value")]
        if self is not routes[0] or not added:  # of two methods on one attention, one is enough
            return forward(*args, **kwargs)

        def lengthen(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for graft in added:
                key, value = graft("key_value", key, value)
            return key, value

        count = sum(graft.columns for graft in added)
        return with_longer_cache(host, forward, lengthen, count, args, kwargs)


class _Longer:
    """Stands in for the cache of one attention: it keeps what the real one keeps, and gives more columns back."""

    def __init__(self, inner: Any, lengthen: Lengthen) -> None:
        self._inner, self._lengthen = inner, lengthen

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values so far with the columns before them."""
        if self._inner is not None:
            key, value = self._inner.update(key, value, *args, **kwargs)
        return self._lengthen(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def with_longer_cache(
    host: nn.Module,
    forward: Callable[..., Any],
    lengthen: Lengthen,
    count: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run an attention with keys and values that ``lengthen`` has added ``count`` columns to."""
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    inputs = dict(zip(names, args, strict=False)) | dict(kwargs)
    name = argument_of(forward)
    assert name is not None
    inner, crosses = inputs.get(name), any(inputs.get(source) is not None for source in _SOURCES)
    # What an attention over an encoder's states has kept is taken from the cache without a call: it computes it anew.
    inner = None if crosses else getattr(inner, "self_attention_cache", inner)
    inputs[name] = _Longer(inner, lengthen)
    alibi: Tensor | None = inputs.get("alibi")
    left = None if alibi is None else _alibi(host, alibi, count)
    if alibi is not None and left is not None:
        inputs["alibi"] = torch.cat((left, alibi), dim=-1)
    masks = [mask for mask in _MASKS if isinstance(inputs.get(mask), Tensor)]
    for mask in masks:
        inputs[mask] = _widened(inputs[mask], count, left, host)
    if not masks and "attention_mask" in names and not crosses and getattr(host, "is_causal", False):
        # Kernels that need no mask would take the longer keys for a cache that text has gone before.
        length = inputs[names[0]].shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=inputs[names[0]].device).tril()
        inputs["attention_mask"] = _widened(visible, count)[None, None] if length > 1 else None
    with _wider_causal_masks(host, count):
        return forward(**inputs)


def _widened(mask: Tensor, count: int, alibi: Tensor | None = None, host: Any = None) -> Tensor:
    """Return a mask whose new columns on the left are seen: 0 is added to a score, and True or 1 says visible."""
    wider = F.pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1)
    if alibi is not None and mask.ndim == 4 and mask.shape[1] == host.num_heads > 1:  # Falcon's masks hold ALiBi too
        wider[..., :count] = (alibi / math.sqrt(host.head_dim)).view(-1, host.num_heads, 1, count)
    return wider


def _alibi(host: Any, alibi: Tensor, count: int) -> Tensor:
    """Return what ALiBi [B H, 1, S] or [B, H, 1, S] is for the tokens -P .. -1, before the text."""
    build = sys.modules[type(host).__module__].build_alibi_tensor  # each file has its own
    slopes = build(torch.ones(1, 2, dtype=torch.long, device=alibi.device), host.num_heads, torch.float32)[..., 1:]
    left = (slopes * torch.arange(-count, 0, device=alibi.device)).to(alibi.dtype)
    return left.repeat(alibi.numel() // (host.num_heads * alibi.shape[-1]), 1, 1).view(*alibi.shape[:-1], count)


@contextmanager
def _wider_causal_masks(host: nn.Module, count: int) -> Iterator[None]:
    """Let the causal masks [1, 1, T, T] that an attention keeps have visible columns on the left, local ones too."""
    masks = {name: b for name, b in host.named_buffers(recurse=False) if b.ndim == 4 and b.dtype == torch.bool}
    masks = {name: mask for name, mask in masks.items() if mask.shape[2] == mask.shape[3] > 1}
    vars(host).update({name: F.pad(mask, (count, 0, count, 0), value=True) for name, mask in masks.items()})
    try:
        yield
    finally:
        for name in masks:
            vars(host).pop(name)
