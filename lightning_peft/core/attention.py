"""The joint `key_value`: keys and values of an attention of a transformers model, lengthened on the left.

`join` sends the attentions of a model through one function that lets the grafts of an attention add columns, widens the
mask and T5's position bias with them, and then calls the implementation that the model had. It reaches self- and
cross-attention, with and without a cache, under gradient checkpointing, in all models that use transformers'
AttentionInterface (https://huggingface.co/docs/transformers/en/attention_interface).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, grafts, overrides

Kind = Literal["self", "encoder", "decoder", "cross"]
_GRAFTED, _PROBE = "grafted_", "grafted_probe"
_BASES = ("sdpa", "eager")
_SOURCE, _TARGET = 3, 5  # lengths of the probe's inputs, which tell self- from cross-attention


class Attention(NamedTuple):
    """One attention of a model: where it is, what it attends to, and the shapes of its keys and values."""

    path: str
    module: nn.Module
    kind: Kind
    heads: int
    key_dim: int
    value_dim: int


def join(backbone: nn.Module) -> list[Attention]:
    """Route the model's attentions through the joint `key_value` of their grafts; return the attentions in their order.

    Raises:
        TuningError: the model computes no attention through the interface, or by a kernel that takes no wider mask.
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
        found = _probe(backbone)
    finally:
        _set(backbone, _GRAFTED + base if found else implementation)
    if not found:
        raise TuningError(
            f"{type(backbone).__name__} computes its attention outside of transformers' attention interface, so its "
            "keys and values cannot be reached: tune it by PromptTuning or LoRA."
        )
    return found


def leave(backbone: nn.Module) -> None:
    """Give the model its own attention back when no graft uses the joint any more."""
    implementation = structure.attention_implementation(backbone) or ""
    if implementation.startswith(_GRAFTED) and not any(overrides(p.graft, "key_value") for p in grafts(backbone)):
        _set(backbone, implementation.removeprefix(_GRAFTED))


@contextmanager
def recorded(found: list[Attention]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Keep the keys and values [B, H, S, d] that each attention sees while the context lasts, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    paths = {attention.module: attention.path for attention in found}

    def watch(module: nn.Module, key: Tensor, value: Tensor) -> None:
        if module in paths:
            seen.setdefault(paths[module], (key, value))

    _watchers.append(watch)
    try:
        yield seen
    finally:
        _watchers.remove(watch)


_watchers: list[Callable[[nn.Module, Tensor, Tensor], Any]] = []


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
    _seen(module, key, value)
    length = key.shape[2]
    for child in module.children():
        if isinstance(child, Graft) and overrides(child, "key_value"):
            key, value = child("key_value", key, value)
            if (bias := kwargs.get("position_bias")) is not None:
                kwargs["position_bias"] = _widened_bias(child, bias, key.shape[2] - bias.shape[-1])
    added = key.shape[2] - length
    if added and attention_mask is not None:
        attention_mask = F.pad(attention_mask, (added, 0), value=True if attention_mask.dtype == torch.bool else 0.0)
    elif added and base == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs.get("is_causal")):
        # Without a mask the implementation would take the longer keys for a preallocated cache and cut the last ones:
        # https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/sdpa_attention.py
        seen = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).tril()
        attention_mask = F.pad(seen, (added, 0), value=True)[None, None]
    return _base(base, module)(module, query, key, value, attention_mask, **kwargs)


def _observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Stand in for an attention while the model is probed: the shape of its output, and nothing computed."""
    _seen(module, key, value)
    batch, heads, length = query.shape[:3]
    return query.new_empty(batch, length, heads, value.shape[3]), None


def _seen(module: nn.Module, key: Tensor, value: Tensor) -> None:
    for watch in _watchers:
        watch(module, key, value)


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


def _probe(backbone: nn.Module) -> list[Attention]:
    """Run the model on the meta device, which computes no numbers, and return the attentions that came by."""
    found: dict[nn.Module, Attention] = {}
    paths = {module: path for path, module in backbone.named_modules()}
    inputs = inputs_on_meta(backbone)
    encoder_decoder = "decoder_input_ids" in inputs

    def watch(module: nn.Module, key: Tensor, value: Tensor) -> None:
        kind: Kind = "self"
        if encoder_decoder:
            in_decoder = "decoder" in paths[module].split(".")
            kind = "encoder" if not in_decoder else "cross" if key.shape[2] == _SOURCE else "decoder"
        found[module] = Attention(paths[module], module, kind, key.shape[1], key.shape[3], value.shape[3])

    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    _watchers.append(watch)
    try:
        with torch.no_grad():
            torch.func.functional_call(backbone, meta, kwargs=inputs)
    finally:
        _watchers.pop()
    return list(found.values())


def inputs_on_meta(
    backbone: nn.Module, rows: int = 1, source: int = _SOURCE, target: int = _TARGET
) -> dict[str, Tensor]:
    """Return inputs that the model takes, without values: by default, the smallest.

    Args:
        backbone: a transformers model.
        rows: how many rows they have.
        source: how many tokens a text has.
        target: how many tokens an encoder-decoder's target has.
    """
    inputs: dict[str, Tensor] = {}
    config, takes = structure.config_of(backbone), structure.arguments_of(backbone)
    size = structure.image_size(config)
    if "pixel_values" in takes and size is not None:
        inputs["pixel_values"] = torch.empty(rows, structure.image_channels(config), *size, device="meta")
    if "input_ids" in takes:
        inputs["input_ids"] = torch.empty(rows, source, dtype=torch.long, device="meta")
        inputs["attention_mask"] = torch.empty(rows, source, dtype=torch.long, device="meta")
    if structure.is_encoder_decoder(backbone) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = torch.empty(rows, target, dtype=torch.long, device="meta")
    return inputs
