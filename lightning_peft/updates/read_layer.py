"""Lets a module that reads a layer's parameters itself see what a graft would fold into them."""

import torch
from torch import Tensor, nn

from lightning_peft.core.computed_weights import check_is_parameter
from lightning_peft.core.folding import Folding


class ReadLayer(Folding):
    """Gives its host the parameters of a layer below it as ``inner`` folds them, since the layer is not called.

    Args:
        host: the module that reads them.
        layer: the name of the layer below it.
        inner: a graft for that layer, which is never attached to it.

    Raises:
        TuningError: the layer computes its weight.
    """

    def __init__(self, host: nn.Module, layer: str, inner: Folding) -> None:
        super().__init__()
        self.layer, self.inner = layer, inner
        for name in inner.folds:
            check_is_parameter(host, f"{layer}.{name}", "it cannot be read with an update in it")
        self.weights = self.folds = tuple(f"{layer}.{name}" for name in inner.folded(host.get_submodule(layer)))
        self.refer(host_layer=host.get_submodule(layer))

    host_layer: nn.Module

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return that of the inner graft."""
        return self.inner.neutral(self.host_layer, name.removeprefix("inner."))

    def weight(self, w: Tensor, name: str) -> Tensor:
        """Return the parameter with the effect of the inner graft, in the dtype of ``w``."""
        wide = torch.promote_types(w.dtype, torch.float32)
        return w if self.merged else self.fold(name, w.to(wide, copy=True), self.host_layer).to(w.dtype)

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the parameter with the effect of the inner graft."""
        return self.inner.fold(name.rpartition(".")[2], value, self.host_layer)
