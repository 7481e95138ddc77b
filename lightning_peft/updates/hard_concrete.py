"""Hard-concrete gates: stochastic masks that are often exactly 0 or 1 and have a gradient in between.

``u ~ U(0, 1)``, ``s = sigmoid(log u - log(1 - u) + alpha)``, ``z = min(1, max(0, s (r - l) + l))``; so
``P(z > 0) = sigmoid(alpha - log(-l / r))`` and ``P(z = 1) = sigmoid(alpha - logit((1 - l) / (r - l)))``.

Source: Louizos et al. 2018, arXiv 1712.01312, section 2.3. Where nothing is drawn, ``s = sigmoid(alpha)``, as there.

A gate has as many entries as the weight that it masks. The functions here save the parameters alone for backward, which
are there anyway: the noise is a function of a seed and drawn again, and what follows from it is computed again.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EDGE = 1e-4
"""How near to 0 and 1 the noise may come; the authors' code has the same."""


def probability_open(alpha: Tensor, low: float, high: float) -> Tensor:
    """Return ``P(z > 0) = sigmoid(alpha - log(-low / high))``."""
    return torch.sigmoid(alpha - math.log(-low / high))


def uniform(like: Tensor, seed: int) -> Tensor:
    """Return noise of U(1e-4, 1 - 1e-4) in the shape of ``like``, the same for the same seed on one kind of device."""
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return noise.clamp_(_EDGE, 1 - _EDGE)


@torch.library.custom_op("lightning_peft::uniform", mutates_args=())
def uniform_op(like: Tensor, seed: Tensor, index: int) -> Tensor:
    """Return `uniform` noise where a graph is compiled, which must not see the seed as a number."""
    return uniform(like, seed_of(int(seed.item()), index))


@uniform_op.register_fake
def _(like: Tensor, seed: Tensor, index: int) -> Tensor:  # noqa: ARG001 (the operator's arguments)
    return torch.empty(like.shape, device=like.device, dtype=torch.float32)


def seed_of(seed: int, index: int) -> int:
    """Return a seed for the noise of one of many tensors."""
    return (seed + index * 2654435761) % 2**32


def gate(alpha: Tensor, noise: Tensor | None, low: float, high: float) -> Tensor:
    """Return z; ``noise`` may be written to, None: nothing is random."""
    return _stretched(_concrete(alpha, noise), low, high).clamp_(0, 1)


class Masked(torch.autograd.Function):
    """``base + z(alpha) z(group) w``, of the dtype of ``base``; group [1] is one gate for the whole tensor, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        w: Tensor,
        alpha: Tensor,
        group: Tensor | None,
        seed: int | None,
        low: float,
        high: float,
    ) -> Tensor:
        """Draw the gates and return the sum, in one new buffer."""
        ctx.save_for_backward(w, alpha, group)
        ctx.seed, ctx.low, ctx.high = seed, low, high
        value = gate(alpha, _noise(alpha, seed, 0), low, high).mul_(w)
        if group is not None:
            value.mul_(gate(group, _noise(group, seed, 1), low, high))
        return value.add_(base).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; what is needed for them is computed again."""
        w, alpha, group = ctx.saved_tensors
        low, high = ctx.low, ctx.high
        s = _concrete(alpha, _noise(alpha, ctx.seed, 0))
        z = _stretched(s.clone(), low, high)
        slope = s.mul_(1 - s).mul_(high - low).mul_((z > 0) & (z < 1))  # dz / dalpha
        z.clamp_(0, 1)
        g = grad.to(w.dtype)
        grad_group, outer = None, None
        if group is not None:
            s_group = _concrete(group, _noise(group, ctx.seed, 1))
            outer = _stretched(s_group.clone(), low, high)
            inside = (outer > 0) & (outer < 1)
            outer.clamp_(0, 1)
            grad_group = (g * z * w).sum() * (high - low) * s_group * (1 - s_group) * inside
        grad_w, grad_alpha = z.mul_(g), slope.mul_(g).mul_(w)
        if outer is not None:
            grad_w, grad_alpha = grad_w.mul_(outer), grad_alpha.mul_(outer)
        return None, grad_w, grad_alpha, grad_group, None, None, None


class ExpectedCount(torch.autograd.Function):
    """``sum_i P(z_i > 0) P(z_group > 0)``, the expected number of entries that are not zero, [1]."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, group: Tensor | None, low: float, high: float) -> Tensor:
        """Return the sum."""
        ctx.save_for_backward(alpha, group)
        ctx.low, ctx.high = low, high
        count = probability_open(alpha, low, high).sum().reshape(1)
        return count if group is None else count * probability_open(group, low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; what is needed for them is computed again."""
        alpha, group = ctx.saved_tensors
        p = probability_open(alpha, ctx.low, ctx.high)
        count = p.sum()
        grad_alpha = p.mul_(1 - p).mul_(grad)
        if group is None:
            return grad_alpha, None, None, None
        outer = probability_open(group, ctx.low, ctx.high)
        return grad_alpha.mul_(outer), grad * count * outer * (1 - outer), None, None


class Scattered(torch.autograd.Function):
    """``base`` with ``values`` added at the flat ``indices``; only the indices are saved."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """Return the sum."""
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype
        return scatter(base, values, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; what is needed for them is computed again."""
        (indices,) = ctx.saved_tensors
        return None, grad.reshape(-1).index_select(0, indices).to(ctx.dtype), None


def scatter(base: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return ``base`` with ``values`` added at the flat ``indices``, added in fp32 and rounded once."""
    flat = base.reshape(-1)
    sums = (flat.index_select(0, indices).to(values.dtype) + values).to(base.dtype)
    return flat.index_copy(0, indices.long(), sums).view(base.shape)


def _noise(like: Tensor, seed: int | None, part: int) -> Tensor | None:
    return None if seed is None else uniform(like, seed_of(seed, part))


def _concrete(alpha: Tensor, noise: Tensor | None) -> Tensor:
    """Return s; ``noise`` may be written to."""
    return torch.sigmoid(alpha) if noise is None else noise.logit_().add_(alpha).sigmoid_()


def _stretched(s: Tensor, low: float, high: float) -> Tensor:
    return s.mul_(high - low).add_(low)
