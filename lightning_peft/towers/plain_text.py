"""Text towers of two-tower models that are no transformers models, such as open_clip's: causal, read at their end.

Their parts are found by structure: the module that has a word table beside a parameter of positions as wide, a causal
mask, and a norm of that width. What reads the end of a text looks for it in the ids that it was given, so behind the
norm the tokens are moved back by the length of the context that went in at the table.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.host_copy import send
from lightning_peft.core.meta_run import ran
from lightning_peft.core.placement import has_values
from lightning_peft.towers.context_tokens import ContextTokens
from lightning_peft.towers.contexts import PlacedContext
from lightning_peft.towers.plain_vision import noting, stacks


class PlainText(NamedTuple):
    """A text tower: the model that encodes texts by it, the module with its parts, and these.

    Attributes:
        model: encodes texts.
        owner: has the word table, and what the features are projected by.
        table: the word table.
        norm: the last norm.
        positions: how many there are.
    """

    model: nn.Module
    owner: nn.Module
    table: nn.Embedding
    norm: nn.LayerNorm
    positions: int


def plain_text(backbone: nn.Module) -> PlainText | None:
    """Return the text tower in a model that is none of transformers, or None."""
    models = [module for module in anatomy.without_grafts(backbone).values() if text_structure.encodes_pairs(module)]
    if not models:
        return None
    for owner in anatomy.without_grafts(models[-1]).values():
        children = list(owner.children())
        tables = [child for child in children if isinstance(child, nn.Embedding)]
        own = [p for p in owner.parameters(recurse=False) if p.ndim == 2]
        masks = [b for b in owner.buffers(recurse=False) if b.ndim == 2 and b.shape[0] == b.shape[1]]
        for table in tables:
            width = table.embedding_dim
            positions = [p.shape[0] for p in own if p.shape[1] == width and any(len(m) == len(p) for m in masks)]
            norms = [child for child in children if isinstance(child, nn.LayerNorm)]
            norms = [norm for norm in norms if tuple(norm.normalized_shape) == (width,)]
            if positions and norms:
                return PlainText(models[-1], owner, table, norms[-1], positions[0])
    return None


def text_blocks(tower: PlainText) -> tuple[nn.Module, ...]:
    """Return the blocks that the tokens of a text go through, found by a run without numbers.

    Raises:
        TuningError: there are none whose input is [C, T, d].
    """
    calls: list[tuple[nn.Module, torch.Size]] = []
    texts = torch.empty(2, tower.positions, dtype=torch.long, device="meta")
    ran(_Texts(tower.model), texts, each=partial(noting, calls))
    shape = (2, tower.positions, tower.table.embedding_dim)
    seen = {module for module, given in calls if given == shape}
    for blocks in stacks(tower.model):
        if seen.issuperset(blocks):
            return blocks
    raise TuningError(
        f"{type(tower.model).__name__} has no equal blocks that take the tokens of texts as [texts, tokens, width]: "
        "take CoOp, which needs none."
    )


class _Texts(nn.Module):
    """A model that is asked for the features of texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, texts: Tensor) -> Tensor:
        """Return the features, [C, p]."""
        return text_structure.encoded_texts(self.model, texts)


class PlainContext(PlacedContext):
    """Puts a context into each text that goes into its host, the word table, as virtual ids."""

    positions: int = 0

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the texts with the context in them, [C, T].

        Raises:
            TuningError: a text has no room for the context.
        """
        return send(self.prompts(host, x, None)[0], x.device) if self.call.active else x

    def _reading(self, host: nn.Module, texts: Tensor) -> tuple[Tensor, int, bool]:
        return texts.argmax(1), self.positions, True  # the end of a text has the largest id


class MovedBack(Graft):
    """Moves the tokens of texts back by the context, so that the end of a text is where its ids have it.

    Args:
        context: what has put it in.
    """

    def __init__(self, context: PlainContext) -> None:
        super().__init__()
        self.refer(context=context)

    context: PlainContext

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens moved to the left, [C, T, d]."""
        return out.roll(-self.context.count, 1) if self.context.call.active else out


def graft_plain(tower: PlainText, tokens: ContextTokens, context: PlainContext, moved: MovedBack, name: str) -> None:
    """Attach the grafts of a context to a text tower.

    Raises:
        TuningError: the tower is not read at the end of a text.
    """
    if has_values(tower.table) and not _is_read_at_the_end(tower):
        raise TuningError(
            f"{type(tower.model).__name__} does not read a text at its end, so a context would move what it reads: "
            "give a CLIPModel or a SiglipModel, or a model of open_clip with a causal text tower."
        )
    context.positions = tower.positions
    device = tower.table.weight.device
    attach(tower.table, context.to(device), f"{name}_text")
    attach(tower.table, tokens.to(device), name)
    attach(tower.norm, moved, name)


def _is_read_at_the_end(tower: PlainText) -> bool:
    """Tell whether a text has the same features whatever stands behind its end."""
    ids = torch.zeros(2, tower.positions, dtype=torch.long, device=tower.table.weight.device)
    ids[:, tower.positions // 2] = tower.table.num_embeddings - 1
    ids[1, tower.positions // 2 + 1 :] = 1
    with in_eval(tower.model):
        one, other = text_structure.encoded_texts(tower.model, ids)
    return torch.allclose(one, other, atol=1e-4, rtol=1e-3)
