"""Low-rank updates of layers that are no matrix products: embeddings and convolutions, as grafts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import structure
from lightning_peft.updates.factors import row_ratio
from lightning_peft.updates.low_rank import LowRank, Pair
from lightning_peft.updates.low_rank_init import Init, zero_update

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""Dimensions of the kernel -> the function."""


class LowRankEmbedding(LowRank):
    """Adds ``scale * B A[:, id]`` to the output of an embedding: A [r, num_embeddings], B [dim, r].

    An embedding that scales its rows scales the update alike.
    """

    splits: Mapping[int, Mapping[str, int]] = {}

    def reset_parameters(self, init: Init) -> None:
        """Set A to zero and draw B from N(0, 1), whatever the init, as the authors' code and PEFT do."""
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def added(self, x: Tensor, host: nn.Module, factors: Pair) -> Tensor:
        """Return ``A[:, x]ᵀ Bᵀ``, [..., dim]."""
        a, b = factors
        assert isinstance(host, nn.Embedding)
        padding = host.padding_idx  # its row has no gradient in the table either
        return F.linear(F.embedding(x, a.t(), padding), b) * structure.row_scale_of(host)

    def update(self) -> Tensor:
        """Return ``scale * (B A)ᵀ`` in fp32, [num_embeddings, dim]."""
        return super().update().t()


class LowRankConv(LowRank):
    """Adds ``scale * B * A * x`` (two convolutions): A [r, in, *kernel], B [out, r, 1 ...].

    The authors' code has A [r k, in k] and B [out / g k, r k] for a square kernel of size k, whose product is read as
    the kernel: of rank r k, and bound to how torch lays a kernel out. Ours are PEFT's, of rank r.

    Where the layer has g groups A still sees all channels and B has g groups, [out, r / g, 1 ...], as in HF PEFT. No
    grouped kernel does the same, so that it cannot be merged.
    """

    splits: Mapping[int, Mapping[str, int]] = {}
    rank_axes = (0, 1)

    def __init__(self, host: nn.Module, *how: Any) -> None:
        assert isinstance(host, CONVOLUTIONS)
        self.groups = host.groups
        super().__init__(host, *how)

    def matrix(self, weight: Tensor, host: nn.Module) -> Tensor:
        """Return the kernels as the rows of a matrix, [out, in * prod(kernel)]."""
        return weight.flatten(1)

    def shapes(self, shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A [r, in, *kernel] and B [out, r / g, 1 ...]."""
        out_channels, in_channels, *kernel = shape
        return (r, in_channels * self.groups, *kernel), (out_channels, r // self.groups, *[1] * len(kernel))

    def as_magnitude(self, norms: Tensor) -> Tensor:
        """Return norms [out] as [1, out, 1 ...]."""
        return self._along(norms)[None]

    def reset_parameters(self, init: Init) -> None:
        """Give A and B values whose product is zero."""
        zero_update(init, self.A, self.B, self.A[0].numel(), self.rank)

    def added(self, x: Tensor, host: nn.Module, factors: Pair) -> Tensor:
        """Return the convolution with A, at the host's stride, padding and dilation, and then with B."""
        assert isinstance(host, CONVOLUTIONS)
        a, b = (factor.to(x.dtype) for factor in factors)
        convolve = _CONVOLVE[a.dim() - 2]
        if self.groups == 1:
            return convolve(through(host, x, a), b)
        padding = host.padding
        if host.padding_mode != "zeros":
            x = F.pad(x, _sides(host), mode=host.padding_mode)
            padding = "valid"
        return convolve(convolve(x, a, None, host.stride, padding, host.dilation), b, groups=self.groups)

    def cannot_fold(self, host: nn.Module) -> str | None:
        """Say why no kernel of several groups can take in the update."""
        return None if self.groups == 1 else f"has {self.groups} groups, and the update is none of so many"

    def _along(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *[1] * (self.A.dim() - 2))

    def update(self) -> Tensor:
        """Return the kernel of the update in fp32, [out, in, *kernel]."""
        a, b = self.factors()
        return torch.mm(b.flatten(1), a.flatten(1)).view(-1, *a.shape[1:]) * self.scale

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return the kernel with the update."""
        value = value.add_(self.update())
        if self.m is None:
            return value
        return value.mul_(row_ratio(self.m.flatten(), value.flatten(1)).view(-1, *[1] * (value.dim() - 1)))


def through(host: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, kernel: Tensor) -> Tensor:
    """Return what a convolution would give with another kernel and without a bias."""
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/conv.py
    return host._conv_forward(x, kernel, None)


def _sides(host: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return how much a convolution pads each side, from the last dimension on, as ``F.pad`` takes it."""
    if isinstance(host.padding, str):
        sizes = zip(host.kernel_size, host.dilation, strict=True)
        whole = [0 if host.padding == "valid" else dilation * (size - 1) for size, dilation in sizes]
        return [side for total in reversed(whole) for side in (total // 2, total - total // 2)]
    return [size for size in reversed(host.padding) for _ in range(2)]


GRAFTS: dict[type[nn.Module], type[LowRank]] = {
    nn.Linear: LowRank,
    Conv1D: LowRank,
    nn.Embedding: LowRankEmbedding,
    nn.Conv1d: LowRankConv,
    nn.Conv2d: LowRankConv,
    nn.Conv3d: LowRankConv,
}
"""The layers that are called, and the graft for their output."""
