"""Finds the attentions of a model and the shapes of their keys and values, in a run that computes no numbers.

The run is on the meta device, whatever the size of the model, and part by part: what needs numbers (the choice of
experts, a scan, a count of image tokens) hands its input on, and a part that the inputs do not reach, such as the
encoder of a speech model, is run by itself, or block by block. What a model keeps between two calls is put back.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, placement, structure, text_structure
from lightning_peft.core.added_scores import Watching
from lightning_peft.core.cache_argument import argument_of
from lightning_peft.core.graft import Graft
from lightning_peft.core.longer_cache import with_longer_cache
from lightning_peft.core.meta_run import ran
from lightning_peft.core.select import ROLES

Kind = Literal["self", "encoder", "decoder", "cross"]
Route = Literal["interface", "cache", "scores"]
_SOURCE, _TARGET = 3, 5  # lengths of the probe's inputs, which tell self- from cross-attention
_watchers: list[Callable[[nn.Module, Tensor, Tensor, Tensor | None], Any]] = []


class Attention(NamedTuple):
    """One attention of a model: where it is, what it attends to, and the shapes of its keys and values.

    ``route`` is how they are reached: by transformers' attention interface, by its argument for a cache, or among the
    operations that it computes.
    """

    path: str
    module: nn.Module
    kind: Kind
    heads: int
    key_dim: int
    value_dim: int
    route: Route = "interface"


class _Probe:
    """What has been seen so far, by module."""

    def __init__(self, backbone: nn.Module) -> None:
        self.paths = {module: path for path, module in anatomy.without_grafts(backbone).items()}
        self.encodes_and_decodes = structure.is_encoder_decoder(backbone)
        self.found: dict[nn.Module, Attention] = {}
        self.masks: dict[nn.Module, list[Tensor | None]] = {}

    def at_interface(self, module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Note an attention that calls the interface, and the mask that it gives it, in each of its calls."""
        self.masks.setdefault(module, []).append(mask)
        self.see(module, key, value)

    def prepares(self, module: nn.Module, given: tuple[Any, ...]) -> bool:
        """Tell whether an attention computes something of its keys and values before it calls the interface.

        It calls it more than once, each time with a part of the values (DiffLlama), or with a mask that it has made of
        them (Doge): the columns of a prefix then have to be among them before that, as those of a cache are.
        """
        masks = self.masks.get(module, [])
        return len(masks) > 1 or any(mask is not None and all(mask is not value for value in given) for mask in masks)

    def see(self, module: nn.Module, key: Tensor, value: Tensor, route: Route = "interface") -> None:
        """Note an attention."""
        if module not in self.paths:
            return
        kind: Kind = "self"
        if self.encodes_and_decodes:
            in_decoder = "decoder" in self.paths[module].split(".")
            kind = "encoder" if not in_decoder else "cross" if key.shape[2] == _SOURCE else "decoder"
        shape = (key.shape[1], key.shape[3], value.shape[3])
        self.found[module] = Attention(self.paths[module], module, kind, *shape, route)


@contextmanager
def watched(watch: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Any]) -> Iterator[None]:
    """Let a function see the keys and values [B, H, S, d] of every attention, and its mask, while the context lasts."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def seen(module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Show the keys and values of an attention, and its mask, to those who watch."""
    for watch in _watchers:
        watch(module, key, value, mask)


def probe(backbone: nn.Module) -> list[Attention]:
    """Run the model on the meta device, which computes no numbers, and return the attentions in the model's order."""
    state = _Probe(backbone)
    with watched(state.at_interface), placement.undispatched(backbone):
        _run_parts(backbone, state)
    order = list(state.paths)
    return sorted(state.found.values(), key=lambda one: order.index(one.module))


def _run_parts(part: nn.Module, state: _Probe) -> None:
    """Run a part of the model, or, where its inputs are not known, the models and the blocks inside it."""
    if any(_ran(part, inputs, state) for inputs in _candidates(part, state)):
        return
    inner = structure.pretrained_models(nn.ModuleList(part.children()))
    for model in inner.values():
        _run_parts(model, state)
    if not inner:
        for blocks in anatomy.blocks(part).values():
            for _, block in blocks:
                _ran(block, _block_inputs(block), state)


def _candidates(part: nn.Module, state: _Probe) -> Iterator[Mapping[str, Tensor]]:
    """Yield inputs to try: those of the text alone, which a model of text and images may do with, and all."""
    everything = inputs_on_meta(part)
    if state.encodes_and_decodes and "decoder" in state.paths[part].split("."):
        width = structure.width_of(part)
        if "encoder_hidden_states" in structure.arguments_of(part) and width is not None and "input_ids" in everything:
            text = {"input_ids": torch.empty(1, _TARGET, dtype=torch.long, device="meta")}
            yield text | {"encoder_hidden_states": _hidden(part, width)}
    if "input_ids" in everything and "pixel_values" in everything:
        yield {name: value for name, value in everything.items() if name != "pixel_values"}
    if everything:
        yield everything


def _block_inputs(block: nn.Module) -> dict[str, Any]:
    """Return what a block that is called by itself is given: hidden states, and None for what else it asks for."""
    takes = list(inspect.signature(type(block).forward).parameters.values())[1:]
    names = [parameter for parameter in takes if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if not names:
        return {}
    norms = [dict(module.named_parameters()) for module in block.modules() if "Norm" in type(module).__name__]
    norm = next((own["weight"] for own in norms if "weight" in own), None)
    asked = {parameter.name: None for parameter in names[1:] if parameter.default is parameter.empty}
    return {} if norm is None else {names[0].name: _hidden(block, norm.shape[0]), **asked}


def _hidden(part: nn.Module, width: int) -> Tensor:
    dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), torch.float32)
    return torch.empty(1, _SOURCE, width, dtype=dtype, device="meta")


def _ran(part: nn.Module, inputs: Mapping[str, Any], state: _Probe) -> bool:
    """Run a part without numbers, and tell whether it came to its end."""
    takers = {module for module in part.modules() if argument_of(module.forward) is not None}
    innermost = {module for module in takers if takers.isdisjoint(list(module.modules())[1:])}

    def lenient(module: nn.Module) -> Any:
        if isinstance(module, Graft):
            return None
        return partial(_lenient, module, module.forward, module in innermost, state)

    return ran(part, each=lenient, **inputs)


def _lenient(
    module: nn.Module, forward: Callable[..., Any], fills_cache: bool, state: _Probe, *args: Any, **kwargs: Any
) -> Any:
    """Compute what a module gives, or hand its input on where it needs numbers."""
    state.masks.pop(module, None)
    try:
        out = forward(*args, **kwargs)
    except Exception:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None or given.ndim > 3:  # an image, say, is no hidden state
            raise
        unseen = fills_cache and module not in state.found
        if unseen and (shape := text_structure.cached_shape_of(module)) is not None and given.ndim == 3:
            keys = given.new_empty(given.shape[0], shape[0], given.shape[1], shape[1])
            state.see(module, keys, keys, "cache")
        width = structure.out_features_of(module)
        return given if width is None else given.new_empty(*given.shape[:-1], width)
    if fills_cache and (module not in state.found or state.prepares(module, (*args, *kwargs.values()))):
        before = dict(state.found)
        try:
            _through_cache(module, forward, state, args, kwargs)
        except Exception:  # what it keeps may be no keys and values: the state of a scan
            state.found = before
    if _projects(module) and state.found.keys().isdisjoint(module.modules()):
        with suppress(Exception):
            _among_operations(module, forward, state, args, kwargs)
    return out


def _projects(module: nn.Module) -> bool:
    """Tell whether queries, keys and values are projected by direct children of a module."""
    names = [name for name, _ in module.named_children()]
    apart = [[name for name in names if re.fullmatch(ROLES[role], name)] for role in ("query", "key", "value")]
    return all(apart) or any(re.fullmatch(ROLES["fused_qkv"], name) for name in names)


def _among_operations(
    module: nn.Module, forward: Callable[..., Any], state: _Probe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run an attention with one column more among what it computes, and note it if that has found its place."""

    def rows(like: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        one = like.new_empty(batch, like.shape[:-2].numel() // batch, 1, like.shape[-1])
        return one, one

    with Watching(rows) as watching:
        forward(*args, **kwargs)
    if watching.heads and watching.key_dim and watching.value_dim == watching.key_dim:
        key = torch.empty(1, watching.heads, _SOURCE, watching.key_dim, device="meta")
        state.see(module, key, key, "scores")


def _through_cache(
    module: nn.Module, forward: Callable[..., Any], state: _Probe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run an attention with a cache that gives one column more, and note it if it can do with that."""
    shapes: list[tuple[Tensor, Tensor]] = []

    def lengthen(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((key, value))
        longer = [torch.cat((t.new_empty(t.shape[0], t.shape[1], 1, t.shape[3]), t), dim=2) for t in (key, value)]
        return longer[0], longer[1]

    inputs = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
    inputs[str(argument_of(forward))] = None  # that of the model holds these keys and values already
    with_longer_cache(module, forward, lengthen, 1, (), inputs)
    if shapes:
        state.see(module, *shapes[0], "cache")


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
