"""Methods that change chosen layers, most of them linear, by grafts: such a method is a graft and its arguments."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_peft.bases.merging import MergingMethod
from lightning_peft.core import select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.hosts import check_is_real
from lightning_peft.core.reach import are_idle, reached
from lightning_peft.core.reads import passed_by
from lightning_peft.updates.layer_update import LINEAR, LayerUpdate
from lightning_peft.updates.read_layer import ReadLayer

APART = ", or give the layers apart"
"""What else can be done where a size fits some of the layers alone."""


@dataclass(eq=False, kw_only=True)
class LayerMethod(MergingMethod):
    """A method of linear layers; `update` makes the graft of one.

    Args:
        target_modules: suffixes of module names, one regex for the whole name, or 'all-linear' for every linear layer
            inside the blocks; None: the query and value projections (or the fused one), or every linear layer inside
            the blocks where these have other names.
        layers: indices of the blocks to tune, negative ones from the end; None: all.
        backbone_mode: whether dropout of the frozen backbone is active in training.
    """

    backbone_mode: Literal["train", "eval"] = "train"
    target_modules: list[str] | str | None = None
    layers: list[int] | None = None

    kind: ClassVar[str] = "weights"
    hosts: ClassVar[tuple[type[nn.Module], ...]] = LINEAR
    """The layers that patterns can name; those that are chosen without a name are linear."""

    def update(self, name: str, host: nn.Module) -> LayerUpdate:
        """Return the graft for a layer of this name.

        Raises:
            TuningError: it does not fit the layer.
        """
        raise NotImplementedError

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach an update to each chosen layer, or to the module that reads its weight without a call."""
        patterns = _query_and_value(backbone) if self.target_modules is None else self.target_modules
        kinds = LINEAR if self.target_modules is None else self.hosts
        found = select.hosts(backbone, kinds, patterns, self.layers)
        if self.target_modules is None and are_idle(backbone, found):
            found = select.hosts(backbone, kinds, "all-linear", self.layers)
        chosen = self.without_excluded(found)
        if not chosen:
            raise TuningError(
                f"{type(self).__name__} is left no layer by target_modules={self.target_modules!r} and "
                f"exclude={self.exclude!r}: let target_modules name some, or exclude fewer."
            )
        if self.target_modules in (None, "all-linear"):
            chosen = {name: chosen[name] for name in reached(backbone, chosen)}
        read = passed_by(backbone)
        for name, host in chosen.items():
            check_is_real(host, name)
            update = self.update(name, host)
            if name in read:
                module, layer = read[name]
                attach(module, ReadLayer(module, layer, update), f"{self.key}_{layer.replace('.', '_')}")
            else:
                attach(host, update, self.key)
        return ()


def _query_and_value(backbone: nn.Module) -> str:
    try:
        return select.by_role(backbone, ["query", "value"], LINEAR)
    except TuningError:
        return "all-linear"
