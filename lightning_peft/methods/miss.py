"""MiSS: the input features of each layer are summed in shards, and one matrix of the sums is added to its output.

``h = W x + Dᵀ Σ_k x_k``: x is cut into in / r shards x_k of r features, and D [r, out], which is zero at the start, is
shared by all of them. So ``W' = W + [Dᵀ Dᵀ ...]``: the update has rank r, one matrix to train and no product of two.

Source: Kang & Yin 2024, arXiv 2409.15371, section 3 (called Bone in its first versions). Where r does not divide the
input HF PEFT pads it; here it is refused, since the last features would then share their rows with fewer others.

With ``form="bat"``, the authors' block affine transformation, W is cut into r by r blocks W_ij, each of which becomes
``W_ij + W_ij D_i + D_i``: D [out / r, r, r] has as many entries, and the update depends on W and may have full rank.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.layers import APART, LayerMethod
from lightning_peft.core.arguments import check_divides, natural, rate
from lightning_peft.core.placement import device_of
from lightning_peft.core.quantized import dense
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.twin import LAYER_KEYS, Twin
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.layer_update import AddedUpdate
from lightning_peft.updates.low_rank import shape_of


class Shards(AddedUpdate):
    """Adds ``Dᵀ Σ_k x_k`` to the output of a layer.

    Args:
        host: the layer.
        r: size of a shard [features].
        dropout: rate of the dropout on the input of the update.
    """

    zero = frozenset({"D"})

    def __init__(self, host: nn.Module, r: int, dropout: float) -> None:
        super().__init__(host, dropout)
        self.D = nn.Parameter(torch.zeros(r, shape_of(host)[0], device=device_of(host)))

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return ``Dᵀ Σ_k x_k``, [..., out]."""
        return x.unflatten(-1, (-1, len(self.D))).sum(-2) @ self.D.to(x.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W + [Dᵀ Dᵀ ...]``."""
        return (weight.unflatten(1, (-1, len(self.D))) + self.D.t().unsqueeze(1)).flatten(1)


class Blocks(AddedUpdate):
    """Changes each block of r by r numbers of a weight: ``W_ij + W_ij D_i + D_i``.

    Args:
        host: the layer.
        r: size of a block [features].
        dropout: rate of the dropout on the input of the update; HF PEFT has none there.
    """

    comes_first = True  # what is added before it is no part of the weight that it multiplies, but would be once folded
    zero = frozenset({"D"})

    def __init__(self, host: nn.Module, r: int, dropout: float) -> None:
        super().__init__(host, dropout)
        self.D = nn.Parameter(torch.zeros(shape_of(host)[0] // r, r, r, device=device_of(host)))

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return what the change of the blocks gives, [..., out]."""
        with without_autocast(self.D):
            change = self._change(self.matrix(dense(host)))
        return F.linear(x, change.to(x.dtype))

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight with each of its blocks changed."""
        return weight + self._change(weight)

    def _change(self, weight: Tensor) -> Tensor:
        """Return ``W_ij D_i + D_i`` for the blocks of a weight [out, in], in fp32 or more."""
        r = self.D.shape[-1]
        blocks = weight.unflatten(0, (-1, r)).unflatten(2, (-1, r)).transpose(1, 2)  # [out / r, in / r, r, r]
        wide = self.D.to(torch.promote_types(weight.dtype, torch.float32)).unsqueeze(1)
        return (blocks.to(wide.dtype) @ wide + wide).transpose(1, 2).reshape(weight.shape)


@dataclass(eq=False, kw_only=True)
class MiSS(LayerMethod):
    """Train one matrix for each chosen layer, which all shards of its input share.

    Args:
        r: size of a shard [features], which must divide the input of each layer; also the rank of the update.
        form: 'shards', or 'bat': r by r blocks of the weight, times and plus a matrix, for which r must divide the
            output of each layer, too.
        dropout: dropout rate on the input of the update.
    """

    r: int = natural(64)
    form: Literal["shards", "bat"] = "shards"
    dropout: float = rate(0.0)

    trains: ClassVar[str] = "one matrix for each layer, which shards of its input share"
    paper: ClassVar[str] = "Kang & Yin 2024, arXiv 2409.15371"
    advised: ClassVar[Rates] = Rates(2e-3, 1e-2, MEASURED, Rates(6e-3, 3e-2, DIGITS))
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout"}
    twin: ClassVar[Twin | None] = Twin(
        peft_type="MISS",
        tensors={"D": "miss_block"},
        arguments={"r": "r", "form": "init_weights", "dropout": "miss_dropout"},
        defaults={**LAYER_KEYS, "bias": "none", "mini_r": 1, "miss_dropout": 0.0, "r": 64},
        words={"form": (("shards", True), ("shards", False), ("bat", "bat"))},
    )

    def update(self, name: str, host: nn.Module) -> Shards | Blocks:
        """Return the shared matrix of a layer, or those of its blocks."""
        out, inside = shape_of(host)
        check_divides("r", self.r, inside, f"is the input of {name}", APART)
        if self.form == "shards":
            return Shards(host, self.r, self.dropout)
        check_divides("r", self.r, out, f"is the output of {name}", APART)
        return Blocks(host, self.r, self.dropout)


MiSSMixin = TunedBy[MiSS]
