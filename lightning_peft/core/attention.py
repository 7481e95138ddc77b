"""The joint `key_value`: keys and values of an attention of a transformers model, lengthened on the left.

`join` sends the attentions of a model through one function that lets the grafts of an attention add columns, widens the
mask and T5's position bias with them, and then calls the implementation that the model had. It reaches self- and
cross-attention, with and without a cache, under gradient checkpointing, in all models that use transformers'
AttentionInterface (https://huggingface.co/docs/transformers/en/attention_interface); `longer_cache` reaches others.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.added_scores import AddedScores
from lightning_peft.core.attention_probe import Attention, probe, seen, watched
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach, grafts, overrides
from lightning_peft.core.host_copy import ask
from lightning_peft.core.longer_cache import LongerCache
from lightning_peft.core.tracing import is_traced

_GRAFTED, _PROBE = "grafted_", "grafted_probe"
_BASES = ("sdpa", "eager")
_WIDENED = "_lightning_peft_widened"


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
    found = _probed(backbone)
    if any(one.route == "interface" for one in found):
        _graft(backbone, base)
    if not found:
        raise TuningError(
            f"{type(backbone).__name__} computes its attention in a way of its own, outside of transformers' "
            "attention interface, so its keys and values cannot be reached: tune it by PromptTuning or LoRA."
        )
    for one in found:
        if one.route == "cache":
            attach(one.module, LongerCache(), f"{name}_cache")
        elif one.route == "scores":
            attach(one.module, AddedScores(one.heads, one.key_dim, one.value_dim), f"{name}_scores")
    return found


def spare_mask(backbone: nn.Module) -> None:
    """Let a decoder whose cache is filled before its text attend without a mask, where that is causal and no padding.

    A mask rules out the fastest kernels. A decoder that computes attention otherwise is left as it is.
    """
    implementation = structure.attention_implementation(backbone)
    if implementation == "sdpa":
        found, layers = _probed(backbone), structure.setting(structure.config_of(backbone), "num_hidden_layers")
        if len(found) == layers and not any(one.route != "interface" for one in found):
            _graft(backbone, implementation)


def check_joined(backbone: nn.Module) -> None:
    """Check that the model still computes its attention so that grafts can lengthen it.

    Raises:
        TuningError: another implementation was set since.
    """
    implementation = structure.attention_implementation(backbone) or ""
    lengthens = [place for place in grafts(backbone) if overrides(place.graft, "key_value")]
    by_cache = {place.host for place in grafts(backbone) if isinstance(place.graft, LongerCache)}
    if not implementation.startswith(_GRAFTED) and any(place.host not in by_cache for place in lengthens):
        raise TuningError(
            f"attn_implementation={implementation!r} was set on {type(backbone).__name__} after {lengthens[0].name!r} "
            "was applied, and sees nothing of it: set it first, to one of "
            f"{', '.join(_BASES)}, and apply the method then."
        )


def leave(backbone: nn.Module) -> None:
    """Give the model its own attention back when no graft needs it otherwise any more."""
    needed = any(
        overrides(place.graft, "key_value") or getattr(place.graft, "spares_mask", False) for place in grafts(backbone)
    )
    if not needed:
        _put({model: name.removeprefix(_GRAFTED) for model, name in _names(backbone).items()})


@contextmanager
def recorded(found: list[Attention]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep the keys and values [B, H, S, d] that each attention sees while the context lasts, by path."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    paths = {attention.module: attention.path for attention in found}

    def watch(module: nn.Module, key: Tensor, value: Tensor, _: Tensor | None) -> None:
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
    joining = [child for child in module.children() if isinstance(child, Graft) and overrides(child, "key_value")]
    if joining and joining[0].switch is not None and joining[0].switch.groups is not None:
        call = partial(_attend, base, module)
        output, weights = joining[0].switch.by_rows(call, (query, key, value, attention_mask), kwargs)
        return output, weights
    seen(module, key, value, attention_mask)
    length = key.shape[2]
    for child in joining:
        if not child.rests:
            key, value = child("key_value", key, value)
            if (bias := kwargs.get("position_bias")) is not None:
                kwargs["position_bias"] = _widened_bias(child, bias, key.shape[2] - bias.shape[-1])
    added, before = key.shape[2] - length, key.shape[2] - query.shape[2]
    if added and attention_mask is not None:
        attention_mask = _widened(attention_mask, added)
    causal = attention_mask is None and base == "sdpa" and _is_causal(module, kwargs.get("is_causal"))
    if causal and before > 0 and query.shape[2] > 1:
        # Without a mask the implementation would take the longer keys for a preallocated cache and cut the last ones:
        # https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/sdpa_attention.py
        # As many queries of zeros on the left make it plainly causal, for which there are kernels without a mask.
        query = F.pad(query, (0, 0, before, 0))
        if (bias := kwargs.get("position_bias")) is not None:
            kwargs["position_bias"] = F.pad(bias, (0, 0, before, 0))
        out, weights = _base(base, module)(module, query, key, value, None, **kwargs)
        return out[:, before:], weights
    return _base(base, module)(module, query, key, value, attention_mask, **kwargs)


def _observe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Stand in for an attention while the model is probed: the shape of its output, and nothing computed."""
    seen(module, key, value, attention_mask)
    batch, heads, length = query.shape[:3]
    return query.new_empty(batch, length, heads, value.shape[3]), None


def _probed(backbone: nn.Module) -> list[Attention]:
    """Return the attentions of a model, which computes them as before afterwards."""
    names = _names(backbone)
    _register()
    try:
        _set(backbone, _PROBE)
        return probe(backbone)
    finally:
        _put(names)


def _widened(mask: Tensor, added: int) -> Tensor:
    """Return a mask with columns on the left that all queries see; all layers of a forward pass have the same."""
    kept: dict[int, Tensor] = {} if is_traced() else vars(mask).setdefault(_WIDENED, {})
    if added not in kept:
        kept[added] = F.pad(mask, (added, 0), value=True if mask.dtype == torch.bool else 0.0)
    return kept[added]


def _sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask of transformers, or None where the queries are the last of the keys' tokens and none is padding.

    In a cache of fixed size they may not be the last: there it is always a mask.
    """
    from transformers import AttentionMaskInterface

    start, queries, keys = (kwargs.get(name) for name in ("q_offset", "q_length", "kv_length"))
    if kwargs.get("allow_is_causal_skip"):
        plain = all(isinstance(number, int) for number in (start, queries, keys)) and not kwargs.get("kv_offset")
        last = plain and start + queries == keys and kwargs.get("local_size") is None  # type: ignore[operator]
        if last and start and queries > 1 and _sees_all(kwargs.get("attention_mask")):  # type: ignore[operator]
            return None
        kwargs["allow_is_causal_skip"] = last
    return AttentionMaskInterface()["sdpa"](*args, **kwargs)


def _sees_all(padding: Tensor | None) -> bool:
    return padding is None or (not is_traced() and ask(padding, lambda mask: bool(mask.all())))


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
        own_mask = _sdpa_mask if base == "sdpa" else AttentionMaskInterface()[base]
        AttentionMaskInterface.register(_GRAFTED + base, own_mask)
    AttentionInterface.register(_PROBE, _observe)
    AttentionMaskInterface.register(_PROBE, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand in for the making of a mask, which looks at values that the probe has not."""


def _graft(backbone: nn.Module, base: str) -> None:
    """Let each model in a backbone compute by its own implementation with the joint, or by that of the whole."""
    bare = {model: name.removeprefix(_GRAFTED) for model, name in _names(backbone).items()}
    _put({model: _GRAFTED + (name if name in _BASES else base) for model, name in bare.items()})


def _names(backbone: nn.Module) -> dict[nn.Module, str]:
    """Return the implementation of each model in a backbone: Depth Anything has another one than its tower."""
    models = [module for module in backbone.modules() if structure.is_pretrained(module)]
    return {model: structure.attention_implementation(model) or "" for model in models}


def _put(names: Mapping[nn.Module, str]) -> None:
    """Give models their implementations, the outer ones first, which set those inside of them, too.

    It takes two rounds: a model may hand on a name that it does not take itself, as Grounding DINO does, or stop at a
    part that takes another one, such as a convolutional backbone.
    """
    deaf: set[nn.Module] = set()
    for model, name in [*names.items()] * 2:
        if model not in deaf and structure.attention_implementation(model) != name:
            with suppress(TuningError):
                _set(model, name)
            if structure.attention_implementation(model) != name:
                deaf.add(model)


def _set(backbone: nn.Module, name: str) -> None:
    from lightning_peft.core.hub import quiet_loading

    with quiet_loading():  # it warns of parts that do not use the interface, which the probe finds anyway
        try:
            backbone.set_attn_implementation(name)  # type: ignore[operator]
        except ValueError:  # a part, such as a convolutional backbone, has no attention to set
            raise TuningError(
                f"{type(backbone).__name__} has a part whose attention cannot be set, so its keys and values cannot be "
                "reached: tune it by LoRA."
            ) from None
