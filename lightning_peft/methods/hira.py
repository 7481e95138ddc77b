"""HiRA: the frozen weight is multiplied, entry by entry, by a low-rank matrix: ``h = W x + (W ∘ (B A)) x``.

A [r, in] is drawn and B [out, r] is zero at the start. Since W has full rank, so may have the update, though it has the
parameters of a LoRA: rank(W ∘ B A) is up to rank(W) r.

Source: Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR
2025, section 3, https://openreview.net/forum?id=TwJrTz9cRS; there is no factor before the update.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.bases.layers import LayerMethod
from lightning_peft.core.arguments import choice, natural, rate
from lightning_peft.core.placement import device_of
from lightning_peft.core.quantized import dense
from lightning_peft.core.twin import Twin
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.layer_update import LayerUpdate
from lightning_peft.updates.low_rank import shape_of
from lightning_peft.updates.low_rank_init import zero_update

Init = Literal["kaiming", "gaussian"]


class Hadamard(LayerUpdate):
    """Adds ``(W ∘ (B A)) x`` to the output of a layer.

    Args:
        host: the layer.
        r: rank of B A.
        dropout: rate of the dropout on the input of the update.
        init: of A.
    """

    comes_first = True  # what is added before it is no part of the weight that it multiplies, but would be once folded

    def __init__(self, host: nn.Module, r: int, dropout: float, init: Init) -> None:
        super().__init__(host)
        out, inside = shape_of(host)
        self.dropout = dropout
        self.A = nn.Parameter(torch.empty(r, inside, device=device_of(host)))
        self.B = nn.Parameter(torch.empty(out, r, device=device_of(host)))
        zero_update(init, self.A, self.B, inside)

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the output with the update, [..., out], in whose dtype the sum is rounded."""
        if self.merged:
            return out
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        with without_autocast(self.A):
            factors = self.A.t() @ self.B.t() if self.transposed else self.B @ self.A  # in the layout of the weight
            change = (dense(host) * factors).to(x.dtype)
        return out + (x @ change if self.transposed else F.linear(x, change)).to(out.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W ∘ (1 + B A)``."""
        return weight * (1 + self.B @ self.A)

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for B."""
        return torch.zeros_like(self.B) if name == "B" else None


@dataclass(eq=False, kw_only=True)
class HiRA(LayerMethod):
    """Train a low-rank matrix for each chosen layer, by which its weight is multiplied entry by entry.

    Args:
        r: rank of that matrix; the update itself may have full rank.
        dropout: dropout rate on the input of the update.
        init: A at the start; B is zero.
    """

    r: int = natural(32)
    dropout: float = rate(0.0)
    init: Init = choice("kaiming", "is no initial value of A")

    trains: ClassVar[str] = "low-rank factors of the entries of weight matrices, an update of high rank"
    paper: ClassVar[str] = "Huang et al. 2025, ICLR"
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout", "init"}
    twin: ClassVar[Twin | None] = Twin(
        peft_type="HIRA",
        tensors={"A": "hira_A", "B": "hira_B"},
        arguments={"r": "r", "dropout": "hira_dropout"},
        defaults={
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "hira_dropout": 0.0,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "r": 32,
            "rank_pattern": {},
            "target_modules": None,
        },
        free=frozenset({"init_weights"}),
        kinds=(nn.Linear, Conv1D),
    )

    def update(self, name: str, host: nn.Module) -> Hadamard:
        """Return the factors of a layer."""
        return Hadamard(host, self.r, self.dropout, self.init)


HiRAMixin = TunedBy[HiRA]
