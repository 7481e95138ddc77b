"""The weight matrices of a backbone that an update can go to: those of layers, and those that are read without a call.

A layer that is called (linear, embedding, convolution) is named as the module, a matrix that its module reads itself
as the parameter: ``self_attn.in_proj_weight`` of ``nn.MultiheadAttention``, ``experts.gate_up_proj`` of experts. The
output projection of ``nn.MultiheadAttention`` is a module by name, but is not called either.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy, select, structure
from lightning_peft.core.computed_weights import check_is_parameter
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import graft_prefixes
from lightning_peft.core.quantized import has_quantized_weight
from lightning_peft.core.reach import are_idle, reached
from lightning_peft.core.reads import products_of, reads_below
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS


class Target(NamedTuple):
    """A matrix.

    Attributes:
        host: the layer, or the module that reads the matrix itself.
        weight: the name of the matrix below the host, if that reads it; None: the host is the layer.
        layer: the layer that the host calls as well, on another way through its forward pass.
    """

    host: nn.Module
    weight: str | None = None
    layer: nn.Module | None = None

    def by_call(self) -> "Target":
        """Return the target as what hangs on the call of the layer, if there is such a call."""
        return self if self.layer is None else Target(self.layer)

    def checked(self, name: str) -> "Target":
        """Return the target of this name, if the matrix is a parameter.

        Raises:
            TuningError: the module computes it at each call.
        """
        if self.weight is not None:
            check_is_parameter(self.host, self.weight, "a change of it would not be seen", name)
        return self


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
        TuningError: a pattern selects nothing, a matrix is computed at each call, or a layer index is out of range.
    """
    found, owners = all_targets(backbone, kinds, patterns or "all-linear")
    named = patterns not in (None, "all-linear")
    if patterns is None:
        usual = _query_and_value(backbone, found, kinds)
        chosen = usual if isinstance(usual, set) else _matching(backbone, usual, found, owners, kinds)
    elif patterns == "all-linear":
        chosen = _every_linear(backbone, found)
    else:
        chosen = _matching(backbone, patterns, found, owners, kinds)
    if patterns is None and are_idle(backbone, chosen):
        chosen = _every_linear(backbone, found)
    if not named:
        chosen = set(reached(backbone, chosen))
    if layers is not None:
        chosen = select.in_layers(backbone, chosen, layers)
    return {name: target.checked(name) for name, target in found.items() if name in chosen}


def _matching(
    backbone: nn.Module,
    patterns: str | Sequence[str],
    found: dict[str, Target],
    owners: dict[str, list[str]],
    kinds: tuple[type[nn.Module], ...],
) -> set[str]:
    chosen: set[str] = set()
    for pattern, names in select.match([*found, *owners], patterns).items():
        if not names:
            kind = " or ".join(k.__name__ for k in kinds)
            near = select.near(pattern, found)
            raise TuningError(f"{pattern!r} matches no {kind} of {type(backbone).__name__}{near}.")
        chosen.update(*(owners.get(name, [name]) for name in names))
    return chosen


def all_targets(
    backbone: nn.Module, kinds: tuple[type[nn.Module], ...], patterns: str | Sequence[str] = "all-linear"
) -> tuple[dict[str, Target], dict[str, list[str]]]:
    """Return all targets, and which of them each module that reads matrices itself has."""
    head = set(select.closed_head(backbone, patterns))
    added = graft_prefixes(backbone)
    found: dict[str, Target] = {}
    owners: dict[str, list[str]] = {}
    for path, module in backbone.named_modules():
        if f"{path}.".startswith(added) or path in found:
            continue
        prefix = f"{path}." if path else ""
        if head and any(f"{prefix}{name}" in head for name, _ in module.named_parameters(recurse=False)):
            continue
        if isinstance(module, kinds):
            found[path] = Target(module, "weight" if _gives_no_product(module) else None)
        else:
            for name, layer in _read(module).items():
                own = matrix_name(path, name)
                found[own] = Target(module, name, layer)
                owners.setdefault(path, []).append(own)
    return found, owners


def matrix_name(path: str, weight: str) -> str:
    """Return the name of a matrix that the module at ``path`` reads as ``weight``: that of the layer, if it is of one.

    >>> matrix_name("block.attention", "out_proj.weight"), matrix_name("block.attention", "in_proj_weight")
    ('block.attention.out_proj', 'block.attention.in_proj_weight')
    """
    name = f"{path}.{weight}".lstrip(".")
    return name.removesuffix(".weight") if "." in weight else name


def _read(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the names of the matrices that a module reads without calling a layer, or besides a call of this layer."""
    if isinstance(module, nn.MultiheadAttention):
        own = [name for name, p in module.named_parameters(recurse=False) if p.dim() == 2]
        return dict.fromkeys([*own, "out_proj.weight"])
    if any(kind.__module__.startswith("torch.nn.modules.") for kind in type(module).__mro__ if kind is not nn.Module):
        return {}  # a layer of torch: its matrices are no plain product, or (LSTM) are read from elsewhere
    products = products_of(module)  # such as XLNet's; else a matrix of three dimensions has one for each expert
    found: dict[str, nn.Module | None] = dict.fromkeys(
        name
        for name, p in module.named_parameters(recurse=False)
        if not name.endswith("bias") and min(p.shape[-2:], default=0) > 1
        if p.dim() == 2 or name in products or (p.dim() == 3 and len(p) in structure.experts_of(module))
    )
    for read in reads_below(module):
        layer = module.get_submodule(read.layer)
        # Of a layer that is called a slice is read for other ends, such as exactness over several devices.
        if isinstance(layer, nn.Linear) and read.parameter == "weight" and (read.whole or not read.called):
            found[f"{read.layer}.weight"] = layer if read.called else None
    return found


def _gives_no_product(layer: nn.Module) -> bool:
    """Tell whether a linear layer of a class of its own may give something else than ``W x``, as some routers do."""
    own = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward
    return own and not has_quantized_weight(layer)


def _is_linear(target: Target) -> bool:
    if isinstance(target.host, (nn.Linear, Conv1D)) or (target.weight or "").endswith(".weight"):
        return True
    if target.weight is None:  # an embedding, a convolution
        return False
    return isinstance(target.host, nn.MultiheadAttention) or target.host.get_parameter(target.weight).dim() == 3


def _every_linear(backbone: nn.Module, found: dict[str, Target]) -> set[str]:
    convolutions = [
        n for n, target in found.items() if isinstance(target.host, CONVOLUTIONS) and target.host.groups == 1
    ]
    return select.every_linear(backbone, [n for n, target in found.items() if _is_linear(target)], convolutions)


def _query_and_value(
    backbone: nn.Module, found: dict[str, Target], kinds: tuple[type[nn.Module], ...]
) -> str | set[str]:
    """Return a regex for the projections of known names, or else the names of what is tuned in place of them."""
    lists = anatomy.block_lists(backbone)
    packed = ("in_proj_weight", "q_proj_weight", "v_proj_weight")
    own = {
        name
        for name, target in found.items()
        if target.weight is not None and anatomy.block_index(lists, name)
        if name.rpartition(".")[2] in packed or select.has_role(name, "query", "value")
    }
    try:
        return select.by_role(backbone, ["query", "value"], tuple(kind for kind in kinds if kind is not nn.Embedding))
    except TuningError as unknown:
        try:
            return own or _every_linear(backbone, found)
        except TuningError:
            raise unknown from None
