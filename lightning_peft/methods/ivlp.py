"""IVLP: prompts in the first layers of both towers of CLIP, independent of each other.

Layer i <= J of the text tower has n rows of its own behind the start token, layer i <= J' of the vision tower n' rows
behind the patches; what a layer makes of the rows is dropped where the next one has its own.

Source: "independent vision-language prompting" of Khattak et al. 2022, arXiv 2210.03117, and its released code.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.core.arguments import natural
from lightning_peft.core.rates import Rates
from lightning_peft.towers.deep_prompts import Prompts, graft_prompts, image_side, text_side
from lightning_peft.towers.text_towers import initial_rows
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy

DEFAULT_LENGTH = 4


@dataclass(eq=False, kw_only=True)
class IVLP(Method):
    """Train prompts in the first layers of both towers of CLIP or SigLIP.

    Args:
        num_virtual_tokens: length n of the prompt in each layer of the text tower [tokens]; None: 4, or that of
            ``init``.
        num_image_tokens: length n' of the prompt in each layer of the vision tower [tokens].
        depth: how many layers J of the text tower have prompts.
        image_depth: how many layers J' of the vision tower have prompts; None: ``depth``.
        init: words whose embeddings the prompt of the first text layer starts from; None: N(0, 0.02²).
        share_prefix: compute what texts have in common once and nothing behind their ends; False: every text in full.
        tokenizer: folder or hub id of the tokenizer of ``init``; None: that of the backbone.
    """

    num_virtual_tokens: int | None = natural(None, "is no prompt")
    num_image_tokens: int = natural(4, "is no prompt")
    depth: int = 9
    image_depth: int | None = None
    init: str | None = "a photo of a"
    share_prefix: bool = True
    tokenizer: str | None = None

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "independent prompts in the layers of both towers"
    paper: ClassVar[str] = "Khattak et al. 2022, arXiv 2210.03117"
    advised: ClassVar[Rates] = Rates(2.5e-3, 1e-2, "the authors' code", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"init", "share_prefix", "tokenizer"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts to both towers."""
        text, images = text_side(backbone, type(self).__name__), image_side(backbone, type(self).__name__)
        image_depth = self.depth if self.image_depth is None else self.image_depth
        text.check_depth(self.depth, "depth")
        images.check_depth(image_depth, "depth" if self.image_depth is None else "image_depth")
        rows = initial_rows(backbone, text.table, self.num_virtual_tokens, self.init, self.tokenizer, DEFAULT_LENGTH)
        texts = [nn.Parameter(rows.to(text.device)), *(text.random_prompt(len(rows)) for _ in range(self.depth - 1))]
        prompts = Prompts(texts, [images.random_prompt(self.num_image_tokens) for _ in range(image_depth)])
        graft_prompts(backbone, prompts, self.key, "{}.", self.share_prefix)
        return ()


IVLPMixin = TunedBy[IVLP]
