"""Finds the text tower of a two-tower model (CLIP, SigLIP), its word table, and where it reads a text."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.tracing import is_traced
from lightning_peft.prompts.virtual_tokens import best_words, word_rows

STANDARD_DEVIATION = 0.02
"""Of the random initial values of a context."""


def two_towers(backbone: nn.Module) -> nn.Module:
    """Return the two-tower model in a backbone: itself, or what it is built around."""
    return backbone if structure.part(backbone, "text_model") is not None else structure.base_model_of(backbone)


def text_tower(backbone: nn.Module, method: str) -> nn.Module:
    """Return the text tower of a two-tower model.

    Raises:
        TuningError: it has none that is read at the end of the text, as CLIP's, or at the last position, as SigLIP's.
    """
    tower = structure.part(two_towers(backbone), "text_model")
    table = structure.part(tower, "embeddings.token_embedding") if tower is not None else None
    if tower is None or not isinstance(table, nn.Embedding) or not _is_known(tower):
        raise TuningError(
            f"{method} needs the texts of a two-tower model, and {type(backbone).__name__} has no text tower like that "
            "of CLIP or SigLIP: give a CLIPModel or a SiglipModel."
        )
    return tower


def word_table(tower: nn.Module) -> nn.Embedding:
    """Return the word table of a text tower."""
    return tower.embeddings.token_embedding  # type: ignore[union-attr, return-value]


def positions_of(tower: nn.Module) -> int:
    """Return how many positions a text tower has."""
    return tower.embeddings.position_embedding.num_embeddings  # type: ignore[union-attr, return-value]


def reads_end(tower: nn.Module) -> bool:
    """Tell whether a tower is causal and read at the end-of-text token; otherwise it is read at its last position."""
    return hasattr(tower, "eos_token_id")


def ends_of(tower: nn.Module, texts: Tensor) -> Tensor:
    """Return where each text ends, [C]: its end-of-text token, or the first of the equal tokens that fill it up.

    Raises:
        TuningError: a text has no end-of-text token.
    """
    if not reads_end(tower):
        filled = texts.eq(texts[:, -1:]).flip(1).long().cumprod(1).sum(1)
        return texts.shape[1] - filled
    if tower.eos_token_id == 2:  # configurations of old, where CLIPTextModel reads at the largest id
        return texts.argmax(1)
    found = texts.eq(tower.eos_token_id).long()  # type: ignore[arg-type]
    if not is_traced() and not bool(found.any(1).all()):
        row = int(found.any(1).long().argmin())
        raise TuningError(
            f"text {row} has no end-of-text token ({tower.eos_token_id}): tokenise with the model's own tokenizer."
        )
    return found.argmax(1)


def initial_rows(
    backbone: nn.Module, table: nn.Embedding, count: int | None, init: str | None, tokenizer: str | None, default: int
) -> Tensor:
    """Return the first values of a context, [M, d]: the embeddings of ``init``'s tokens, or N(0, 0.02²).

    Raises:
        TuningError: ``init`` has another number of tokens than ``count``, or there is no tokenizer.
    """
    if init is None:
        shape = (default if count is None else count, table.embedding_dim)
        return torch.empty(shape, dtype=torch.float32).normal_(std=STANDARD_DEVIATION)
    ids = ids_of(tokenizer_of(backbone, tokenizer, f"init={init!r}"), init)
    if count not in (None, len(ids)):
        raise TuningError(
            f"init={init!r} has {len(ids)} tokens, and num_virtual_tokens={count}: give one of them, or other words."
        )
    return word_rows(table, ids)


def ids_of(tokenizer: Any, words: str) -> list[int]:
    """Return the ids of words.

    Raises:
        TuningError: there are none.
    """
    ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
    if not ids:
        raise TuningError(f"init={words!r} has no tokens: give words, or None for random values.")
    return ids


def written_ids(backbone: nn.Module, words: str | list[int], tokenizer: str | None) -> list[int]:
    """Return the ids of written words, which a file has in their place, so that nobody needs a tokenizer to load it.

    Args:
        backbone: the model.
        words: the words, or their ids.
        tokenizer: folder or hub id of the tokenizer; None: that of the backbone.
    """
    return ids_of(tokenizer_of(backbone, tokenizer, f"words={words!r}"), words) if isinstance(words, str) else words


def feature_of(out: Any, projection: nn.Module | None) -> Tensor:
    """Return the features in what a tower gives, [N, p]: its pooled output, projected where the model does that."""
    pooled: Tensor = out.pooler_output
    return pooled if projection is None else projection(pooled)


def nearest_words(table: nn.Embedding, rows: Tensor, tokenizer: Any, k: int) -> list[list[tuple[str, float]]]:
    """Return, for each token of a context, the k words of least Euclidean distance, with it."""
    with torch.no_grad():
        distances = torch.cdist(rows.float(), table.weight.float())
    return best_words(distances, k, tokenizer, largest=False)


def _is_known(tower: nn.Module) -> bool:
    return reads_end(tower) or isinstance(structure.part(tower, "head"), nn.Linear)
