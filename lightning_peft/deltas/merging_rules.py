"""How several changes of a tensor become one: weighted sums, TIES, DARE, and low ranks of what comes out.

TIES: of each change the greatest entries are kept, the sign of each entry is that of the weighted sum, and the entries
of that sign are averaged by their weights. DARE: entries of each change are dropped at random, and the rest is divided
by the share that is kept. As in mergekit, what TIES averages is divided by the weights that took part.

Source: Yadav et al. 2023, arXiv 2306.01708; Yu et al. 2023, arXiv 2311.03099; https://github.com/arcee-ai/mergekit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]


@dataclass
class Rule:
    """How changes are combined.

    Attributes:
        how: the rule. Of low-rank updates, 'linear' takes the weighted means of A and the weighted sums of B, 'cat'
            puts the factors side by side, which is the exact sum, and the others make a new low rank of what comes out.
        r: rank of what comes out of 'svd', 'ties' and 'dare'; None: the greatest that goes in.
        density: the share of entries that 'ties' and 'dare' keep.
        seed: of what 'dare' drops.
    """

    how: How = "linear"
    r: int | None = None
    density: float = 1.0
    seed: int = 0
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise TuningError(f"how={self.how!r} is no way to combine deltas: take one of {', '.join(get_args(How))}.")
        if not 0 < self.density <= 1:
            raise TuningError(f"density={self.density} is no share of entries to keep: take more than 0 and at most 1.")
        if self.r is not None and self.r < 1:
            raise TuningError(f"r={self.r} is no rank: take 1 or more.")
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def is_sum(self) -> bool:
        """Whether it is a weighted sum, which needs no whole matrices."""
        return self.how in ("linear", "cat", "svd")

    def change(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Return one change for several of the same shape."""
        if self.how.startswith("dare"):
            changes = [self._dropped(change) for change in changes]
        if self.how == "ties":
            changes = [_greatest(change, self.density) for change in changes]
        weighted = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)])
        total = weighted.sum(0)
        if self.how not in ("ties", "dare_ties"):
            return total
        agrees = (weighted.sign() == total.sign()) & (weighted != 0)
        shares = torch.tensor(weights, dtype=total.dtype).view(-1, *(1 for _ in total.shape)).to(total.device)
        return (weighted * agrees).sum(0) / (shares * agrees).sum(0).where(agrees.any(0), torch.ones_like(total))

    def _dropped(self, change: Tensor) -> Tensor:
        kept = torch.rand(change.shape, generator=self.generator) < self.density
        return change * kept.to(change.device) / self.density


def side_by_side(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return factors A [..., R, in] and B [..., out, R] of ``sum of w B A``, R being the sum of the ranks."""
    a = torch.cat([a for a, _ in factors], -2)
    return a, torch.cat([weight * b for weight, (_, b) in zip(weights, factors, strict=True)], -1)


def of_rank(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors of rank r that are nearest to ``B A``, which is never built."""
    wide = torch.promote_types(a.dtype, torch.float64)
    left, small_b = torch.linalg.qr(b.to(wide))
    right, small_a = torch.linalg.qr(a.to(wide).mT)
    u, s, v = torch.linalg.svd(small_b @ small_a.mT, full_matrices=False)
    root = s[..., :r].sqrt()
    new_a = root.unsqueeze(-1) * (v[..., :r, :] @ right.mT)
    return _padded(new_a, r, -2).to(a.dtype), _padded(left @ u[..., :r] * root.unsqueeze(-2), r, -1).to(b.dtype)


def factors_of_rank(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors A [..., r, in] and B [..., out, r] that are nearest to a matrix [..., out, in]."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[..., :r].sqrt()
    return _padded(root.unsqueeze(-1) * v[..., :r, :], r, -2), _padded(u[..., :r] * root.unsqueeze(-2), r, -1)


def _padded(factor: Tensor, r: int, dim: int) -> Tensor:
    """Return a factor with zeros up to rank r."""
    missing = r - factor.shape[dim]
    if missing <= 0:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _greatest(change: Tensor, density: float) -> Tensor:
    """Return a change with the share of its greatest entries, and zeros elsewhere."""
    count = max(1, int(density * change.numel()))
    if count == change.numel():
        return change
    kept = change.abs().flatten().topk(count).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    mask[kept] = True
    return change * mask.view(change.shape)
