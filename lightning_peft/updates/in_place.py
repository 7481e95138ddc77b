"""Adds updates in place to the output of a linear layer, with gradients that save as little as possible.

A frozen linear layer does not need its own output, so a graft that comes first may add to that buffer, or scale it,
instead of making others. Elsewhere plain operations give the same (`is_free` tells): under a tracer and autocast, for
subclasses of tensors, and for outputs that somebody else has seen.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core.graft import Graft
from lightning_peft.core.sharded import PLAIN
from lightning_peft.core.tracing import is_traced

_LAYERS = frozenset((nn.Linear, Conv1D))


def is_free(out: Tensor, host: nn.Module, graft: Graft, parameter: Tensor) -> bool:
    """Tell whether ``graft`` may write into ``out``, which must be the work of a layer that does not need it.

    Plain operations are for what others have seen before (hooks, a subclass, a patched ``forward``), and for what an
    autograd function does not cover: tracers, autocast, tensor subclasses, the transforms of ``torch.func``.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/rnn.py asks for autocast likewise: at a fifth of
    the time of ``is_autocast_enabled`` of the output's device.
    """
    return (
        is_eager(parameter)
        and type(host) in _LAYERS
        and "forward" not in vars(host)
        and graft.is_first(host)
        and type(out) is Tensor
        and not out.is_meta
        and out.is_contiguous()
        and not torch._C._is_any_autocast_enabled()
    )


def is_eager(parameter: Tensor) -> bool:
    """Tell whether operations run one by one on plain tensors: no tracer, no subclass, no transform of torch.func.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_functorch/autograd_function.py asks for the last likewise.
    """
    plain = type(parameter) in PLAIN  # a parameter of a subclass is of that class
    return plain and not is_traced() and not torch._C._are_functorch_transforms_active()


def as_plain_tensors() -> AbstractContextManager[Any]:
    """Return a context in which subclasses of tensors are plain ones, as ``Tensor.__torch_function__`` itself has it.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_tensor.py
    """
    return torch._C.DisableTorchFunctionSubclass()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations on tensors like this one keep their dtypes."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``out + scale (x aᵀ) bᵀ`` in the buffer of ``out``, in whose dtype a [r, in] and b [out, r] are used."""
    if torch.is_grad_enabled():
        return _add_low_rank(out, x, a, b, scale)
    if not a.dtype is out.dtype is b.dtype:  # a cast to the same dtype costs the host as much as this product
        a, b = a.to(out.dtype), b.to(out.dtype)
    _add(out, x, a, b, scale)
    return out


def rescale(out: Tensor, bias: Tensor | None, m: Tensor, norm: Tensor | None) -> Tensor:
    """Return ``bias + (m / norm) (out - bias)`` in the buffer of ``out`` [..., out].

    Args:
        out: the output of a layer.
        bias: what of the output is not to be scaled; None: all is.
        m: fp32, [out].
        norm: taken as a constant; None: 1.
    """
    if torch.is_grad_enabled():
        return _Rescale.apply(out, bias, m, norm)
    return scale_(out, bias, m if norm is None else m / norm)


def scale_(out: Tensor, bias: Tensor | None, ratio: Tensor) -> Tensor:
    """Do ``out = bias + ratio (out - bias)``, without a gradient; where the ratio is 1, to the last bit."""
    if bias is None:
        return out.mul_(ratio)
    shift = bias * (1 - ratio)
    if out.dtype == ratio.dtype == shift.dtype:
        return torch.addcmul(shift, out, ratio, out=out)
    # In half precision the operands stay fp32: rounded, a ratio near 1 would lose most of what was learnt.
    return out.copy_(shift + out * ratio)


def _add(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Do ``out += scale (x aᵀ) bᵀ`` and return ``x aᵀ``, [n, r]."""
    rows = _rows(x)
    u = F.linear(a, rows).t() if _rank_leads(rows, len(a)) else F.linear(rows, a)
    _rows(out).addmm_(u, b.t(), alpha=scale)
    return u


def _product(wide: Tensor, narrow: Tensor, scale: float, like: Tensor, rank_leads: bool) -> Tensor:
    """Return ``scale wide narrow``, [n, k] times [k, r], of the shape of ``like``."""
    # With beta=0 the first argument is not read: it says the shape of the product, which is scaled in one kernel.
    if rank_leads:
        return torch.addmm(like.t(), narrow.t(), wide.t(), beta=0, alpha=scale).t()
    return torch.addmm(like, wide, narrow, beta=0, alpha=scale)


def _rank_leads(wide: Tensor, r: int) -> bool:
    """Tell whether r should be the leading dimension of the product of a matrix and one of r columns.

    On CPU that is up to 7 times as fast at ranks of 2 to 8; of few rows, at rank 1 and above 8 it is slower.
    """
    return wide.is_cpu and 1 < r <= 8 and wide.numel() >= 4096 and wide.dtype is torch.float32


def _rows(x: Tensor) -> Tensor:
    """Return [..., d] as [n, d]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _AddLowRank(torch.autograd.Function):
    """``out + scale (x aᵀ) bᵀ`` in the buffer of ``out``, keeping only x, which others keep too, a, b and x aᵀ.

    Of half precision, a and b are cast once, and their gradients back together.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        # A linear layer's output is a view where x has three dimensions, and after ``mark_dirty`` of a view autograd
        # copies its gradient twice. A detached tensor is no view, and shares the buffer and its version: whoever has
        # saved ``out`` gets autograd's error and no wrong gradient.
        out = out.detach()
        ctx.scale = scale
        if a.dtype is out.dtype is b.dtype:
            ctx.save_for_backward(x, _add(out, x, a, b, scale), a, b)
        else:
            half_a, half_b = a.to(out.dtype), b.to(out.dtype)
            ctx.save_for_backward(x, _add(out, x, half_a, half_b, scale), a, b, half_a, half_b)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, wide_a, wide_b, *half = ctx.saved_tensors
        a, b = half or (wide_a, wide_b)
        rows, d = _rows(x), _rows(grad)
        if torch.is_grad_enabled():  # create_graph=True, and what was computed does not know what from
            a, b = wide_a.to(a.dtype), wide_b.to(b.dtype)
            u = F.linear(rows, a)
        rank_leads = _rank_leads(d, b.shape[1])
        g = _product(d, b, ctx.scale, u, rank_leads)
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = torch.mm(g, a) if needs_x else None
        if grad_x is not None and rows is not x:
            grad_x = grad_x.view_as(x)
        if half and needs_a and needs_b and not torch.is_grad_enabled():
            return grad, grad_x, *_products(g, rows, u, d, ctx.scale, wide_a.dtype), None
        grad_a = torch.mm(g.t(), rows) if needs_a else None
        # In B's own layout, into which autograd would copy it else.
        grad_b = _product(d.t(), u, ctx.scale, b, rank_leads).contiguous() if needs_b else None
        if half:
            grad_a, grad_b = (None if each is None else each.to(wide_a.dtype) for each in (grad_a, grad_b))
        return grad, grad_x, grad_a, grad_b, None


_add_low_rank: Any = super(torch.autograd.Function, _AddLowRank).apply
"""``apply`` without what torch puts before it for the transforms of ``torch.func``, which `is_free` leaves out.

https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/function.py (``Function.apply``).
"""


def _products(g: Tensor, rows: Tensor, u: Tensor, d: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B, each in the layout of its factor, cast together."""
    shape_a, shape_b = (g.shape[1], rows.shape[1]), (d.shape[1], u.shape[1])
    count = shape_a[0] * shape_a[1]
    both = torch.empty(count + shape_b[0] * shape_b[1], dtype=g.dtype, device=g.device)
    of_b = both[count:].view(shape_b)
    torch.mm(g.t(), rows, out=both[:count].view(shape_a))
    torch.addmm(of_b, d.t(), u, beta=0, alpha=scale, out=of_b)
    both = both.to(dtype)
    return both[:count].view(shape_a), both[count:].view(shape_b)


class _Rescale(torch.autograd.Function):
    """``bias + c (out - bias)``, ``c = m / norm``, in the buffer of ``out``, keeping only what it returns.

    The gradient of m is read off that output y: ``sum d (out - bias) / norm = (sum d y - bias sum d) / m``. Attention
    keeps its queries, keys and values anyway. Who writes into y afterwards gets autograd's error.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, m: Tensor, norm: Tensor | None) -> Tensor:
        ratio = m if norm is None else m / norm
        out = scale_(out.detach(), bias, ratio)  # detached, as in _AddLowRank
        ctx.save_for_backward(bias, m, ratio, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias, m, ratio, y = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True, and what was saved does not know what it was computed from
            ratio = m * torch.where(m == 0, 0.0, ratio / m).detach()
        needs_out, needs_bias, needs_m, _ = ctx.needs_input_grad
        d = grad.reshape(-1, grad.shape[-1])
        wide = torch.float64 if d.dtype is torch.float64 else torch.float32
        total = d.sum(0, dtype=wide) if bias is not None and (needs_bias or needs_m) else None
        grad_out = _times(grad, ratio) if needs_out else None
        grad_bias = ((1 - ratio) * total).to(bias.dtype) if needs_bias else None
        grad_m = None
        if needs_m:
            grad_m = (d * y.reshape(-1, y.shape[-1])).sum(0, dtype=wide)
            if total is not None:
                grad_m = grad_m - bias * total
            # A magnitude of zero is a row of zeros, which has no direction to scale.
            grad_m = (grad_m / m).masked_fill(m == 0, 0.0)
        return grad_out, grad_bias, grad_m, None


def _times(grad: Tensor, ratio: Tensor) -> Tensor:
    """Return the product in the dtype of the first, in one kernel that computes in that of the second."""
    if torch.is_grad_enabled():
        return (grad * ratio).to(grad.dtype)
    return torch.mul(grad, ratio, out=torch.empty_like(grad))
