"""Finds the two sublayers of each block, attention and feed-forward: by the names of their last layers, else by order.

A block whose layers have names that nobody knows still calls its sublayers as children, the one that mixes tokens
first and the feed-forward network last; Mamba has the first alone. What is found is the layer that ends a sublayer: its
last linear layer as wide as the block, or the sublayer itself, where that reads the layer's weight without a call, or
has experts.
"""

import re
from collections.abc import Container, Iterator
from typing import Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy, select, structure
from lightning_peft.core.reads import passed_by

Kind = Literal["attention", "ffn"]
_MIXES = re.compile(r"att|mix|mamba|conv|fourier|temporal|token", re.IGNORECASE)
_CROSS = re.compile(rf"(?:.*\.)?(?:{select.ROLES['cross_attention']})(?:\..*)?")


class Place(NamedTuple):
    """The layer that ends a sublayer, or the sublayer.

    Attributes:
        name: its name below the backbone.
        module: the layer.
        width: the size of the last dimension of what it gives.
    """

    name: str
    module: nn.Module
    width: int


def ends(backbone: nn.Module, block: str, kind: Kind, cross: bool = False, read: bool = False) -> list[Place]:
    """Return what ends the sublayers of this kind in the block of this name: one, several, or none.

    Args:
        backbone: the model.
        block: the name of one of its blocks.
        kind: of the sublayer.
        cross: whether cross-attentions count.
        read: whether layers count whose weights are read without a call.
    """
    host = backbone.get_submodule(block)
    inside = {
        f"{block}.{name}": module
        for name, module in anatomy.without_grafts(host).items()
        if name and (cross or not _CROSS.fullmatch(name))
    }
    passed: Container[str] = () if read else passed_by(host, block)
    named = [n for n, m in inside.items() if select.has_role(n, f"{kind}_output") and width_of(m) and n not in passed]
    if named:
        places = [Place(name, inside[name], width_of(inside[name])) for name in named]
        # All write to the tokens of the block: narrower ones compute something else, as the biases of positions.
        return [place for place in places if place.width == max(place.width for place in places)]
    sublayer = _sublayers(block, host).get(kind)
    place = None if sublayer is None else _end(sublayer, inside, passed, _block_width(backbone, host))
    return [] if place is None else [place]


def width_of(module: nn.Module) -> int:
    """Return the size of the last dimension of a module's output: of a projection, a norm or a scale; 0 if unknown."""
    own = list(module.parameters(recurse=False))
    return structure.out_features_of(module) or (own[0].shape[0] if own and own[0].ndim == 1 else 0)


def _sublayers(block: str, host: nn.Module) -> dict[Kind, str]:
    """Return the names of the child that mixes tokens and of the feed-forward network, as far as there are any."""
    every = list(_children(block, host))
    found = [name for name, child in every if _has_matrix(child)]
    if not found or not any(isinstance(module, (nn.Linear, Conv1D)) for module in host.modules()):
        return {}  # convolutions, which give no tokens
    mixing = [n for n, child in every if _MIXES.search(n.removeprefix(block)) and (n in found or any(child.children()))]
    if len(found) == 1:
        return {"attention": found[0]} if mixing == found else {"ffn": found[0]}
    first = mixing[0] if mixing else found[0]
    others = [name for name in found if name not in mixing and name != first] or [n for n in found if n != first]
    # What mixes by no matrix (FNet) has no layer to follow.
    return {"attention": first, "ffn": others[-1]} if first in found else {"ffn": others[-1]}


def _has_matrix(module: nn.Module) -> bool:
    return any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters())


def _children(block: str, host: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in host.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _children(f"{block}.{name}", child)
        elif "Norm" not in type(child).__name__:
            yield f"{block}.{name}", child


def _end(sublayer: str, inside: dict[str, nn.Module], passed: Container[str], width: int) -> Place | None:
    linears = [
        name
        for name, module in inside.items()
        if (name == sublayer or name.startswith(f"{sublayer}.")) and isinstance(module, (nn.Linear, Conv1D))
    ]
    width = width or next((width_of(inside[name]) for name in reversed(linears)), 0)
    for name in reversed(linears):
        if width_of(inside[name]) == width and name not in passed:
            return Place(name, inside[name], width)
    leaf = isinstance(inside[sublayer], (nn.Linear, Conv1D))  # of another width, as where patches are merged
    if width and not leaf and (linears or not any(isinstance(m, nn.Conv2d) for m in inside[sublayer].modules())):
        return Place(sublayer, inside[sublayer], width)
    return None


def _block_width(backbone: nn.Module, host: nn.Module) -> int:
    """Return the width of the tokens in a block: that of its own norms, else that which the configuration says."""
    norms = [child for child in host.children() if "Norm" in type(child).__name__]
    return next((width for norm in norms if (width := width_of(norm))), structure.width_of(backbone) or 0)
