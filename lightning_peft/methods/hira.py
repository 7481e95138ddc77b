"""HiRA: the frozen weight is multiplied, entry by entry, by a low-rank matrix: ``h = W x + (W ∘ (B A)) x``.

A [r, in] is drawn and B [out, r] is zero at the start. Since W has full rank, so may have the update, though it has the
parameters of a LoRA: rank(W ∘ B A) is up to rank(W) r.

Where they are named, the rows of an embedding and the kernels of a convolution are multiplied in the same way: a row is
a column of the matrix, as in HF PEFT, and a kernel a row of its entries.

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
from lightning_peft.core import structure
from lightning_peft.core.arguments import choice, natural, rate
from lightning_peft.core.placement import device_of
from lightning_peft.core.quantized import dense
from lightning_peft.core.rates import DIGITS, MEASURED, Rates
from lightning_peft.core.twin import LAYER_KEYS, Twin
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.layer_update import LINEAR, AddedUpdate
from lightning_peft.updates.low_rank import shape_of
from lightning_peft.updates.low_rank_init import zero_update
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS, through

Init = Literal["kaiming", "gaussian"]


class Hadamard(AddedUpdate):
    """Adds ``(W ∘ (B A)) x`` to the output of a layer.

    Args:
        host: the layer.
        r: rank of B A.
        dropout: rate of the dropout on the input of the update.
        init: of A.
    """

    comes_first = True  # what is added before it is no part of the weight that it multiplies, but would be once folded
    zero = frozenset({"B"})

    def __init__(self, host: nn.Module, r: int, dropout: float, init: Init) -> None:
        super().__init__(host, dropout)
        out, inside, *kernel = shape_of(host)
        self.A = nn.Parameter(torch.empty(r, inside, *kernel, device=device_of(host)))
        self.B = nn.Parameter(torch.empty(out, r, *[1] * len(kernel), device=device_of(host)))
        self.reset_parameters(init)

    def reset_parameters(self, init: Init) -> None:
        """Draw A and set B to zero."""
        zero_update(init, self.A, self.B, self.A[0].numel(), len(self.A))

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return ``(W ∘ (B A)) x``, [..., out]."""
        with without_autocast(self.A):
            factors = self.A.t() @ self.B.t() if self.transposed else self.B @ self.A  # in the layout of the weight
            change = (dense(host) * factors).to(x.dtype)
        return x @ change if self.transposed else F.linear(x, change)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W ∘ (1 + B A)``."""
        return weight * (1 + self.B @ self.A)


class HadamardConv(Hadamard):
    """Adds the convolution with ``W ∘ (B A)``: A [r, in, *kernel], B [out, r, 1 ...]."""

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the convolution of x, [..., out, *space]."""
        assert isinstance(host, CONVOLUTIONS)
        with without_autocast(self.A):
            change = (host.weight * self._factors()).to(x.dtype)
        return through(host, x, change)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the kernels ``W ∘ (1 + B A)``."""
        return weight * (1 + self._factors())

    def _factors(self) -> Tensor:
        """Return ``B A``, [out, in, *kernel]."""
        return (self.B.flatten(1) @ self.A.flatten(1)).unflatten(1, self.A.shape[1:])


class HadamardEmbedding(Hadamard):
    """Multiplies the row of each id by ``1 + B A[:, id]``: A [r, num_embeddings], B [dim, r]."""

    def reset_parameters(self, init: Init) -> None:
        """Set A to zero and draw B from N(0, 1), whatever the init, as in HF PEFT."""
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def added(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return what is added to the rows, [..., dim]."""
        with without_autocast(self.A):
            return out * F.linear(F.embedding(x, self.A.t()), self.B)  # also where the table scales what it gives

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the table as [dim, num_embeddings], and back."""
        return weight.t()


def _differs(host: nn.Module) -> str | None:
    """Say why HF PEFT would compute something else for a layer."""
    if isinstance(host, nn.Embedding) and structure.row_scale_of(host) != 1:
        return "scales its rows, and PEFT leaves the update as it is"
    if isinstance(host, CONVOLUTIONS) and host.groups > 1:
        return f"has {host.groups} groups, and PEFT has it of one alone"
    if isinstance(host, CONVOLUTIONS) and host.padding_mode != "zeros" and set(host.padding) != {0}:
        return f"pads by {host.padding_mode!r}, and PEFT pads the update by zeros until it is merged"
    return None


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

    hosts: ClassVar[tuple[type[nn.Module], ...]] = (*LINEAR, nn.Embedding, *CONVOLUTIONS)
    trains: ClassVar[str] = "low-rank factors of the entries of weight matrices, an update of high rank"
    paper: ClassVar[str] = "Huang et al. 2025, ICLR"
    advised: ClassVar[Rates] = Rates(2e-2, 1e-1, MEASURED, Rates(6e-2, 3e-1, DIGITS))
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout", "init"}
    twin: ClassVar[Twin | None] = Twin(
        peft_type="HIRA",
        tensors={"A": "hira_A", "B": "hira_B"},
        arguments={"r": "r", "dropout": "hira_dropout"},
        defaults={**LAYER_KEYS, "fan_in_fan_out": False, "hira_dropout": 0.0, "r": 32, "rank_pattern": {}},
        free=frozenset({"init_weights"}),
        kinds=(nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS),
        parts={nn.Embedding: {"A": "hira_embedding_A", "B": "hira_embedding_B"}},
        differs=_differs,
    )

    def update(self, name: str, host: nn.Module) -> Hadamard:
        """Return the factors of a layer."""
        graft = Hadamard
        if isinstance(host, nn.Embedding):
            graft = HadamardEmbedding
        elif isinstance(host, CONVOLUTIONS):
            graft = HadamardConv
        return graft(host, self.r, self.dropout, self.init)


HiRAMixin = TunedBy[HiRA]
