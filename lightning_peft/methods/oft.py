"""OFT: the input features of each layer are turned by an orthogonal matrix of blocks, ``h = W Rᵀ x``.

R has in / b blocks of b by b, each the Cayley transform ``(I - Q)(I + Q)⁻¹`` of a skew-symmetric Q, whose entries above
the diagonal are trained and zero at the start. Turning keeps the lengths of the rows of W and the angles between them,
and so their hyperspherical energy.

Source: Qiu et al. 2023, arXiv 2306.07280, section 4, which turns the output; Qiu et al. 2025 (OFTv2), arXiv 2506.19847,
section 4, which turns the input, so that a step multiplies vectors by matrices and no matrices by each other, and takes
the first terms of the Neumann series in place of the inverse (``use_cayley_neumann``), by which R is nearly orthogonal;
as in their code and in HF PEFT, Q has the other sign there.
What is computed is ``x + (R - I) x``, so that a small turn is not lost in the rounding of R.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.bases.layers import LayerMethod, check_divides
from lightning_peft.core.arguments import bounded
from lightning_peft.core.placement import device_of
from lightning_peft.core.twin import Twin
from lightning_peft.training.mixin import TunedBy
from lightning_peft.updates.in_place import without_autocast
from lightning_peft.updates.layer_update import LayerUpdate
from lightning_peft.updates.low_rank import shape_of


class Rotation(LayerUpdate):
    """Turns the input of a layer, block by block.

    Args:
        host: the layer.
        size: of a block, b [features].
        terms: of the Neumann series; None: the exact inverse.
    """

    above: Tensor

    def __init__(self, host: nn.Module, size: int, terms: int | None) -> None:
        super().__init__(host)
        self.size, self.terms = size, terms
        device = device_of(host)
        rows, columns = torch.triu_indices(size, size, 1, device=device)
        self.register_buffer("above", rows * size + columns, persistent=False)
        self.Q = nn.Parameter(torch.zeros(shape_of(host)[1] // size, size * (size - 1) // 2, device=device))

    def turn(self) -> Tensor:
        """Return ``R - I`` of each block, [in / b, b, b], by which rows of features are multiplied."""
        half = self.Q.new_zeros(len(self.Q), self.size**2).index_copy(1, self.above, self.Q)
        half = half.unflatten(1, (self.size, self.size))
        q = half - half.mT
        if self.terms is None:
            return -2 * torch.linalg.solve_ex(torch.eye(self.size, device=q.device) + q, q, left=False).result
        power, total = q, 2 * q
        for _ in range(2, self.terms - 1):
            power = power @ q
            total = total + 2 * power
        return total + power @ q

    def before(self, host: nn.Module, x: Tensor) -> Tensor:
        """Return the turned input, [..., in]."""
        return x if self.merged else self._turned(x).to(x.dtype)

    def changed(self, weight: Tensor) -> Tensor:
        """Return ``W Rᵀ``."""
        blocks = weight.unflatten(-1, (-1, self.size))
        return weight + torch.einsum("okc,kbc->okb", blocks, self.turn().to(weight.dtype)).flatten(-2)

    def _turned(self, x: Tensor) -> Tensor:
        with without_autocast(self.Q):
            blocks, turn = x.unflatten(-1, (-1, self.size)), self.turn()
            return x + torch.einsum("...kb,kbc->...kc", blocks, turn.to(x.dtype)).flatten(-2)


@dataclass(eq=False, kw_only=True)
class OFT(LayerMethod):
    """Train an orthogonal matrix of blocks for each chosen layer, by which its input is turned.

    Args:
        block_size: size b of a block [features], which must divide the input of each layer.
        use_cayley_neumann: invert by the first terms of a series, which is faster where blocks are large; the matrix is
            then orthogonal up to the rest of the series.
        num_cayley_neumann_terms: how many terms.
    """

    block_size: int = bounded(32, "is no size of a block", at_least=2)
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = bounded(5, at_least=4)

    trains: ClassVar[str] = "orthogonal matrices that turn the inputs of layers"
    paper: ClassVar[str] = "Qiu et al. 2023, arXiv 2306.07280; 2025, arXiv 2506.19847"
    twin: ClassVar[Twin | None] = Twin(
        peft_type="OFT",
        tensors={"Q": "oft_R.weight"},
        arguments={
            "block_size": "oft_block_size",
            "use_cayley_neumann": "use_cayley_neumann",
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
        },
        defaults={
            "bias": "none",
            "block_share": False,
            "coft": False,
            "eps": 6e-5,
            "exclude_modules": None,
            "fan_in_fan_out": False,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": 5,
            "oft_block_size": 32,
            "r": 0,
            "target_modules": None,
            "use_cayley_neumann": True,
        },
        free=frozenset({"eps", "init_weights"}),
    )

    def update(self, name: str, host: nn.Module) -> Rotation:
        """Return the turn of a layer's input."""
        check_divides("block_size", self.block_size, shape_of(host)[1], f"is the input of {name}")
        return Rotation(host, self.block_size, self.num_cayley_neumann_terms if self.use_cayley_neumann else None)


OFTMixin = TunedBy[OFT]
