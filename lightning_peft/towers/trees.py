"""Lets a causal text tower read many texts as trees of tokens (`towers.packing`), with what it takes for that."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.host_copy import ask, keep, send
from lightning_peft.core.tracing import is_traced
from lightning_peft.towers.packing import pack
from lightning_peft.towers.text_towers import ends_of, reads_end, word_table


def can_pack(tower: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Tell whether a tower can read a tree: it is causal, takes a mask, and the caller wants features alone."""
    wants_more = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    if is_traced() or not reads_end(tower) or wants_more or kwargs.get("return_dict") is False:
        return False
    return _implementation(tower).endswith(("sdpa", "eager"))


def read_trees(forward: Callable[..., Any], host: nn.Module, ids: Tensor, images: int, kwargs: dict[str, Any]) -> Any:
    """Return what a tower gives for texts that it reads as trees, once for each image.

    Args:
        forward: of the tower.
        host: the tower.
        ids: the texts, [C, T].
        images: how many times to read them, those of the first image first.
        kwargs: what else the tower is called with.
    """
    rows = ask(keep(ids), lambda ids: _rows(ids, ends_of(host, ids)))
    packed = pack(rows, host.config.hidden_size)  # type: ignore[union-attr]
    tree = (torch.from_numpy(part) for part in packed)
    tokens, positions, visible, index = (send(part, ids.device) for part in tree)
    tokens, positions, visible = tokens.repeat(images, 1), positions.repeat(images, 1), visible.unsqueeze(1)
    if len(visible) > 1:
        visible = visible.repeat(images, 1, 1, 1)
    out = forward(input_ids=tokens, position_ids=positions, attention_mask=_mask(host, visible), **kwargs)
    hidden = out.last_hidden_state
    if images > 1:
        index = index + torch.arange(images, device=ids.device).unsqueeze(1) * packed.ids.size
    # A tree has no hidden state for each text, and one of another shape would be taken for it: there is none.
    return type(out)(pooler_output=hidden.flatten(0, 1)[index.flatten()])


def _rows(ids: Tensor, ends: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each text to its end."""
    return tuple(tuple(row[: end + 1]) for row, end in zip(ids.tolist(), ends.tolist(), strict=True))


def _implementation(tower: nn.Module) -> str:
    return structure.attention_implementation(tower) or "eager"


def _mask(tower: nn.Module, visible: Tensor) -> Tensor:
    """Return the mask [G, 1, N, N] as the tower's attention takes it: what is seen, or what is added to the scores."""
    if _implementation(tower).endswith("sdpa"):
        return visible
    dtype = word_table(tower).weight.dtype
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
