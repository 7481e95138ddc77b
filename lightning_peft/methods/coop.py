"""CoOp: learnt context tokens stand in front of the names of classes, ``[SOS] [V]_1 .. [V]_M name . [EOT]``.

p(y = i | x) = softmax_i(exp(s) cos(g(t_i), f(x))), where the prompt t_i has M trained vectors, and both encoders g, f
and the temperature s are frozen.

Source: Zhou et al. 2021, arXiv 2109.01134, section 3. The paper has one context for all classes or one of
each class, and the name at the end or in the middle; the released code adds the front. The released code counts words
where it means tokens, so that of words of several tokens some stay fixed: we count tokens. It runs all 77 positions of
every class; we compute the start token and a common context once and nothing behind the end of a text, which gives the
same features up to rounding (`share_prefix`). SigLIP has no start token and is read at its last position, so its
context comes first and the padding stays as it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.arguments import choice, natural
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.rates import Rates
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens
from lightning_peft.towers.contexts import Position, TextContext, check_classes, graft_context, plain_layout
from lightning_peft.towers.plain_text import MovedBack, PlainContext, PlainText, graft_plain, plain_text
from lightning_peft.towers.text_towers import initial_rows, nearest_words, text_tower, word_table
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

DEFAULT_LENGTH = 16


@dataclass(eq=False, kw_only=True)
class CoOp(Method):
    """Train a context of M tokens in the texts that the text tower of CLIP or SigLIP reads, or of open_clip's kin.

    The texts are the names of the classes with a full stop, ``"red star."``, tokenised by the model's own tokenizer.

    Args:
        num_virtual_tokens: length M of the context [tokens]; None: 16, or that of ``init``.
        init: words whose embeddings the context starts from, such as "a photo of a"; None: N(0, 0.02²).
        position: where the name stands: behind the context ('end'), in the middle of it, or before it ('front').
        class_specific: give each class a context of its own. It fits no other list of classes.
        num_classes: how many classes there are, if each has a context of its own.
        share_prefix: compute what texts have in common once and nothing behind their ends; False: every text in full.
        tokenizer: folder or hub id of the tokenizer of ``init``; None: that of the backbone.
    """

    num_virtual_tokens: int | None = natural(None, "is no context")
    init: str | None = None
    position: Position = choice("end", "is no place of a name")
    class_specific: bool = False
    num_classes: int | None = natural(None)
    share_prefix: bool = True
    tokenizer: str | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "a context in the texts of CLIP or SigLIP"
    paper: ClassVar[str] = "Zhou et al. 2021, arXiv 2109.01134"
    advised: ClassVar[Rates] = Rates(2e-3, 1e-2, "section 4.1 of the paper", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"init", "share_prefix", "tokenizer"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the context to the text tower."""
        check_classes(self.class_specific, self.num_classes)
        plain, call = plain_text(backbone), ContextCall()
        tower = text_tower(backbone, type(self).__name__) if plain is None else plain.model
        table = word_table(tower) if plain is None else plain.table
        rows = initial_rows(backbone, table, self.num_virtual_tokens, self.init, self.tokenizer, DEFAULT_LENGTH)
        layout = plain_layout(len(rows), self.num_classes)
        if self.num_classes is not None:
            rows = self._of_each_class(rows, self.num_classes)
        tokens = ContextTokens(nn.Parameter(rows), call)
        if plain is None:
            graft_context(tower, tokens, self.text_context(backbone, layout, call), self.key)
        else:
            graft_plain(plain, tokens, *self.plain_context(backbone, plain, layout, call), self.key)
        return ()

    def text_context(self, backbone: nn.Module, layout: Tensor, call: ContextCall) -> TextContext:
        """Return the graft that puts the context into texts; a method that reads them in another way has its own."""
        return TextContext(layout, call, self.position, self.share_prefix)

    def plain_context(
        self, backbone: nn.Module, tower: PlainText, layout: Tensor, call: ContextCall
    ) -> tuple[PlainContext, MovedBack]:
        """Return the grafts at both ends of a text tower that is none of transformers."""
        context = PlainContext(layout, call, self.position)
        return context, MovedBack(context)

    def context(self, model: nn.Module) -> Tensor:
        """Return the context, [M, d], or that of each class, [C, M, d].

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        rows = self.own_grafts(model, ContextTokens)[0].graft.weight
        return rows if self.num_classes is None else rows.unflatten(0, (self.num_classes, -1))

    def nearest_words(self, model: nn.Module, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each token of the context, the k words of least Euclidean distance, with it.

        Contexts of classes follow each other.
        """
        backbone = self._tuned(model)
        rows = self.context(backbone).flatten(0, -2)
        (place,) = self.own_grafts(backbone, ContextTokens)  # which hangs on the word table
        table = cast(nn.Embedding, place.host)
        return nearest_words(table, rows, tokenizer_of(backbone, self.tokenizer, "nearest_words"), k)

    def _of_each_class(self, rows: Tensor, classes: int) -> Tensor:
        if self.init is not None:
            return rows.repeat(classes, 1)
        return torch.cat([rows, *(torch.empty_like(rows).normal_(std=0.02) for _ in range(classes - 1))])


class CoOpMixin(TunedBy[CoOp]):
    """For a LightningModule that is tuned by a context: set ``self.method`` to change its arguments."""

    def nearest_words(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each token of the context, the k words of least Euclidean distance, with it."""
        method, module = self._owned()
        return method.nearest_words(module, k)
