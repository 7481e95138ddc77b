"""Orthogonal matrices: by the Cayley transform, by the QR decomposition, and beside rows that are there."""

import torch
from torch import Tensor


def above_diagonal(size: int, device: torch.device | str | None = None) -> Tensor:
    """Return where the entries above the diagonal of a matrix [size, size] are in its flat form.

    >>> above_diagonal(3)
    tensor([1, 2, 5])
    """
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    return rows * size + columns


def cayley_step(entries: Tensor, places: Tensor, size: int, terms: int | None = None) -> Tensor:
    """Return ``R - I`` of ``R = (I - Q)(I + Q)⁻¹`` for skew-symmetric Q, [N, size, size].

    Args:
        entries: of Q above its diagonal, [N, size (size - 1) / 2].
        places: of these entries, from `above_diagonal`.
        size: of a matrix.
        terms: of the Neumann series, for ``-Q``, by which R is nearly orthogonal; None: the inverse.
    """
    half = entries.new_zeros(len(entries), size**2).index_copy(1, places, entries).unflatten(1, (size, size))
    q = half - half.mT
    if terms is None:
        return -2 * torch.linalg.solve_ex(torch.eye(size, device=q.device) + q, q, left=False).result
    power, total = q, 2 * q
    for _ in range(2, terms - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def orthonormal(rows: Tensor) -> Tensor:
    """Return the Q factor of rows [..., r, d], r <= d, with the signs for which orthonormal rows are their own."""
    q, upper = torch.linalg.qr(rows.mT)
    return (q * torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)).mT


def rows_beside(others: Tensor, count: int) -> Tensor:
    """Draw orthonormal rows that are orthogonal to all rows of ``others`` [N, d], [count, d]."""
    basis = torch.linalg.qr(others.t().float()).Q
    rows = torch.randn(count, others.shape[1], device=others.device)
    for _ in range(2):  # once more for what rounding leaves
        rows = torch.linalg.qr((rows - rows @ basis @ basis.t()).t()).Q.t()
    return rows.to(others.dtype)
