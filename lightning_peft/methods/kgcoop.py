"""KgCoOp: CoOp, whose texts are pulled towards the hand-written ones, so that it forgets less of classes unseen.

The penalty is ``pull * mean over classes of (1 - cos(w_i, w_i'))``, w_i being the feature of the text with the context
and w_i' that of "a photo of a {}.", by the frozen model.

Source: Yao et al. 2023, arXiv 2303.13283, section 3.2. The paper writes the squared distance of the features, which of
normalised ones is ``2 (1 - cos)``; its released code, whose scripts give lambda 8, has ``1 - cos``, as here. There the
context always starts from "a photo of a", M = 4, and the written texts are by a template of the data set, which may go
on behind the name ("..., a type of pet."); here ``words`` stand before it, and what follows belongs to the name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure, text_structure
from lightning_peft.core.arguments import bounded, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import Graft, grafts
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.placement import has_values
from lightning_peft.core.rates import Rates
from lightning_peft.methods.coop import CoOp
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import Position, TextContext
from lightning_peft.towers.plain_text import MovedBack, PlainContext, PlainText, plain_text
from lightning_peft.towers.text_towers import ids_of, positions_of, text_tower, two_towers, word_table
from lightning_peft.training.mixin import TunedBy


class Pulled(Graft):
    """Notes, with gradients, how far the texts are from the written ones."""

    pull: Tensor | None = None


def _distance(features: Tensor, fixed: Tensor) -> Tensor:
    """Return the mean of ``1 - cos`` over the texts, []."""
    return (1 - F.cosine_similarity(features.float(), fixed.float(), dim=-1)).mean()


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

    written: Tensor

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
        self.register_buffer("written", words.view(1, 1, -1), persistent=False)
        self.refer(projection=projection)

    projection: nn.Module | None

    def around(
        self, forward: Callable[..., Any], host: nn.Module, input_ids: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the tower's output for the prompts; with gradients, the distance from the written texts is noted."""
        out = super().around(forward, host, input_ids, *args, **kwargs)
        self.pull = None
        if self.call.active and input_ids is not None and torch.is_grad_enabled():
            own = self.layout
            self.layout = self.written
            try:
                with torch.no_grad():
                    fixed = self._feature(super().around(forward, host, input_ids, *args, **kwargs))
            finally:
                self.layout = own
            self.pull = _distance(self._feature(out), fixed)
        return out

    def _feature(self, out: Any) -> Tensor:
        pooled: Tensor = out.pooler_output
        return pooled if self.projection is None else self.projection(pooled)


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

    written: Tensor
    context: NotedContext
    model: nn.Module
    text_part: nn.Module

    def __init__(self, context: NotedContext, tower: PlainText, words: Tensor) -> None:
        super().__init__(context)
        self.register_buffer("written", words.view(1, 1, -1), persistent=False)
        self.refer(model=tower.model, text_part=tower.owner)

    def after(self, out: Tensor, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens moved to the left, [C, T, d]."""
        moved = super().after(out, host, *args, **kwargs)
        texts = self.context.texts
        if texts is not None and torch.is_grad_enabled():
            self.context.texts = None
            feature = self.feature(moved, texts)
            own = self.context.layout
            self.context.layout = self.written
            try:
                with torch.no_grad():
                    fixed = text_structure.encoded_texts(self.model, texts)
            finally:
                self.context.layout = own
            self.pull = _distance(feature, fixed)
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
            self.pull = None
        finally:
            self.written = written
        pull, self.pull = self.pull, None
        if pull is None or pull.item() > 1e-3:
            raise TuningError(
                f"{type(self.model).__name__} projects the features of texts by something else than a text_projection, "
                "so KgCoOp does not know them: take CoOp."
            )

    def feature(self, moved: Tensor, texts: Tensor) -> Tensor:
        """Return the features of texts by their tokens behind the norm, [C, p]."""
        at_end = moved[torch.arange(len(moved), device=moved.device), texts.argmax(1)]
        return text_structure.projected_text(self.text_part, at_end)


@dataclass(eq=False, kw_only=True)
class KgCoOp(CoOp):
    """Train a context as CoOp does, pulled towards hand-written texts.

    Args:
        init: words whose embeddings the context starts from; None: N(0, 0.02²).
        words: what the texts have before the name to which features are pulled, as words or as the ids of its tokens.
        pull: weight of the distance in the loss.
    """

    init: str | None = "a photo of a"
    words: str | list[int] = bounded("a photo of a", "has no ids of words", at_least=0)
    pull: float = positive(8.0, "pulls nowhere")

    trains: ClassVar[str] = "a context in the texts of CLIP or SigLIP, pulled towards hand-written ones"
    paper: ClassVar[str] = "Yao et al. 2023, arXiv 2303.13283"
    advised: ClassVar[Rates] = Rates(2e-3, 1e-2, "as for CoOp, for SGD")
    may_change: ClassVar[frozenset[str]] = CoOp.may_change | {"pull", "words"}

    def text_context(self, backbone: nn.Module, layout: Tensor, call: ContextCall) -> PulledContext:
        """Return the graft that puts the context into texts and compares it with the written words."""
        tower = text_tower(backbone, type(self).__name__)
        written = self._written(backbone, word_table(tower), positions_of(tower)).to(layout.device)
        projection = structure.part(two_towers(backbone), "text_projection")
        return PulledContext(layout, call, self.position, self.share_prefix, written, projection)

    def plain_context(
        self, backbone: nn.Module, tower: PlainText, layout: Tensor, call: ContextCall
    ) -> tuple[PlainContext, MovedBack]:
        """Return the grafts at both ends of a text tower that is none of transformers."""
        context = NotedContext(layout, call, self.position)
        return context, PulledBack(context, tower, self._written(backbone, tower.table, tower.positions))

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the context to the text tower, and what compares the texts with written ones."""
        own = list(super().graft(backbone))
        plain = plain_text(backbone)
        for place in grafts(backbone, self.key):
            if isinstance(place.graft, PulledBack) and plain is not None and has_values(plain.table):
                place.graft.check(plain)
        return own

    def _written(self, backbone: nn.Module, table: nn.Embedding, limit: int) -> Tensor:
        """Return the ids of the written words, [M'].

        Raises:
            TuningError: they are no words of the table, or too many.
        """
        if isinstance(self.words, str):
            tokenizer = tokenizer_of(backbone, self.tokenizer, f"words={self.words!r}")
            self.words = ids_of(tokenizer, self.words)  # which a file has, so that nobody needs a tokenizer to load it
        size = table.num_embeddings
        if not self.words or not all(0 <= i < size for i in self.words) or len(self.words) >= limit:
            raise TuningError(f"words={self.words} are no words of a table of {size}, or more than {limit}: give some.")
        return torch.tensor(self.words, device=table.weight.device)

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the weighted distance of the last texts from the written ones; None where there were none since."""
        graft = self.own_grafts(module, Pulled)[0].graft
        pull, graft.pull = graft.pull, None
        return None if pull is None else self.pull * pull


KgCoOpMixin = TunedBy[KgCoOp]
