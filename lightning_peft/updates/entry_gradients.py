"""Gradients of few entries of a weight, without that of the whole weight.

A linear layer whose weight needs a gradient computes all of it, ``gᵀ x``, which costs a third of the layer's step. Of n
chosen entries each is one dot product over the rows of the batch. On CPU, where they are few, that is up to eight times
faster; on a GPU the dense product is, so that plain operations serve there.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_peft.updates.in_place import is_eager


def is_worth_it(weight: Tensor, values: Tensor) -> bool:
    """Tell whether `with_gradients` serves these entries of a weight, and costs less than autograd's own way."""
    return (
        torch.is_grad_enabled()
        and values.requires_grad
        and values.device.type == "cpu"
        and is_eager(values)
        and is_eager(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def with_gradients(out: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return ``out`` as it is, with the gradients of the values that a linear layer's weight had in it as constants.

    Args:
        out: of the layer, [..., out].
        x: its input, [..., in].
        values: [n].
        indices: rows and columns of the values in the weight [out, in], in its order, [2, n].
    """
    _say_once()
    return _WithGradients.apply(out, x, values, indices)


@cache
def _say_once() -> None:
    """Make the first compressed tensor of the process, of which torch says that they are in beta, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        return out.detach()  # no view of its input, which nobody could write into

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        rows, d = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if not torch.is_grad_enabled():
            return grad, None, sampled(d, rows, indices).to(values.dtype), None
        places = tuple(indices.long())  # create_graph=True: the layer's gradient of x depends on the values, too
        entries = values.new_zeros(d.shape[1], rows.shape[1]).index_put(places, values - values.detach()).to(d.dtype)
        return grad, (d @ entries).view(x.shape), (d.t() @ rows)[places].to(values.dtype), None


def sampled(d: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of ``dᵀ x`` at the indices, [n] of fp32 or more, for d [B, out] and x [B, in]."""
    wide = torch.promote_types(d.dtype, torch.float32)
    d, x = d.to(wide), x.to(wide)
    rows, columns = indices[0].contiguous(), indices[1].contiguous()
    after, before = indices[:, 1:], indices[:, :-1]
    ordered = (after[0] > before[0]) | ((after[0] == before[0]) & (after[1] > before[1]))
    if not ordered.all():  # of a file that says so
        return torch.linalg.vecdot(d.t()[rows], x.t()[columns])
    begins = torch.searchsorted(rows, torch.arange(d.shape[1] + 1, dtype=rows.dtype), out_int32=True).to(rows.dtype)
    zeros = torch.zeros(len(rows), dtype=wide)
    pattern = torch.sparse_csr_tensor(begins, columns, zeros, (d.shape[1], x.shape[1]), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, d.t(), x).values()
