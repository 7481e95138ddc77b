"""MaPLe: prompts in the first layers of both towers of CLIP, those of the images made from those of the texts.

Layer i <= J of the text tower has n rows P_i behind the start token, layer i of the vision tower the rows F_i P_i
behind the patches, F_i a linear map; what a layer makes of the rows is dropped where the next one has its own.

Source: Khattak et al. 2022, arXiv 2210.03117, and its released code. There the rows of the first layer
start from the first n tokens of "a photo of a" and the other words stay: `template` is "of a {}." by default, and the
texts that the model is given are to be written so.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_peft.core.arguments import natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.prompts.virtual_tokens import word_rows
from lightning_peft.towers.deep_prompts import Prompts, graft_prompts, image_side, text_side
from lightning_peft.towers.text_towers import ids_of, initial_rows
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class MaPLe(Method):
    """Train prompts in the first layers of both towers of CLIP or SigLIP, coupled by linear maps.

    Args:
        num_virtual_tokens: length n of the prompt in each layer [tokens].
        depth: how many layers J of either tower have prompts.
        init: words whose first n tokens the prompt of the first layer starts from; the other words belong in the
            texts. None: N(0, 0.02²), as in the layers above.
        share_prefix: compute what texts have in common once and nothing behind their ends; False: every text in full.
        tokenizer: folder or hub id of the tokenizer of ``init``; None: that of the backbone.
    """

    num_virtual_tokens: int = natural(2, "is no prompt")
    depth: int = 9
    init: str | None = "a photo of a"
    share_prefix: bool = True
    tokenizer: str | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "coupled prompts in the layers of both towers"
    paper: ClassVar[str] = "Khattak et al. 2022, arXiv 2210.03117"
    advised: ClassVar[Rates] = Rates(2e-2, 1e-2, f"{SHAPES}; the paper has 3.5e-3", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"share_prefix", "tokenizer"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts to both towers."""
        count = self.num_virtual_tokens
        text, images = text_side(backbone, type(self).__name__), image_side(backbone, type(self).__name__)
        for side in (text, images):
            side.check_depth(self.depth, "depth")
        if self.init is None:
            rows, template = initial_rows(backbone, text.table, count, None, None, count), "{}."
        else:
            tokenizer = tokenizer_of(backbone, self.tokenizer, f"init={self.init!r}")
            first, template = split_words(tokenizer, self.init, count)
            rows = word_rows(text.table, first)
        weights = [nn.Parameter(rows.to(text.device)), *(text.random_prompt(count) for _ in range(self.depth - 1))]
        maps = [nn.Linear(text.width, images.width).to(images.device) for _ in range(self.depth)]
        graft_prompts(backbone, Prompts(weights, projections=maps), self.key, template, self.share_prefix)
        return ()


def split_words(tokenizer: Any, words: str, count: int) -> tuple[list[int], str]:
    """Return the ids of the first ``count`` tokens of words, and the template of a text, which begins with the others.

    Raises:
        TuningError: there are fewer tokens, or the last of them ends within a word.
    """
    every, parts = ids_of(tokenizer, words), words.split()
    for i in range(1, len(parts) + 1):
        ids = ids_of(tokenizer, " ".join(parts[:i]))
        if len(ids) == count:
            return ids, " ".join([*parts[i:], "{}."])
    raise TuningError(
        f"no beginning of init={words!r} has {count} tokens (it has {len(every)}): change num_virtual_tokens, or give "
        "init=None for random values."
    )


MaPLeMixin = TunedBy[MaPLe]
