"""OFT: the input features of each layer are turned by an orthogonal matrix of blocks, ``h = W Rᵀ x``.

R has in / b blocks of b by b, each the Cayley transform ``(I - Q)(I + Q)⁻¹`` of a skew-symmetric Q, whose entries above
the diagonal are trained and zero at the start. Turning keeps the lengths of the rows of W and the angles between them,
and so their hyperspherical energy.

Source: Qiu et al. 2023, arXiv 2306.07280, section 4, which turns the output; Qiu et al. 2025 (OFTv2), arXiv 2506.19847,
section 4, which turns the input, so that a step multiplies vectors by matrices and no matrices by each other, and takes
the first terms of the Neumann series in place of the inverse (``use_cayley_neumann``), by which R is nearly orthogonal;
as in their code and in HF PEFT, Q has the other sign there.
An embedding that is named has its rows turned, as in HF PEFT. With ``coft`` (constrained OFT, section 4) a Q of a norm
above ``eps / sqrt(blocks)`` is scaled to it before it is used and, in training, for good, as in HF PEFT.
What is computed is ``x + (R - I) x``, so that a small turn is not lost in the rounding of R.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.bases.layers import APART, LayerMethod
from lightning_peft.core.arguments import bounded, check_divides, natural, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.orthogonal import above_diagonal, cayley_step
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.twin import LAYER_KEYS, Twin
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.layer_update import LINEAR, LayerUpdate
from lightning_peft.updates.low_rank import shape_of


class Turn(LayerUpdate):
    """An orthogonal matrix of blocks.

    Args:
        host: the layer.
        size: of a block, b [features].
        terms: of the Neumann series; None: the exact inverse.
        count: how many blocks have a turn of their own; 1: all have the same.
        most: the greatest norm of Q; None: any.
    """

    above: Tensor

    def __init__(self, host: nn.Module, size: int, terms: int | None, count: int, most: float | None = None) -> None:
        super().__init__(host)
        self.size, self.terms, self.most = size, terms, most
        device = device_of(host)
        self.register_buffer("above", above_diagonal(size, device), persistent=False)
        self.Q = nn.Parameter(torch.zeros(count, size * (size - 1) // 2, device=device))

    def turn(self) -> Tensor:
        """Return ``R - I`` of each block, [in / b, b, b] or [1, b, b], by which rows of features are multiplied."""
        entries = self.Q if self.most is None else self._bounded(self.most)
        return cayley_step(entries, self.above, self.size, self.terms)

    def turned(self, x: Tensor, back: bool = False) -> Tensor:
        """Return rows of features that are turned, or turned by ``Rᵀ``, [..., in]."""
        with without_autocast(self.Q):
            blocks = x.unflatten(-1, (-1, self.size))
            turn = self.turn().to(x.dtype).expand(blocks.shape[-2], -1, -1)
            return x + torch.einsum("...kb,kbc->...kc", blocks, turn.mT if back else turn).flatten(-2)

    def _bounded(self, most: float) -> Tensor:
        """Return the entries of Q scaled to a norm of ``most`` where they have more, in training for good."""
        trains = torch.is_grad_enabled() and self.Q.requires_grad
        with torch.no_grad():
            norm = 2**0.5 * torch.linalg.vector_norm(self.Q, dim=1, keepdim=True)  # each entry stands in Q twice
            share = (most / norm).clamp(max=1)
            if not trains:
                return self.Q * share
            self.Q.mul_(share)
        return self.Q


class Rotation(Turn):
    """Turns the input of a layer."""

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return the turned input, [..., in]."""
        return x if self.merged else self.turned(x).to(x.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W Rᵀ``."""
        return self.turned(weight, back=True)


class RowRotation(Turn):
    """Turns the rows of an embedding."""

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the turned rows, [..., dim]."""
        return out if self.merged else self.turned(out).to(out.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the table with its rows turned, ``W R``."""
        return self.turned(weight)


_KEYS = {
    **LAYER_KEYS, "bias": "none", "block_share": False, "coft": False, "eps": 6e-5, "fan_in_fan_out": False,
    "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "oft_block_size": 32, "r": 0, "use_cayley_neumann": True,
}  # fmt: skip
"""What HF PEFT writes, with its defaults."""
_SAME = ("block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms")
"""Arguments that HF PEFT calls the same."""


@dataclass(eq=False, kw_only=True)
class OFT(LayerMethod):
    """Train an orthogonal matrix of blocks for each chosen layer, by which its input is turned.

    Args:
        block_size: size b of a block [features], which must divide the input of each layer; None: what num_blocks says.
        num_blocks: how many blocks each layer has, which must divide its input; None: what block_size says.
        block_share: whether the blocks of a layer have one turn together.
        coft: whether Q is kept small, so that nothing turns far.
        eps: how small.
        use_cayley_neumann: invert by the first terms of a series, which is faster where blocks are large; the matrix is
            then orthogonal up to the rest of the series.
        num_cayley_neumann_terms: how many terms.
    """

    block_size: int | None = bounded(32, "is no size of a block", at_least=2)
    num_blocks: int | None = natural(None)
    block_share: bool = False
    coft: bool = False
    eps: float = positive(6e-5)
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = bounded(5, at_least=4)

    hosts: ClassVar[tuple[type[nn.Module], ...]] = (*LINEAR, nn.Embedding)
    trains: ClassVar[str] = "orthogonal matrices that turn the inputs of layers"
    paper: ClassVar[str] = "Qiu et al. 2023, arXiv 2306.07280; 2025, arXiv 2506.19847"
    advised: ClassVar[Rates] = Rates(6e-3, 3e-2, MEASURED)
    twin: ClassVar[Twin | None] = Twin(
        peft_type="OFT",
        tensors={"Q": "oft_R.weight"},
        parts={nn.Embedding: {"Q": "oft_embedding_R.weight"}},
        kinds=(nn.Linear, nn.Embedding),
        words={"block_size": ((None, 0),), "num_blocks": ((None, 0),)},
        arguments={"block_size": "oft_block_size", "num_blocks": "r", **{name: name for name in _SAME}},
        defaults=_KEYS,
        free=frozenset({"init_weights", "module_dropout"}),  # PEFT 0.21 drops no block
    )

    def update(self, name: str, host: nn.Module) -> Turn:
        """Return the turn of a layer's input, or of the rows of an embedding."""
        embeds = isinstance(host, nn.Embedding)
        width = shape_of(host)[0 if embeds else 1]
        size = self._size(width, f"is the {'width' if embeds else 'input'} of {name}")
        count = 1 if self.block_share else width // size
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        return (RowRotation if embeds else Rotation)(
            host, size, terms, count, self.eps / count**0.5 if self.coft else None
        )

    def _size(self, width: int, whose: str) -> int:
        """Return the size of a block of so many features."""
        if (self.block_size is None) is (self.num_blocks is None):
            raise TuningError(
                f"block_size={self.block_size} and num_blocks={self.num_blocks} say how large a block is: give one of "
                "them, and None for the other."
            )
        if self.block_size is not None:
            check_divides("block_size", self.block_size, width, whose, APART, least=2)
            return self.block_size
        assert self.num_blocks is not None
        check_divides("num_blocks", self.num_blocks, width, whose, APART)
        return width // self.num_blocks


OFTMixin = TunedBy[OFT]
