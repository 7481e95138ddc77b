"""Tasks that make one vector of the hidden states of a text."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel

from lightning_peft.tasks.base import Task

Pool = Literal["first", "last", "mean"]


class PoolingTask(Task):
    """A task with a base model alone, whose hidden states are pooled over a text; virtual tokens do not count."""

    auto: Any = AutoModel
    what = "text encoder"
    pool: Pool

    def _load_base(self, **config: Any) -> nn.Module:
        try:  # without the pooler of another aim, which would train nothing here
            return self.load(add_pooling_layer=False, **config)
        except TypeError:  # it has no pooler
            return self.load(**config)

    def _pooled(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = self.text_columns(hidden, batch)
        mask = batch.get("attention_mask")
        mask = torch.ones_like(hidden[..., 0]) if mask is None else self.text_columns(mask, batch)
        if self.pool == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        place = mask.int().argmax(1) if self.pool == "first" else (columns * (mask > 0)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place]
