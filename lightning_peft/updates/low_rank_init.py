"""Initial values of the two matrices of a low-rank update."""

import math
from typing import Literal

import torch
from torch import Tensor

Init = Literal["kaiming", "gaussian", "pissa", "olora", "eva"]
OF_THE_WEIGHT = ("pissa", "olora")
"""The inits that take A and B from the weight, so that what is added at the start must be taken off again."""


@torch.no_grad()
def zero_update(kind: Init, a: Tensor, b: Tensor, fan_in: int, r: int) -> None:
    """Draw A and set B to zero.

    Args:
        kind: ``gaussian``: A from N(0, 1/r²), as in HF PEFT; else A from U(-1/sqrt(in), 1/sqrt(in)), which those of
            data replace.
        a: [..., r, in], of kernels [r, in, *kernel].
        b: [..., out, r], of kernels [out, r, 1 ...].
        fan_in: size of the input of A.
        r: rank of the update.
    """
    if kind == "gaussian":
        a.normal_(std=1 / r)
    else:
        a.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    b.zero_()


@torch.no_grad()
def factors_of(
    kind: Literal["pissa", "olora"], weight: Tensor, r: int, scale: float, iterations: int | None
) -> tuple[Tensor, Tensor]:
    """Return A [..., r, in] and B [..., out, r] taken from a weight [..., out, in].

    * ``pissa``: ``scale B A`` is the best approximation of rank r, ``U_r S_r V_rᵀ`` (Meng et al. 2024, arXiv
      2404.02948, section 3); with ``iterations``, by the randomised algorithm of that many power iterations.
    * ``olora``: ``B A = Q_r R_r``, the first columns and rows of the QR decomposition (Büyükakyüz 2024, arXiv
      2406.01775, section 3).
    """
    weight = weight.float()
    if kind == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[..., :r, :], q[..., :r]
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u, s, vt = u[..., :r], s[..., :r], vt[..., :r, :]
    else:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=iterations)
        vt = v.mT
    root = (s / scale).sqrt()
    return root.unsqueeze(-1) * vt, u * root.unsqueeze(-2)
