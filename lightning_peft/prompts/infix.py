"""The infix: virtual tokens between a source and its target, with numbers added to their keys and values in each layer.

``[x; INFIX; y]``: the tokens are in the sequence, so they see the source, the target sees them, and the last of them
says the target's first token.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.labels import IGNORED
from lightning_peft.prompts.virtual_tokens import insert

IDS = "infix_ids"
"""The argument by which a layer and its attention have the ids: what is computed anew has its arguments again."""


class InfixIds:
    """The token ids of the current call, [B, T], passed from the decoder to its projections, and cleared after it."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None


class InfixDecoder(Graft):
    """Passes the token ids to the projections, and on to the attentions if the model does. Its host is the decoder."""

    def __init__(self, call: InfixIds) -> None:
        super().__init__()
        self.call = call

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        ids = self.call.ids = args[0] if args else kwargs.get("input_ids")
        try:
            return forward(*args, **kwargs, **{IDS: ids})
        finally:
            self.call.ids = None


class InfixAttention(Graft):
    """Passes the token ids to the projections when their layer is recomputed. Its host has the projections.

    It is not the layer: checkpointing in transformers computes a layer's ``forward`` anew, without the layer's hooks.
    """

    def __init__(self, call: InfixIds) -> None:
        super().__init__()
        self.call = call

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the attention."""
        before, own = self.call.ids, kwargs.pop(IDS, None)
        self.call.ids = before if own is None else own
        try:
            return forward(*args, **kwargs)
        finally:
            self.call.ids = before


class InfixStates(Graft):
    """Adds numbers to the keys or values of virtual tokens. Its host is the projection.

    Args:
        count: P.
        width: of the keys or values, or of both where one projection makes them.
        skip: leading columns of the output that stay as they are: the queries of a fused projection.
        call: shared with the decoder and its attentions.
    """

    def __init__(self, count: int, width: int, skip: int, call: InfixIds) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.randn(count, width))
        self.skip, self.call = skip, call

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the keys or values with those of virtual tokens changed, [B, T, width].

        Raises:
            TuningError: the ids are not known here.
        """
        ids = self.call.ids
        if ids is None:
            raise TuningError(
                "the infix is not known where there are no input_ids, nor where a layer is computed anew whose model "
                "hands no arguments on to it: give input_ids and switch gradient checkpointing off, or take "
                "form='prefix', which needs nothing of it."
            )
        ids = ids.to(out.device)
        rows = nn.functional.embedding((-1 - ids).clamp(min=0), self.states).to(out.dtype)
        added = nn.functional.pad(rows, (self.skip, out.shape[-1] - self.skip - rows.shape[-1]))
        return out + torch.where((ids < 0).unsqueeze(-1), added, torch.zeros_like(added))


def projections(backbone: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """Return the projections of keys and values by name, with the width and the start of those in their output."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    regex = select.by_role(backbone, ("key", "value"), kinds)
    found: dict[str, tuple[nn.Module, int, int]] = {}
    for name, module in select.hosts(backbone, kinds, regex).items():
        weight: Any = module.weight
        width, out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
        fused = select.match([name], rf"(?:.*\.)?(?:{select.ROLES['fused_qkv']})")
        is_fused = bool(next(iter(fused.values())))
        found[name] = (module, out - width if is_fused else out, width if is_fused else 0)
    return found


def put_between(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the batch with virtual tokens before the first target token of each row, or at its end to generate one."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    first = mask.to(torch.int).argmax(1, keepdim=True)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        at = (labels != IGNORED).to(torch.int).argmax(1, keepdim=True) - first
    else:
        at = mask.sum(1, keepdim=True)
    return insert(batch, count, at)
