"""Low-rank updates of weights that their module reads without calling a layer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.folding import Folding
from lightning_peft.updates import in_place, stacked
from lightning_peft.updates.factors import Factors, row_ratio
from lightning_peft.updates.layout import Layout


class LowRankWeights(Folding):
    """Changes weights that their host reads without calling a layer, to ``W + s B A``, rescaled with DoRA.

    For ``nn.MultiheadAttention`` (the packed in-projection and the output projection), for projections [width, heads,
    d_head] as XLNet's, and for experts stacked in one tensor, each of which gets matrices of its own, and whose tokens
    are multiplied by these (`stacked`). Elsewhere the gradient goes through the whole weight, so a step costs as many
    FLOPs as if that weight were trained. Dropout on the input has no place here.

    Args:
        host: the module.
        updates: name of a parameter below the host -> the arguments of its `Factors` beside the weight.
    """

    def __init__(self, host: nn.Module, updates: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.weights = self.folds = tuple(updates)
        self.layouts = {name: Layout.of(host, name) for name in updates}
        for name, arguments in updates.items():
            weight = host.get_parameter(name)
            matrix = self.layouts[name].matrix(weight.detach())
            part = Factors(partial(Tensor.detach, matrix), tuple(matrix.shape), weight.device, **arguments)
            self.register_module(self.part_name(name), part)

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for each B, and the norms of the rows of its weight for each m."""
        own, _, leaf = name.rpartition(".")
        weight = next(weight for weight in self.weights if self.part_name(weight) == own)
        return self.part(weight).neutral_of(leaf, self.layouts[weight].matrix(host.get_parameter(weight).detach()))

    @classmethod
    def part_name(cls, name: str) -> str:
        """Return the name below the graft of the update of a weight."""
        own = name.replace(".", "_")
        return f"{own}_" if hasattr(cls, own) else own  # a router's matrix is called as the joint is

    def part(self, name: str) -> Factors:
        """Return the update of a weight."""
        part = self.get_submodule(self.part_name(name))
        assert isinstance(part, Factors)
        return part

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the changed weight, computed in fp32, in the dtype of ``w``, or what poses as it for experts."""
        if self.merged:
            return w
        part, layout = self.part(name), self.layouts[name]
        if part.m is None and layout.product is None and stacked.changes(w):
            return stacked.ChangedExperts.of(w, part.factors(), part.scale, layout.transposed)
        return self._changed(w, name).to(w.dtype)

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the changed weight."""
        return self._changed(value, name)

    def _changed(self, w: Tensor, name: str) -> Tensor:
        part, layout = self.part(name), self.layouts[name]
        with in_place.without_autocast(w):
            a, b = part.factors()
            changed = torch.add(layout.matrix(w), b @ a, alpha=part.scale)
            if part.m is not None:
                changed = changed * row_ratio(part.m, changed)
        return layout.stored(changed, w)
