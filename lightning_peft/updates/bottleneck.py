"""Bottleneck networks, ``s (U act(D x + b1) + b2)``, as grafts that add them to what goes through their host.

The sum is made by two autograd functions, with the activation between them: the products have the bottleneck as their
leading dimension, and what is added, in the sum and in the gradient of x, is added by a product. Their backward passes
are sums of products of what is saved and so have gradients of their own. Plain operations give the same where functions
do not serve: see `Bottleneck.is_lean`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightning_peft.graft import Graft
from lightning_peft.updates.in_place import is_eager


class Bottleneck(Graft):
    """Computes ``s (U act(D x + b1) + b2)``: ``down`` is D [m, d] with b1, ``up`` is U [d, m] with b2.

    Args:
        host: the module that it is to be attached to.
        width: size d of what it reads and writes.
        size: size m of the bottleneck.
        activation: name of the activation.
        std: standard deviation of D, and of U unless ``zero_up``.
        zero_up: start U at zero.
        scale: the factor s.
    """

    def __init__(
        self, host: nn.Module, width: int, size: int, activation: str, std: float, zero_up: bool, scale: float
    ) -> None:
        super().__init__()
        weight = next(host.parameters())
        self.down = nn.Linear(width, size, device=weight.device)
        self.up = nn.Linear(size, width, device=weight.device)
        self.down.float()
        self.up.float()
        self.activation = ACT2FN[activation]
        self.scale = scale
        for layer, zero in ((self.down, False), (self.up, zero_up)):
            nn.init.zeros_(layer.bias)
            if zero:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)

    def update(self, x: Tensor) -> Tensor:
        """Return ``s (U act(D x + b1) + b2)``, of the shape and dtype of ``x``, [..., d]."""
        d, b1, u, b2 = self._parameters_as(x)
        out = F.linear(self.activation(F.linear(x, d, b1)), u, b2).to(x.dtype)
        return out if self.scale == 1 else out * self.scale

    def added(self, base: Tensor, x: Tensor) -> Tensor:
        """Return ``base + update(x)``, of the shape and dtype of ``base``; x, of the same shape, may be ``base``."""
        if not self.is_lean(base, x):
            return base + self.update(x).to(base.dtype)
        d, b1, u, b2 = self._parameters_as(x)
        hidden, through = _Down.apply(x, d, b1)
        return _Up.apply(through if base is x else base, self.activation(hidden), u, b2, self.scale)

    def is_lean(self, base: Tensor, x: Tensor) -> bool:
        """Tell whether autograd functions may compute the sum.

        Not under compile and autocast, nor on the meta device, for subclasses of tensors and the transforms of
        ``torch.func``.
        """
        return (
            is_eager(self.down.weight)
            and type(base) is type(x) is Tensor
            and base.dtype == x.dtype
            and base.shape == x.shape
            and not x.is_meta
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _parameters_as(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D, b1, U and b2 in the dtype of ``x``."""
        down, up = self.down, self.up
        return down.weight.to(x.dtype), down.bias.to(x.dtype), up.weight.to(x.dtype), up.bias.to(x.dtype)


class Serial(Bottleneck):
    """Adds the update of the host's output to it."""

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``out + update(out)``."""
        return self.added(out, out)


class AroundNorm(Bottleneck):
    """Norms twice: ``LN(x + update(LN(x)))``; the host is the norm after a residual sum."""

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of its input and of the update of the normed input."""
        x = args[0] if args else kwargs["input"]
        return forward(self.added(x, forward(x)))


class Parallel(Bottleneck):
    """Adds the update of the host's input to its output; the host is a whole feed-forward sublayer."""

    def after(self, out: Tensor, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``out + update(x)``."""
        return self.added(out, x)


class ParallelResidual(Bottleneck):
    """Adds the update of the residual to it; the host computes ``LN(dense(h) + residual)`` of what the sublayer read.

    In blocks like BERT's the sublayer's input reaches its end as the residual, so that this is the parallel adapter.
    """

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        self.names = list(inspect.signature(type(host).forward).parameters)[1:]

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the host gives for the residual and its update."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        residual = given[self.names[1]]
        return forward(**(given | {self.names[1]: self.added(residual, residual)}))


class _Down(torch.autograd.Function):
    """``D xᵀ + b1`` [m, n], and x itself for what its update is added to, so that the gradients of both are one sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, d)
        ctx.set_materialize_grads(False)
        return torch.addmm(b1[:, None], d, _rows(x).t()), x.detach()  # detached, as in `in_place`: no view

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        x, d = ctx.saved_tensors
        needs_x, needs_d, needs_b1 = ctx.needs_input_grad
        if grad is None:
            return through, None, None
        grad_x = None
        if needs_x:
            grad_x = torch.mm(grad.t(), d) if through is None else torch.addmm(_rows(through), grad.t(), d)
            grad_x = grad_x.view(x.shape)
        return grad_x, torch.mm(grad, _rows(x)) if needs_d else None, grad.sum(1) if needs_b1 else None


class _Up(torch.autograd.Function):
    """``base + scale (hᵀ Uᵀ + b2)`` for h [m, n]."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, h: Tensor, u: Tensor, b2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, u)
        ctx.scale = scale
        out = torch.add(base, b2, alpha=scale).contiguous()
        out.view(-1, out.shape[-1]).addmm_(h.t(), u.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, u = ctx.saved_tensors
        needs_base, needs_h, needs_u, needs_b2, _ = ctx.needs_input_grad
        rows, scale = _rows(grad), ctx.scale
        grad_h = _scaled(torch.mm(u.t(), rows.t()), scale) if needs_h else None
        grad_u = _scaled(torch.mm(h, rows), scale).t() if needs_u else None
        grad_b2 = _scaled(rows.sum(0), scale) if needs_b2 else None
        return grad if needs_base else None, grad_h, grad_u, grad_b2, None


def _rows(x: Tensor) -> Tensor:
    """Return [..., d] as [n, d]."""
    return x.reshape(-1, x.shape[-1])


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)
