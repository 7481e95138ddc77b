"""The cross-entropy of a language model in chunks, so that the logits of all tokens never exist at once."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.sharded import is_part


def chunked_cross_entropy(
    backbone: Any, inputs: Mapping[str, Tensor], targets: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of targets [B, T - 1] that are not -100, and how many there are.

    The output head sees ``size`` tokens at once, those with a target alone, and computes them anew in the backward
    pass. The model itself gives logits of the last column, by which it is checked that its head is all that is between
    hidden states and logits.

    Args:
        backbone: a causal language model.
        inputs: what it is called with.
        targets: the next tokens.
        size: tokens of a chunk.

    Raises:
        TuningError: the model has no head of its own, or does more than call it.
    """
    head = _head(backbone)
    out = backbone(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden = out.hidden_states[-1]
    _check_same(backbone, head, hidden, out.logits)
    kept = targets != -100
    hidden, wanted = hidden[:, :-1][kept], targets[kept]
    total = hidden.float().sum() if not len(wanted) else hidden.new_zeros((), dtype=torch.float32)
    for states, tokens in zip(hidden.split(size), wanted.split(size), strict=True):
        total = total + checkpoint(_summed, head, states, tokens, use_reentrant=False)
    return total, kept.sum()


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
