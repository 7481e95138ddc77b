"""KgCoOp: CoOp, whose texts are pulled towards the hand-written ones, so that it forgets less of classes unseen.

The penalty is ``pull * mean over classes of (1 - cos(w_i, w_i'))``, w_i being the feature of the text with the context
and w_i' that of "a photo of a {}.", by the frozen model.

Source: Yao et al. 2023, arXiv 2303.13283, section 3.2. The paper writes the squared distance of the features, which of
normalised ones is ``2 (1 - cos)``; its released code, whose scripts give lambda 8, has ``1 - cos``, as here. There the
context always starts from "a photo of a", M = 4, and the written texts are by a template of the data set, which may go
on behind the name ("..., a type of pet."); here ``words`` stand before it, and what follows belongs to the name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.arguments import bounded, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.rates import Rates
from lightning_peft.methods.coop import CoOp
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import Position, TextContext
from lightning_peft.towers.text_towers import ids_of, positions_of, text_tower, two_towers, word_table
from lightning_peft.training.mixin import TunedBy


class PulledContext(TextContext):
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
        self.pull: Tensor | None = None

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
            self.pull = (1 - F.cosine_similarity(self._feature(out).float(), fixed.float(), dim=-1)).mean()
        return out

    def _feature(self, out: Any) -> Tensor:
        pooled: Tensor = out.pooler_output
        return pooled if self.projection is None else self.projection(pooled)


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
        if isinstance(self.words, str):
            tokenizer = tokenizer_of(backbone, self.tokenizer, f"words={self.words!r}")
            self.words = ids_of(tokenizer, self.words)  # which a file has, so that nobody needs a tokenizer to load it
        tower = text_tower(backbone, type(self).__name__)
        size, limit = len(word_table(tower).weight), positions_of(tower)
        if not self.words or not all(0 <= i < size for i in self.words) or len(self.words) >= limit:
            raise TuningError(f"words={self.words} are no words of a table of {size}, or more than {limit}: give some.")
        written = torch.tensor(self.words, device=layout.device)
        projection = structure.part(two_towers(backbone), "text_projection")
        return PulledContext(layout, call, self.position, self.share_prefix, written, projection)

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the weighted distance of the last texts from the written ones; None where there were none since."""
        graft = self.own_grafts(module, PulledContext)[0].graft
        pull, graft.pull = graft.pull, None
        return None if pull is None else self.pull * pull


KgCoOpMixin = TunedBy[KgCoOp]
