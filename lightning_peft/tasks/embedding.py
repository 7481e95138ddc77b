"""Embeds texts, and finds the rows that are nearest to another."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedder:
    """Embeds texts: the mean of a model's last hidden states over the tokens of a text, of length 1.

    Args:
        model: any pretrained text model; of an encoder-decoder the encoder is used.
        tokenizer: its tokenizer.
        max_length: where a text is cut [tokens].
        batch_size: texts of a batch.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, batch_size: int = 64) -> None:
        whole = model.get_encoder() if model.config.is_encoder_decoder else model.base_model  # type: ignore[union-attr,operator]
        self.model: Any = whole
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings, [len(texts), d]."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Tensor] = []
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            rows = [texts[i] for i in order[start : start + self.batch_size]]
            batch = self.tokenizer(
                rows, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(device)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            found.append(F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1), dim=1))
        back = torch.empty(len(order), dtype=torch.long, device=device)
        back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
        return torch.cat(found)[back]


def nearest_rows(queries: Tensor, pool: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and numbers of the ``count`` rows of the pool nearest to each query, nearest first [Q, K]."""
    found = (queries @ pool.T).sort(dim=1, descending=True, stable=True)
    return found.values[:, :count], found.indices[:, :count]
