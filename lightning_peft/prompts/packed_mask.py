"""The mask of rows that hold several texts end to end, each of which sees the prompt before the row and itself."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.host_copy import ask
from lightning_peft.core.tracing import is_traced

_IMPLEMENTATIONS = ("sdpa", "eager")


def holds_several(positions: Tensor) -> bool:
    """Tell whether positions [B, T] begin anew in a row; a tracer, which sees no values, is told that they may."""
    return is_traced() or ask(positions, lambda given: bool((given.diff(dim=1) != 1).any()))


def packed_mask(positions: Tensor, count: int, host: nn.Module, dtype: torch.dtype, whole: bool) -> Tensor:
    """Return the mask of texts behind a prompt, [B, 1, T, P + T], or of the prompt too, [B, 1, P + T, P + T].

    Args:
        positions: begin anew with each text, [B, T].
        count: the length P of the prompt.
        host: the decoder that computes with the mask.
        dtype: of its hidden states.
        whole: whether the prompt is in the rows.

    Raises:
        TuningError: the attention takes no such mask.
    """
    name = (structure.attention_implementation(host) or "").removeprefix("grafted_")
    if name not in _IMPLEMENTATIONS:
        raise TuningError(
            f"attn_implementation={name!r} takes no mask by which several texts of a row see one soft prompt: load the "
            f"model with one of {', '.join(_IMPLEMENTATIONS)}, or set packing=false."
        )
    texts = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    seen = (texts[:, :, None] == texts[:, None]).tril()
    seen = F.pad(seen, (count, 0), value=True)
    if whole:
        prompt = F.pad(seen.new_ones(count, count).tril(), (0, seen.shape[1]))
        seen = torch.cat((prompt.expand(len(seen), -1, -1), seen), 1)
    seen = seen[:, None]
    if name == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
