"""The cross-entropy of a language model in chunks, so that the logits of all tokens never exist at once."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.core.sharded import is_part
from lightning_peft.core.tracing import is_traced


def chunked_cross_entropy(
    backbone: Any, inputs: Mapping[str, Tensor], targets: Tensor, size: int, check: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of targets [B, T - 1] that are not -100, and how many there are.

    The output head sees ``size`` tokens at once, those with a target alone. Where it is frozen, the gradient to the
    hidden states is computed with the loss, and is all that is kept; where it is trained, a chunk is computed anew in
    the backward pass. The model itself gives logits of the last column, by which it is checked that its head is all
    that is between hidden states and logits.

    Args:
        backbone: a causal language model.
        inputs: what it is called with.
        targets: the next tokens.
        size: tokens of a chunk.
        check: whether to check it.

    Raises:
        TuningError: the model has no head of its own, or does more than call it.
    """
    head = _head(backbone)
    out = backbone(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden = out.hidden_states[-1]
    if check:
        _check_same(backbone, head, hidden, out.logits)
    kept = targets != IGNORED
    hidden, wanted = hidden[:, :-1][kept], targets[kept]
    if not len(wanted):
        return hidden.float().sum(), kept.sum()
    if hidden.requires_grad and not is_traced() and not _is_trained(head, hidden):
        return _FrozenHead.apply(hidden, wanted, head, size), kept.sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, tokens in zip(hidden.split(size), wanted.split(size), strict=True):
        total = total + checkpoint(_summed, head, states, tokens, use_reentrant=False)
    return total, kept.sum()


class _FrozenHead(torch.autograd.Function):
    """The summed cross-entropy of a head that no gradient goes into, with its gradient to the hidden states [N, d].

    As the cross-entropy of liger-kernel (https://arxiv.org/abs/2410.10989, section 3.2), but by plain operations.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, size: int) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for states, tokens in zip(hidden.split(size), targets[:, None].split(size), strict=True):
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                logits = head(states)
            shares = logits.detach().float().log_softmax(-1)
            total -= shares.gather(1, tokens).sum()
            shares.exp_().scatter_add_(1, tokens, shares.new_full(tokens.shape, -1))
            gradients += torch.autograd.grad(logits, states, shares.to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def _is_trained(head: nn.Module, hidden: Tensor) -> bool:
    """Tell whether a gradient goes into the head, its grafts or what they refer to."""
    return bool(head(hidden[:1].detach()).requires_grad)


def _summed(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _head(backbone: nn.Module) -> nn.Module:
    head = structure.output_embeddings_of(backbone)
    takes = structure.arguments_of(backbone)
    if head is None or "logits_to_keep" not in takes:
        raise TuningError(f"{type(backbone).__name__} has no head that could be called apart: leave loss_chunk out.")
    if any(is_part(parameter) for parameter in head.parameters()):
        raise TuningError(
            f"the head of {type(backbone).__name__} is sharded, and cannot be called apart: leave loss_chunk out."
        )
    return head


@torch.no_grad()
def _check_same(backbone: nn.Module, head: nn.Module, hidden: Tensor, logits: Tensor) -> None:
    """See that the head gives what the model gives, up to rounding.

    Raises:
        TuningError: the model, or a method, changes logits or hidden states in between.
    """
    same = len(hidden) == len(logits)
    if same:
        own, theirs = head(hidden[:, -1:]).float(), logits.float()
        rounding = 1e-4 if hidden.dtype == logits.dtype == torch.float32 and not torch.is_autocast_enabled() else 3e-2
        same = own.shape == theirs.shape and bool(
            (own - theirs).abs().max() <= rounding * theirs.abs().max().clamp(min=1)
        )
    if not same:
        raise TuningError(
            f"{type(backbone).__name__}, as it is tuned, does more between hidden states and logits than call its "
            "head: leave loss_chunk out."
        )
