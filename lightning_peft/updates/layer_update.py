"""The base of grafts that change a linear layer in a way that its weight can take in."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core.folding import Folding

LINEAR = (nn.Linear, Conv1D)
"""The layers that such a graft can have as its host."""


class LayerUpdate(Folding):
    """Changes a linear layer, or GPT-2's Conv1D, as another weight would.

    Args:
        host: the layer.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.transposed = isinstance(host, Conv1D)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight [out, in] with the effect in it; it may be written to."""
        raise NotImplementedError

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the weight with the effect in it, in its own layout."""
        return self.matrix(self.changed(self.matrix(value)))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight of the host as [out, in], a view of it, and one of [out, in] as the host has it."""
        return weight.t() if self.transposed else weight
