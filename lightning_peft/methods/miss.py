"""MiSS: the input features of each layer are summed in shards, and one matrix of the sums is added to its output.

``h = W x + Dᵀ Σ_k x_k``: x is cut into in / r shards x_k of r features, and D [r, out], which is zero at the start, is
shared by all of them. So ``W' = W + [Dᵀ Dᵀ ...]``: the update has rank r, one matrix to train and no product of two.

Source: Kang & Yin 2024, arXiv 2409.15371, section 3 (called Bone in its first versions). Where r does not divide the
input HF PEFT pads it; here it is refused, since the last features would then share their rows with fewer others.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.layers import LayerMethod, check_divides
from lightning_peft.core.arguments import natural, rate
from lightning_peft.core.placement import device_of
from lightning_peft.core.twin import Twin
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.layer_update import LayerUpdate
from lightning_peft.updates.low_rank import shape_of


class Shards(LayerUpdate):
    """Adds ``Dᵀ Σ_k x_k`` to the output of a layer.

    Args:
        host: the layer.
        r: size of a shard [features].
        dropout: rate of the dropout on the input of the update.
    """

    def __init__(self, host: nn.Module, r: int, dropout: float) -> None:
        super().__init__(host)
        self.dropout = dropout
        self.D = nn.Parameter(torch.zeros(r, shape_of(host)[0], device=device_of(host)))

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the output with the update, [..., out]."""
        if self.merged:
            return out
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        sums = x.unflatten(-1, (-1, len(self.D))).sum(-2)
        return out + (sums @ self.D.to(x.dtype)).to(out.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W + [Dᵀ Dᵀ ...]``."""
        return (weight.unflatten(1, (-1, len(self.D))) + self.D.t().unsqueeze(1)).flatten(1)

    def neutral(self, host: nn.Module, name: str) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self.D)


@dataclass(eq=False, kw_only=True)
class MiSS(LayerMethod):
    """Train one matrix for each chosen layer, which all shards of its input share.

    Args:
        r: size of a shard [features], which must divide the input of each layer; also the rank of the update.
        dropout: dropout rate on the input of the update.
    """

    r: int = natural(64)
    dropout: float = rate(0.0)

    trains: ClassVar[str] = "one matrix for each layer, which shards of its input share"
    paper: ClassVar[str] = "Kang & Yin 2024, arXiv 2409.15371"
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout"}
    twin: ClassVar[Twin | None] = Twin(
        peft_type="MISS",
        tensors={"D": "miss_block"},
        arguments={"r": "r", "dropout": "miss_dropout"},
        defaults={
            "bias": "none",
            "exclude_modules": None,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "mini_r": 1,
            "miss_dropout": 0.0,
            "r": 64,
            "target_modules": None,
        },
    )

    def update(self, name: str, host: nn.Module) -> Shards:
        """Return the shared matrix of a layer."""
        check_divides("r", self.r, shape_of(host)[1], f"is the input of {name}")
        return Shards(host, self.r, self.dropout)


MiSSMixin = TunedBy[MiSS]
