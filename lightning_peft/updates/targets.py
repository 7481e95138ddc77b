"""The weight matrices of a backbone that an update can go to: those of layers, and those that are read without a call.

A layer that is called (linear, embedding, convolution) is named as the module, a matrix that its module reads itself
as the parameter: ``self_attn.in_proj_weight`` of ``nn.MultiheadAttention``, ``experts.gate_up_proj`` of experts. The
output projection of ``nn.MultiheadAttention`` is a module by name, but is not called either.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import select, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import graft_prefixes


class Target(NamedTuple):
    """A matrix: ``weight`` is its name below ``host``, if that calls no layer for it; None: the host is the layer."""

    host: nn.Module
    weight: str | None = None


def targets(
    backbone: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    patterns: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Target]:
    """Return the matrices that the patterns select, by name, in the order of the model; those of the head are left out.

    ``"all-linear"`` selects the linear layers inside the blocks, the projections of attentions and stacked experts
    among them. The name of a module that reads matrices itself stands for all of these. None selects the query and
    value projections, or the fused one.

    Args:
        backbone: the model.
        kinds: of the layers that are called.
        patterns: suffixes of names, one regex for the whole name, ``"all-linear"``, or None.
        layers: indices of the blocks, negative ones from the end; None: all.

    Raises:
        TuningError: a pattern selects nothing, or a layer index is out of range.
    """
    found, owners = all_targets(backbone, kinds)
    if patterns is None:
        patterns = _query_and_value(backbone, found)
    if patterns == "all-linear":
        lists = structure.block_lists(backbone)
        chosen = {n for n, target in found.items() if select.block_index(lists, n) and _is_linear(target)}
        if not chosen:
            raise TuningError(f"'all-linear' finds no linear layer in a list of blocks of {type(backbone).__name__}.")
    else:
        chosen = set()
        for pattern, names in select.match([*found, *owners], patterns).items():
            if not names:
                kind = " or ".join(k.__name__ for k in kinds)
                near = select.near(pattern, found)
                raise TuningError(f"{pattern!r} matches no {kind} of {type(backbone).__name__}{near}.")
            chosen.update(*(owners.get(name, [name]) for name in names))
    if layers is not None:
        chosen = select.in_layers(backbone, chosen, layers)
    return {name: target for name, target in found.items() if name in chosen}


def all_targets(
    backbone: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> tuple[dict[str, Target], dict[str, list[str]]]:
    """Return all targets, and which of them each module that reads matrices itself has."""
    head = set(structure.head_names(backbone))
    added = graft_prefixes(backbone)
    found: dict[str, Target] = {}
    owners: dict[str, list[str]] = {}
    for path, module in backbone.named_modules():
        if f"{path}.".startswith(added) or path in found:
            continue
        prefix = f"{path}." if path else ""
        if any(f"{prefix}{name}" in head for name, _ in module.named_parameters(recurse=False)):
            continue
        if isinstance(module, kinds):
            found[path] = Target(module)
        else:
            for name in _read(module):
                own = f"{prefix}{name.removesuffix('.weight')}" if "." in name else f"{prefix}{name}"
                found[own] = Target(module, name)
                owners.setdefault(path, []).append(own)
    return found, owners


def _read(module: nn.Module) -> Iterable[str]:
    """Return the names of the matrices that a module reads without calling a layer."""
    if isinstance(module, nn.MultiheadAttention):
        return [*(n for n, p in module.named_parameters(recurse=False) if p.dim() == 2), "out_proj.weight"]
    if any(kind.__module__.startswith("torch.nn.modules.") for kind in type(module).__mro__ if kind is not nn.Module):
        return []  # a layer of torch: its matrices are no plain product, or (LSTM) are read from elsewhere
    return [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.dim() in (2, 3) and min(p.shape[-2:]) > 1 and not name.endswith("bias")  # one for each expert
    ]


def _is_linear(target: Target) -> bool:
    if target.weight is None:
        return isinstance(target.host, (nn.Linear, Conv1D))
    return isinstance(target.host, nn.MultiheadAttention) or target.host.get_parameter(target.weight).dim() == 3


def _query_and_value(backbone: nn.Module, found: dict[str, Target]) -> str | list[str]:
    try:
        return select.by_role(backbone, ["query", "value"], (nn.Linear, Conv1D))
    except TuningError:
        lists = structure.block_lists(backbone)
        packed = ("in_proj_weight", "q_proj_weight", "v_proj_weight")
        fused = [n for n in found if n.rpartition(".")[2] in packed and select.block_index(lists, n)]
        if not fused:
            raise
        return fused
