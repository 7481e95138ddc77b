"""Contexts in texts that are compared with the texts of written words, which the penalty of `KgCoOp` pulls them to.

Where a whole tower is a graft's host (transformers) it is asked twice; in a tower that is read behind its last norm the
graft there asks the model for the features of the same texts once more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import text_structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.noted import Noting
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import PlacedContext, Position, TextContext
from lightning_peft.towers.plain_text import MovedBack, PlainContext, PlainText
from lightning_peft.towers.text_towers import feature_of


class Pulled(Noting):
    """Notes, with gradients, how far the texts are from the written ones."""

    written: Tensor

    def keep(self, words: Tensor) -> None:
        """Keep the written words, as the layout of a context has them."""
        self.register_buffer("written", words.view(1, 1, -1), persistent=False)

    def compare(self, context: PlacedContext, features: Tensor, read: Callable[[], Tensor]) -> None:
        """Note the mean over the texts of ``1 - cos`` of their features and those of the written words, [].

        Args:
            context: stands in the texts, and makes room for the written words.
            features: of the texts with the context, [C, p].
            read: returns the features of the same texts.
        """
        own = context.layout
        context.layout = self.written
        try:
            with torch.no_grad():
                fixed = read()
        finally:
            context.layout = own
        self.noted = (1 - F.cosine_similarity(features.float(), fixed.float(), dim=-1)).mean()


class PulledContext(TextContext, Pulled):
    """Puts a context into each text, and compares what the tower makes of it with the text of written words.

    Args:
        layout: see `TextContext`.
        call: see `TextContext`.
        position: see `TextContext`.
        share_prefix: see `TextContext`.
        words: the ids of the written words, [M'].
        projection: what the tower's output goes through; None: nothing.
    """

    projection: nn.Module | None

    def __init__(
        self,
        layout: Tensor,
        call: ContextCall,
        position: Position,
        share_prefix: bool,
        words: Tensor,
        projection: nn.Module | None,
    ) -> None:
        super().__init__(layout, call, position, share_prefix)
        self.keep(words)
        self.refer(projection=projection)

    def around(
        self, forward: Callable[..., Any], host: nn.Module, input_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the tower's output for the prompts; with gradients, the distance from the written texts is noted."""
        read = partial(super().around, forward, host, input_ids, *args, **kwargs)
        out, self.noted = read(), None
        if self.call.active and input_ids is not None and torch.is_grad_enabled():
            self.compare(self, feature_of(out, self.projection), lambda: feature_of(read(), self.projection))
        return out


class NotedContext(PlainContext):
    """Puts a context into each text, and keeps the texts until the tower has read them."""

    texts: Tensor | None = None

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the texts with the context in them, [C, T]."""
        if self.call.active and torch.is_grad_enabled():
            self.texts = x
        return super().before(host, x, *args, **kwargs)


class PulledBack(MovedBack, Pulled):
    """Moves the tokens of texts back, and compares their features with those of the texts with written words.

    Args:
        context: what has put the context in.
        tower: the text tower.
        words: the ids of the written words, [M'].
    """

    context: NotedContext
    model: nn.Module
    text_part: nn.Module

    def __init__(self, context: NotedContext, tower: PlainText, words: Tensor) -> None:
        super().__init__(context)
        self.keep(words)
        self.refer(model=tower.model, text_part=tower.owner)

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens moved to the left, [C, T, d]."""
        moved = super().after(out, host, *args, **kwargs)
        texts = self.context.texts
        if texts is not None and torch.is_grad_enabled():
            self.context.texts = None
            read = partial(text_structure.encoded_texts, self.model, texts)
            self.compare(self.context, self.feature(moved, texts), read)
        return moved

    def check(self, tower: PlainText) -> None:
        """Check that the features are known: the distance of the context from itself is none.

        Raises:
            TuningError: the model makes features of texts in a way of its own.
        """
        texts = torch.zeros(2, tower.positions, dtype=torch.long, device=self.written.device)
        texts[:, 2] = tower.table.num_embeddings - 1
        written, self.written = self.written, self.context.layout
        try:
            with in_eval(self.model), torch.enable_grad():
                text_structure.encoded_texts(self.model, texts)
        except RuntimeError:  # the features are of another width
            self.noted = None
        finally:
            self.written = written
        pull = self.take()
        if pull is None or pull.item() > 1e-3:
            raise TuningError(
                f"{type(self.model).__name__} projects the features of texts by something else than a text_projection, "
                "so KgCoOp does not know them: take CoOp."
            )

    def feature(self, moved: Tensor, texts: Tensor) -> Tensor:
        """Return the features of texts by their tokens behind the norm, [C, p]."""
        at_end = moved[torch.arange(len(moved), device=moved.device), texts.argmax(1)]
        return text_structure.projected_text(self.text_part, at_end)
