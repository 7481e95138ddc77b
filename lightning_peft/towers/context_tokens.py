"""The virtual tokens of a context in the word table of a text tower, and the state that its grafts share in a call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.graft import Graft
from lightning_peft.prompts.virtual_tokens import VirtualTokens


class ContextCall:
    """The state that the grafts of one method share while a model is called; no tensor is left afterwards.

    Attributes:
        active: whether the context is put in; without it the model is the frozen one.
        variant: which of the prompts of a text is made; None: all.
        listens: whether the image features of this call are to be kept.
        images: the image features of this call, [B, p].
        shift: what is added to the context for each image, [B, d].
        prompts: the graft that holds the rows of all layers; it is no tensor, and stays.
    """

    def __init__(self) -> None:
        self.active = True
        self.variant: int | None = None
        self.listens = False
        self.images: Tensor | None = None
        self.shift: Tensor | None = None
        self.prompts: nn.Module | None = None


class ContextTokens(VirtualTokens):
    """Gives the tokens of a context their rows in the output of the word table.

    Args:
        weight: the rows, [P, d].
        call: shared with the other grafts of the method.
    """

    def __init__(self, weight: nn.Parameter, call: ContextCall) -> None:
        super().__init__(weight)
        self.call = call

    def table(self) -> Tensor:
        """Return the row of each virtual token, [P, d]."""
        return self.weight

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the embeddings with the rows of virtual ids filled in, [B, T, d]."""
        ids, self._ids = self._ids, None
        assert ids is not None
        rows = F.embedding((-1 - ids).clamp(min=0), self.table())
        shift = self.call.shift
        if shift is not None:
            rows = rows + shift.repeat_interleave(len(rows) // len(shift), 0).unsqueeze(1)
        return torch.where((ids < 0).unsqueeze(-1), rows.to(out.dtype), out)


class LongRows(Graft):
    """Makes the embeddings of a text tower take rows of more tokens than it has positions.

    CLIPTextEmbeddings refuses them, though a tree's positions are depths, all within its table
    (https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/clip/modeling_clip.py). An
    embedding depends on one token and one position, so the tokens are looked up as rows of one.
    """

    def around(
        self,
        forward: Callable[..., Any],
        host: nn.Module,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the embeddings, [G, N, d]."""
        if input_ids is None or position_ids is None or input_ids.shape != position_ids.shape:
            return forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        single = forward(input_ids=input_ids.reshape(-1, 1), position_ids=position_ids.reshape(-1, 1), **kwargs)
        return single.view(*input_ids.shape, -1)
