"""Adapters of single experts, for models that hold the experts of a block in one tensor.

transformers 5 stacks what used to be a linear layer for each expert, several of them below each other where they read
the same: gate and up. An update ``s B A`` of such a layer is one of its rows in the stack. So the A of an expert's
layers are put below each other and their B along a diagonal: the rank is the sum of theirs, and alpha grows with it.
The router has become a module that reads its matrix itself.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.names import BASE_LAYER, LAYERS, PREFIX, Names
from lightning_peft.interop.patterns import value_of

_PARTS = ("lora_A.weight", "lora_B.weight")


class Layer(NamedTuple):
    """The linear layer of one expert.

    Attributes:
        name: what it is called in the adapter.
        expert: its index.
        row: the first of its rows in the stack.
    """

    name: str
    expert: int
    row: int


def stack(adapter: PeftAdapter, names: Names) -> PeftAdapter:
    """Return an adapter in which the updates of single experts have become updates of the stacks.

    Raises:
        TuningError: an expert lacks an update that others have, or has more than one of LoRA.
    """
    rest = dict(adapter.tensors)
    config = dict(adapter.config)
    found: dict[str, dict[str, Tensor]] = {}
    for name, layers in _layers(names).items():
        own = {layer: _update(layer, rest, adapter.source) for layer in layers}
        given = {layer: update for layer, update in own.items() if update}
        if given:
            found[name], rank, alpha = _stacked(names.tensors[name], given, adapter)
            config["target_parameters"] = [*(config["target_parameters"] or []), name]
            config["rank_pattern"] = {re.escape(name): rank} | (config["rank_pattern"] or {})
            config["alpha_pattern"] = {re.escape(name): alpha} | (config["alpha_pattern"] or {})
    for name, tensors in found.items():
        module, _, leaf = name.rpartition(".")
        beside = [n for n, _ in names.modules[module].named_parameters(recurse=False) if f"{module}.{n}" in found]
        depth = len(beside) - 1 - beside.index(leaf)  # PEFT wraps a module once for each tensor, the first innermost
        rest |= {f"{PREFIX}{module}{f'.{BASE_LAYER}' * depth}.{part}": tensor for part, tensor in tensors.items()}
    routers = _routers(rest, names)
    if routers:
        config["target_parameters"] = [*(config["target_parameters"] or []), *routers]
    return replace(adapter, tensors=rest, config=config)


def _routers(tensors: Iterable[str], names: Names) -> list[str]:
    """Return the matrices, as the adapter calls them, of modules that it updates and that are no layers."""
    located = [names.locate(key.removeprefix(PREFIX)) for key in tensors if key.endswith(_PARTS[0])]
    found = {
        f"{called}.weight"
        for path, part, called in filter(None, located)
        if part == _PARTS[0] and not isinstance(names.paths[path], LAYERS) and f"{path}.weight" in names.tensors
    }
    return sorted(found)


def _layers(names: Names) -> dict[str, list[Layer]]:
    """Return the name of each stack [experts, rows, columns] -> the layers that it is made of, in the order of rows."""
    found = {}
    for name, indices in names.stacks.items():
        rows = names.tensors[name].shape[1]
        layers = [Layer(disk.removesuffix(".weight"), *divmod(int(first), rows)) for disk, first in indices.items()]
        found[name] = sorted(layers, key=lambda layer: (layer.row, layer.expert))
    return found


def _update(layer: Layer, tensors: dict[str, Tensor], source: str) -> list[Tensor]:
    """Take A and B of a layer out of the tensors; none is left for it."""
    start = f"{PREFIX}{layer.name}."
    keys = [key for key in tensors if key.startswith(start)]
    if keys and {key.removeprefix(start) for key in keys} != set(_PARTS):
        raise TuningError(
            f"{source} has {', '.join(sorted(key.removeprefix(start) for key in keys))} of {layer.name}, of which this "
            f"model keeps all experts in one tensor: only {' and '.join(_PARTS)} can be stacked, so merge it with PEFT."
        )
    return [tensors.pop(f"{start}{part}") for part in _PARTS] if keys else []


def _stacked(
    weight: Tensor, updates: dict[Layer, list[Tensor]], adapter: PeftAdapter
) -> tuple[dict[str, Tensor], int, float]:
    """Return the update of a stack by PEFT's parts, its rank and its alpha."""
    config, (experts, out, inside) = adapter.config, weight.shape
    ranks = {layer.row: len(a) for layer, (a, _) in updates.items()}
    first = next(iter(updates))
    for row, rank in ranks.items():
        having = {layer.expert for layer, (a, _) in updates.items() if layer.row == row and len(a) == rank}
        if len(having) < experts:
            lacking = min(set(range(experts)) - having)
            raise TuningError(
                f"{adapter.source} has updates of {len(having)} of {experts} experts of rank {rank} beside "
                f"{first.name}, e.g. none of expert {lacking}: experts in one tensor are tuned together, so merge it "
                "with PEFT."
            )
    total = sum(ranks.values())
    a, b = torch.zeros(experts, total, inside), torch.zeros(experts, out, total)
    starts = dict(zip(ranks, accumulate(ranks.values(), initial=0), strict=False))
    scale = _scale(config, first.name, ranks[first.row])
    for layer, (down, up) in updates.items():
        columns = slice(starts[layer.row], starts[layer.row] + len(down))
        a[layer.expert, columns] = down.to(a)
        b[layer.expert, layer.row : layer.row + len(up), columns] = up.to(b) * (
            _scale(config, layer.name, len(down)) / scale
        )
    alpha = scale * (math.sqrt(total) if config["use_rslora"] else total)
    return {_PARTS[0]: a.flatten(0, 1), _PARTS[1]: b.permute(1, 2, 0).flatten(1)}, total, alpha


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    """Return what the update of a layer is multiplied with."""
    alpha = float(value_of(config["alpha_pattern"], name, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
