"""DAPL: prompts of a source and of a target domain, ``[v]_1 .. [v]_M1 [d]_1 .. [d]_M2 name .``, v common to both.

The model then has 2 K logits, those of the K classes in the source domain first. Each text gives one prompt of each
domain; a text may name the domain as well. The losses belong to the task (`DomainAdaptation`).

Source: Ge et al. 2022, arXiv 2202.06687, and its released code. The paper contrasts an image with the 2 K
prompts of both domains, the code with the K prompts of its own domain; both are options of the task.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core.arguments import bounded, natural
from lightning_peft.core.rates import Rates
from lightning_peft.towers.context_tokens import ContextCall, ContextTokens
from lightning_peft.towers.contexts import TextContext, check_classes, graft_context, plain_layout
from lightning_peft.towers.text_towers import STANDARD_DEVIATION, text_tower, word_table
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class DomainTokens(ContextTokens):
    """Rows of a context that all domains have, and of one for each domain.

    Args:
        weight: rows of the common context, [P, d].
        domains: rows of the contexts of the domains, [D, M2, d].
        call: shared with the other grafts of the method.
    """

    def __init__(self, weight: nn.Parameter, domains: nn.Parameter, call: ContextCall) -> None:
        super().__init__(weight, call)
        self.domains = domains

    def table(self) -> Tensor:
        """Return the rows of the common context and then of each domain, [P + D M2, d]."""
        return torch.cat([self.weight, self.domains.flatten(0, 1)])


@dataclass(eq=False, kw_only=True)
class DAPL(Method):
    """Train a common context and one for each domain, in the texts that the text tower of CLIP or SigLIP reads.

    Args:
        num_virtual_tokens: length M1 of the common context [tokens].
        num_domain_tokens: length M2 of the context of a domain [tokens].
        domains: how many domains there are: the source, then the target.
        class_specific: give each class a common context of its own. It fits no other list of classes.
        num_classes: how many classes there are, if each has a context of its own.
        share_prefix: compute what texts have in common once and nothing behind their ends; False: every text in full.
    """

    num_virtual_tokens: int = natural(16)
    num_domain_tokens: int = natural(16)
    domains: int = bounded(2, at_least=2)
    class_specific: bool = False
    num_classes: int | None = natural(None)
    share_prefix: bool = True

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "contexts of two domains in the texts of CLIP or SigLIP"
    paper: ClassVar[str] = "Ge et al. 2022, arXiv 2202.06687"
    advised: ClassVar[Rates] = Rates(3e-3, 1e-2, "section 4 of the paper", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"share_prefix"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the contexts to the text tower."""
        check_classes(self.class_specific, self.num_classes)
        tower, call = text_tower(backbone, type(self).__name__), ContextCall()
        width, common = word_table(tower).embedding_dim, self.num_virtual_tokens * (self.num_classes or 1)
        shapes = ((common, width), (self.domains, self.num_domain_tokens, width))
        weight, domains = (nn.Parameter(torch.empty(shape).normal_(std=STANDARD_DEVIATION)) for shape in shapes)
        graft_context(
            tower,
            DomainTokens(weight, domains, call),
            TextContext(self._layout(common), call, share_prefix=self.share_prefix),
            self.key,
        )
        return ()

    def _layout(self, common: int) -> Tensor:
        """Return the prompts of each domain: the common context, then that of the domain, [D, C, M1 + M2]."""
        first = plain_layout(self.num_virtual_tokens, self.num_classes).expand(self.domains, -1, -1)
        own = torch.arange(self.domains * self.num_domain_tokens).view(self.domains, 1, -1)
        return torch.cat([first, -1 - common - own.expand(-1, first.shape[1], -1)], dim=2)


DAPLMixin = TunedBy[DAPL]
