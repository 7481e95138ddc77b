"""Partial-k: the last k blocks, the norm after them and the task head are trained, the rest is frozen.

Source: the baselines partial-1, -2, -4 of Jia et al. 2022, arXiv 2203.12119 (VPT), and "partial fine-tuning" of He et
al. 2022, arXiv 2111.06377 (MAE), figure 9, where half a block is the feed-forward sublayer of the last one, with its
norm. Blocks are counted by index; where they come in stages (Swin, ResNet), across the stages, and what lies between
two trained blocks, such as a downsampling, is trained too. A pooler is not. ``k=0`` is linear probing. Autograd stops
below the first trained block by itself, so that the frozen part costs one forward pass, and with ``cache_features`` it
runs once for each row.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.bases.caching import CachingMethod
from lightning_peft.core import anatomy, select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PartialK(CachingMethod):
    """Train the last k blocks with the norm after them, and the head.

    Args:
        k: how many blocks; a half is the feed-forward sublayer of one block more: 0.5, 1.5 ...
        blocks: name of the list of blocks, where there are several; None: the last, such as a decoder's, and in a model
            of two towers (CLIP) the last of each.
        cache_features: run the frozen part once for each row and train on what it gave; for data without augmentation.
        cache_limit: most memory to take for that [GiB].
        backbone_mode: whether dropout of the frozen blocks is active in training.
    """

    k: float = 1
    blocks: str | None = None

    kind: ClassVar[str] = "blocks"
    trains: ClassVar[str] = "the last k blocks, the norm after them and the head"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv 2203.12119"
    advised: ClassVar[Rates] = Rates(1e-3, 1e-3, MEASURED, Rates(3e-3, 3e-3, DIGITS))

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Return the names of what is trained in the last k blocks and after them."""
        lists = self._lists(backbone)
        for entries in lists.values():
            if self.k % 1 not in (0, 0.5) or self.k < 0 or self.k > len(entries):
                raise TuningError(
                    f"k={self.k} does not fit the {len(entries)} blocks of {type(backbone).__name__}: take 0 to "
                    f"{len(entries)}, in whole or half blocks."
                )
        head = set(anatomy.head_names(backbone))
        if self.k == 0:
            if not head and self.also_train is None:
                raise TuningError(
                    f"k=0 trains the head alone, and {type(backbone).__name__} has none: take k=0.5 or more, or name "
                    "what to train with also_train= (a regex)."
                )
            self.cache(backbone)
            return ()
        trained = [name for path, entries in lists.items() for name in self._last(backbone, path, entries)]
        if len(lists) == 1:
            entries = next(iter(lists.values()))
            first = len(entries) - math.ceil(self.k)
            self.cache(backbone, entries[first][0], [name for name, _ in entries[:first]])
        elif self.cache_features:
            raise TuningError(
                f"cache_features=True keeps what one list of blocks is given, and {type(backbone).__name__} has "
                f"{len(lists)} of them tuned: name one by blocks=, or set cache_features=False."
            )
        return reached(backbone, [name for name in trained if name not in head])

    def _last(self, backbone: nn.Module, path: str, entries: list[tuple[str, nn.Module]]) -> list[str]:
        """Return the names of the last k blocks of a list and of the norms after it."""
        whole = int(self.k)
        names = [name for name, _ in backbone.named_parameters() if name.startswith(f"{path}.")]
        after = [name for name in anatomy.norm_names(backbone) if self._follows(backbone, path, name)]
        trained = [n for n in names if whole and _at_or_after(names, n, f"{entries[len(entries) - whole][0]}.")]
        if self.k % 1:
            trained += self._half(backbone, entries[len(entries) - whole - 1][0])
        return [*trained, *after]

    def _lists(self, backbone: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
        """Return the list of blocks that is tuned by its name: the last, or one in each tower of a model of two."""
        lists = anatomy.blocks(backbone)
        if self.blocks is not None:
            if self.blocks not in lists:
                raise TuningError(
                    f"blocks={self.blocks!r} is no list of blocks of {type(backbone).__name__}"
                    f"{select.near(self.blocks, lists)}."
                )
            return {self.blocks: lists[self.blocks]}
        if not lists:
            raise TuningError(f"{type(backbone).__name__} has no list of blocks: use LinearProbe or another method.")
        towers = anatomy.towers(backbone)
        read = set(reached(backbone, lists))
        lists = {name: entries for name, entries in lists.items() if name in read}
        with_norm = {name: entries for name, entries in lists.items() if _has_norm(entries)} or lists
        last = {next((t for t in towers if name.startswith(f"{t}.")), ""): name for name in with_norm}  # the later one
        return {name: lists[name] for name in last.values()}

    def _follows(self, backbone: nn.Module, path: str, norm: str) -> bool:
        """Tell whether a norm comes after the list of blocks, outside of it, in the same part of the model."""
        order = [name for name, _ in backbone.named_modules()]
        parent, owner = path.rpartition(".")[0], norm.rpartition(".")[0]
        outer = parent.rpartition(".")[0] if parent.rpartition(".")[2] in ("encoder", "decoder") else parent
        near = {f"{place}." if place else "" for place in (parent, outer)}
        here = any(owner.startswith(place) and "." not in owner.removeprefix(place) for place in near)
        later = order.index(owner) > order.index(path) and not norm.startswith(f"{path}.")
        return here and later and "embed" not in owner.rpartition(".")[2]

    def _half(self, backbone: nn.Module, block: str) -> list[str]:
        """Return the names of the feed-forward sublayer of a block, with its norm."""
        roles = ("intermediate", "ffn_output", "ffn_norm")
        names = [
            name
            for name, _ in backbone.named_parameters()
            if name.startswith(f"{block}.") and select.has_role(name.rpartition(".")[0], *roles)
        ]
        for role in roles[:2]:
            if not any(select.has_role(name.rpartition(".")[0], role) for name in names):
                raise TuningError(
                    f"{block} has no feed-forward sublayer under a known name, so it has no half: take a whole k."
                )
        return names


def _has_norm(entries: list[tuple[str, nn.Module]]) -> bool:
    return any("Norm" in type(module).__name__ for _, entry in entries for module in entry.modules())


PartialKMixin = TunedBy[PartialK]


def _at_or_after(names: list[str], name: str, first: str) -> bool:
    start = next(i for i, other in enumerate(names) if other.startswith(first))
    return names.index(name) >= start
