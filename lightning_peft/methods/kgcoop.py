"""KgCoOp: CoOp, whose texts are pulled towards the hand-written ones, so that it forgets less of classes unseen.

The penalty is ``pull * mean over classes of (1 - cos(w_i, w_i'))``, w_i being the feature of the text with the context
and w_i' that of "a photo of a {}.", by the frozen model.

Source: Yao et al. 2023, arXiv 2303.13283, section 3.2. The paper writes the squared distance of the features, which of
normalised ones is ``2 (1 - cos)``; its released code, whose scripts give lambda 8, has ``1 - cos``, as here. There the
context always starts from "a photo of a", M = 4, and the written texts are by a template of the data set, which may go
on behind the name ("..., a type of pet."); here ``words`` stand before it, and what follows belongs to the name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.arguments import bounded, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.placement import has_values
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.methods.coop import CoOp
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.plain_text import MovedBack, PlainContext, PlainText, plain_text
from lightning_peft.towers.pulled_texts import NotedContext, Pulled, PulledBack, PulledContext
from lightning_peft.towers.text_towers import positions_of, text_tower, two_towers, word_table, written_ids
from lightning_peft.training.mixin import TunedBy


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
    advised: ClassVar[Rates] = Rates(6e-2, 1e-2, f"{SHAPES}; the authors' code has 2e-3", optimizer="SGD")
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
        self.words = written_ids(backbone, self.words, self.tokenizer)
        size = table.num_embeddings
        if not self.words or not all(0 <= i < size for i in self.words) or len(self.words) >= limit:
            raise TuningError(f"words={self.words} are no words of a table of {size}, or more than {limit}: give some.")
        return torch.tensor(self.words, device=table.weight.device)

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the weighted distance of the last texts from the written ones; None where there were none since."""
        pull = self.own_grafts(module, Pulled)[0].graft.take()
        return None if pull is None else self.pull * pull


KgCoOpMixin = TunedBy[KgCoOp]
