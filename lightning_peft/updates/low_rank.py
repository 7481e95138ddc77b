"""Low-rank updates of weight matrices, ``W + s B A``, and of their directions alone (DoRA), as grafts.

``DoRA``: ``W' = m ∘ V / ‖V‖`` with ``V = W + s B A``, the norm taken over the inputs of each output and, as in section
4.3 of the paper, as a constant of the gradient.

An update that starts from factors of the weight (PiSSA, OLoRA) leaves that weight alone: it is ``s (B A - B₀ A₀)``,
computed as ``s ((B - B₀) A + B₀ (A - A₀))``, so that it is zero at the start bit for bit.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import placement, structure
from lightning_peft.core.folding import Folding
from lightning_peft.core.placement import device_of
from lightning_peft.core.quantized import dense
from lightning_peft.core.sharded import is_part, joined, summed, whole
from lightning_peft.updates import in_place
from lightning_peft.updates.factors import Factors, row_ratio
from lightning_peft.updates.low_rank_init import OF_THE_WEIGHT, Init

Pair = tuple[Tensor, Tensor]
"""A and B."""


class LowRank(Factors, Folding):
    """Adds ``scale * B A x`` to the output of a linear layer, or of GPT-2's Conv1D; rescales it, with DoRA.

    Args:
        host: the layer, of weight [out, in] (Conv1D: [in, out]), quantised or not.
        r: rank of the update.
        alpha: scale of the update before the division by r.
        dropout: rate of the dropout on the input of A.
        use_rslora: divide alpha by sqrt(r) instead of r.
        use_dora: train a magnitude of each output too.
        init: initial values of A and B.
        iterations: of a randomised singular value decomposition; None: the exact one.
        keeps_output: whether DoRA may keep the layer's output for the backward pass, which then nobody may overwrite.
    """

    splits: Mapping[int, Mapping[str, int]] = {0: {"B": 0, "B0": 0, "m": 0}, 1: {"A": 1, "A0": 1}}

    def __init__(
        self,
        host: nn.Module,
        r: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        use_dora: bool = False,
        init: Init = "kaiming",
        iterations: int | None = None,
        keeps_output: bool = True,
    ) -> None:
        scale = alpha / (math.sqrt(r) if use_rslora else r)
        how = (r, scale, use_dora, init, iterations)
        if use_dora or init in OF_THE_WEIGHT:
            placement.check_readable(host, "use_dora=True" if use_dora else f"init={init!r}")
        super().__init__(lambda: self.matrix(whole(dense(host)), host), shape_of(host), device_of(host), *how)
        self.dropout = dropout
        self.keeps_output = keeps_output
        self.comes_first = use_dora

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for B, and the norms of the rows of the weight for m."""
        return self.neutral_of(name, self.matrix(whole(dense(host)), host))

    def matrix(self, weight: Tensor, host: nn.Module) -> Tensor:
        """Return the weight of the host as [out, in], a view of it."""
        return weight.t() if isinstance(host, (Conv1D, nn.Embedding)) else weight

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the output with the update, of the shape and dtype of ``out``, [..., out].

        * LoRA: ``out + s (x Aᵀ) Bᵀ``;
        * DoRA: ``b + c (out - b + s (x Aᵀ) Bᵀ)``, ``c = m / ‖W + s B A‖``, b the bias;
        * DoRA with dropout: ``out + (c - 1) x W + c s (x Aᵀ) Bᵀ`` for the dropped x, as in the authors' code.
        """
        if self.merged:
            return out
        factors = a, _ = self.factors()
        if is_part(a) and not is_part(out):  # the layer is split between ranks, whose parts torch keeps account of
            parts: Any = joined(out, (*x.shape[:-1], shape_of(host)[0]), a.device_mesh)  # type: ignore[attr-defined]
            changed: Any = self.after(parts, host, x)
            return changed.redistribute(placements=parts.placements).to_local()
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            if self.use_dora:
                return self._dropped(out, host, x, factors)
        free = out.dtype is x.dtype and in_place.is_free(out, host, self, a)
        if free:
            out = in_place.add_low_rank(out, x, *factors, self.scale)
        else:
            out = torch.add(out, self.added(x, host, factors).to(out.dtype), alpha=self.scale)
        return self._rescaled(out, host, free) if self.use_dora else out

    def added(self, x: Tensor, host: nn.Module, factors: Pair) -> Tensor:
        """Return ``(x Aᵀ) Bᵀ``, before the scale, in the dtype of x."""
        a, b = factors
        return F.linear(summed(F.linear(x, a.to(x.dtype))), b.to(x.dtype))

    def _rescaled(self, out: Tensor, host: nn.Module, free: bool) -> Tensor:
        """Return ``b + c (out - b)``."""
        assert self.m is not None
        bias: Tensor | None = structure.bias_of(host)
        if free and torch.is_grad_enabled() and self.keeps_output:
            return in_place.rescale(out, bias, self.m, self.norm(self.matrix(dense(host), host), keep=True))
        ratio = self._ratio(host)
        if free and not torch.is_grad_enabled():
            return in_place.scale_(out, bias, ratio)
        scaled = out * ratio
        return (scaled if bias is None else scaled + self._along(bias * (1 - ratio.flatten()))).to(out.dtype)

    def _dropped(self, out: Tensor, host: nn.Module, x: Tensor, factors: Pair) -> Tensor:
        bias: Tensor | None = structure.bias_of(host)
        ratio = self._ratio(host)
        base = type(host).forward(host, x)
        base = base if bias is None else base - self._along(bias)
        change = (ratio - 1) * base + ratio * (self.scale * self.added(x, host, factors))
        return out + change.to(out.dtype)

    def _ratio(self, host: nn.Module) -> Tensor:
        """Return ``m / ‖W + s B A‖``, in the shape of m; at inference, what was computed before."""
        eager = in_place.is_eager(self.A)

        def compute() -> Tensor:
            assert self.m is not None
            return self.m / self.as_magnitude(self.norm(self.matrix(dense(host), host), keep=eager))

        if self.training or torch.is_grad_enabled() or not eager:
            return compute()
        return self.kept("ratio", (self.A, self.B, self.m, host.weight), compute)  # type: ignore[arg-type]

    def _along(self, bias: Tensor) -> Tensor:
        """Return a bias [out] in a shape that the output broadcasts."""
        return bias

    def update(self) -> Tensor:
        """Return ``scale * B A`` in fp32, in the layout [out, in]."""
        a, b = self.factors()
        return b @ a * self.scale

    def fold(self, name: str, value: Tensor, host: nn.Module) -> Tensor:
        """Return ``W + s B A``, with DoRA each output of it at its magnitude, in the layout of the weight."""
        a, b = (factor.to(value.dtype) for factor in self.factors())
        # In the layout of the weight, and with no B A beside it; Conv1D and Embedding have [in, out].
        left, right = (a.t(), b.t()) if isinstance(host, (Conv1D, nn.Embedding)) else (b, a)
        value = value.addmm_(left, right, alpha=self.scale)
        if self.m is not None:
            matrix = self.matrix(value, host)
            matrix.mul_(row_ratio(self.m, matrix))
        return value


def shape_of(host: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight as [out, in, ...]; that of a quantised one may be packed."""
    if isinstance(host, nn.Linear):
        return host.out_features, host.in_features
    weight: Tensor = host.weight  # type: ignore[assignment]
    shape = tuple(weight.shape)
    return tuple(reversed(shape)) if isinstance(host, (Conv1D, nn.Embedding)) else shape
