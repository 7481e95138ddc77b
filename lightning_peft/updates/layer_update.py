"""The base of grafts that change a linear layer in a way that its weight can take in."""

from typing import ClassVar

import torch
import torch.nn.functional as F
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

    zero: ClassVar[frozenset[str]] = frozenset()
    """Names of its parameters that change nothing where they are zero, and in which the change is linear."""

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

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for a parameter that changes nothing where it is zero."""
        return torch.zeros_like(self.get_parameter(name)) if name in self.zero else None


class AddedUpdate(LayerUpdate):
    """Adds to the output of a layer what the change of its weight would add.

    Args:
        host: the layer.
        dropout: rate of the dropout on the input of the update; the ids that an embedding takes are not dropped.
    """

    def __init__(self, host: nn.Module, dropout: float) -> None:
        super().__init__(host)
        self.dropout = dropout

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the output with the update, [..., out], in whose dtype the sum is rounded."""
        if self.merged:
            return out
        if self.training and self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        return out + self.added(out, host, x).to(out.dtype)

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return what is added to the output, of its shape."""
        raise NotImplementedError
