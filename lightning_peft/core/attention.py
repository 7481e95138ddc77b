"""The joint `key_value`: keys and values of an attention of a transformers model, lengthened on the left.

`join` sends the attentions of a model through one function that lets the grafts of an attention add columns, widens the
mask and T5's position bias with them, and then calls the implementation that the model had. It reaches self- and
cross-attention, with and without a cache, under gradient checkpointing, in all models that use transformers'
AttentionInterface (https://huggingface.co/docs/transformers/en/attention_interface); `longer_cache` reaches others.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.attention_probe import Attention, probe, seen, watched
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach, grafts, overrides
from lightning_peft.core.longer_cache import LongerCache

_GRAFTED, _PROBE = "grafted_", "grafted_probe"
_BASES = ("sdpa", "eager")


def join(backbone: nn.Module, name: str = "joint") -> list[Attention]:
    """Route the model's attentions through the joint `key_value` of their grafts; return the attentions in their order.

    Args:
        backbone: a transformers model.
        name: that of the method whose grafts they are.

    Raises:
        TuningError: the model has no attention that can be reached, or computes it by a kernel that takes no wider
            mask.
    """
    implementation = structure.attention_implementation(backbone)
    if implementation is None:
        raise TuningError(
            f"{type(backbone).__name__} is no transformers model, so its keys and values cannot be reached: "
            "tune it by LoRA, which needs linear layers alone."
        )
    base = implementation.removeprefix(_GRAFTED)
    if base not in _BASES:
        raise TuningError(
            f"attn_implementation={implementation!r} of {type(backbone).__name__} takes no mask with more columns: "
            f"load it with one of {', '.join(_BASES)}."
        )
    _register()
    found: list[Attention] = []
    try:
        _set(backbone, _PROBE)
        found = probe(backbone)
    finally:
        through = any(not one.by_cache for one in found)
        _set(backbone, _GRAFTED + base if through else implementation)
    if not found:
        raise TuningError(
            f"{type(backbone).__name__} computes its attention outside of transformers' attention interface and gives "
            "it no cache, so its keys and values cannot be reached: tune it by PromptTuning or LoRA."
        )
    for one in found:
        if one.by_cache:
            attach(one.module, LongerCache(), f"{name}_cache")
    return found


def leave(backbone: nn.Module) -> None:
    """Give the model its own attention back when no graft uses the joint any more."""
    implementation = structure.attention_implementation(backbone) or ""
    if implementation.startswith(_GRAFTED) and not any(overrides(p.graft, "key_value") for p in grafts(backbone)):
        _set(backbone, implementation.removeprefix(_GRAFTED))


@contextmanager
def recorded(found: list[Attention]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep the keys and values [B, H, S, d] that each attention sees while the context lasts, by path."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    paths = {attention.module: attention.path for attention in found}

    def watch(module: nn.Module, key: Tensor, value: Tensor) -> None:
        if module in paths:
            kept.setdefault(paths[module], (key, value))

    with watched(watch):
        yield kept


def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over the columns that grafts add and over the model's own, [B, H, S, d]."""
    seen(module, key, value)
    length = key.shape[2]
    for child in module.children():
        if isinstance(child, Graft) and overrides(child, "key_value") and not child.rests:
            key, value = child("key_value", key, value)
            if (bias := kwargs.get("position_bias")) is not None:
                kwargs["position_bias"] = _widened_bias(child, bias, key.shape[2] - bias.shape[-1])
    added = key.shape[2] - length
    if added and attention_mask is not None:
        attention_mask = F.pad(attention_mask, (added, 0), value=True if attention_mask.dtype == torch.bool else 0.0)
    elif added and base == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs.get("is_causal")):
        # Without a mask the implementation would take the longer keys for a preallocated cache and cut the last ones:
        # https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/sdpa_attention.py
        causal = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).tril()
        attention_mask = F.pad(causal, (added, 0), value=True)[None, None]
    return _base(base, module)(module, query, key, value, attention_mask, **kwargs)


def _observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Stand in for an attention while the model is probed: the shape of its output, and nothing computed."""
    seen(module, key, value)
    batch, heads, length = query.shape[:3]
    return query.new_empty(batch, length, heads, value.shape[3]), None


def _widened_bias(graft: Graft, bias: Tensor, added: int) -> Tensor:
    """Return T5's position bias [1, H, N, S] for the columns of a graft too, which may say what theirs is."""
    own: Callable[[Tensor, int], Tensor] | None = getattr(graft, "position_bias", None)
    left = own(bias, added) if own is not None else bias.new_zeros(1, bias.shape[1], bias.shape[2], added)
    return torch.cat((left.to(bias.dtype).expand(bias.shape[0], -1, -1, -1), bias), dim=-1)


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    return given if given is not None else bool(getattr(module, "is_causal", True))


def _base(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    from transformers import AttentionInterface

    if name == "eager":  # each model file has its own; the interface knows it as a default argument alone
        return sys.modules[type(module).__module__].eager_attention_forward
    return AttentionInterface()[name]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for base in _BASES:
        AttentionInterface.register(_GRAFTED + base, partial(_attend, base))
        AttentionMaskInterface.register(_GRAFTED + base, AttentionMaskInterface()[base])
    AttentionInterface.register(_PROBE, _observe)
    AttentionMaskInterface.register(_PROBE, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for the making of a mask, which looks at values that the probe has not."""


def _set(backbone: nn.Module, name: str) -> None:
    from lightning_peft.core.hub import quiet_loading

    with quiet_loading():  # it warns of parts that do not use the interface, which the probe finds anyway
        backbone.set_attn_implementation(name)  # type: ignore[operator]
