"""DualPrompt: prompts of all tasks and prompts of each, as keys and values, for classes that come one by one.

The general prompt g is in the first blocks; of the expert prompts e_1 .. e_T, in the blocks after, training takes that
of the task at hand, and an image of unknown task that whose key k_t is nearest to the [CLS] of the frozen model. The
pull ``lambda (1 - cos(q(x), k_t))`` is added to the loss.

Source: Wang et al. 2022, arXiv 2204.04799, section 4, and its released code: each prompt has L keys and L values of its
own behind the projections, initial values are U(0, 0.01), and sizes are those for ImageNet-R (for CIFAR-100 the code
has expert prompts of length 5). There all T keys compete from the first task on; here those of tasks that have not
begun do not, since they say nothing. There, on CIFAR-100, a test batch votes on one task for all its images, which
gives the task away; here an image chooses for itself, as there on ImageNet-R. No image of an earlier task is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.by_query import QueryMethod
from lightning_peft.core.arguments import natural, numbers, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.towers.attended_prompts import PromptsByQuery, attach_by_query
from lightning_peft.training.mixin import TunedBy

WIDEST = 0.01
"""The largest initial value."""


class DualPrompts(PromptsByQuery):
    """The prompts of all blocks.

    Args:
        general: the general prompts, [blocks, 2, L, d].
        expert: the expert prompts, [tasks, blocks, 2, L, d].
        keys: [tasks, d].
        layers: the numbers of the blocks of either.
    """

    def __init__(self, general: Tensor, expert: Tensor, keys: Tensor, layers: tuple[list[int], list[int]]) -> None:
        super().__init__(keys.device)
        self.layers = layers
        self.general = nn.Parameter(general) if layers[0] else None
        self.expert, self.keys = nn.Parameter(expert), nn.Parameter(keys)

    def rows(self, query: Tensor) -> dict[int, Tensor]:
        """Return the general prompts, and the expert prompts of each image."""
        distance = 1 - F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).t()
        later = torch.arange(len(self.keys), device=query.device) > self.task
        chosen = distance.detach().masked_fill(later, torch.inf).argmin(1)
        if self.training:
            chosen = self.task.expand(len(query))
        self.noted = distance.gather(1, chosen.unsqueeze(1)).mean()
        expert = self.expert[chosen]
        found = {layer: expert[:, i] for i, layer in enumerate(self.layers[1])}
        if self.general is not None:
            found |= {n: self.general[i].expand(len(query), -1, -1, -1) for i, n in enumerate(self.layers[0])}
        return found


@dataclass(eq=False, kw_only=True)
class DualPrompt(QueryMethod):
    """Train general prompts and expert prompts of each task, as keys and values of the first blocks.

    Args:
        general_length: how many keys, and values, the general prompt has [tokens].
        expert_length: how many the expert prompts have [tokens].
        general_layers: numbers of the blocks of the general prompt.
        expert_layers: numbers of the blocks of the expert prompts.
        pull: lambda, the weight of the distance between queries and the key of their task.
    """

    general_length: int = natural(5)
    expert_length: int = natural(20)
    general_layers: list[int] = numbers([0, 1])
    expert_layers: list[int] = numbers([2, 3, 4])
    pull: float = positive(1.0, "leaves the keys without a gradient")

    trains: ClassVar[str] = "prompts that all tasks share and prompts of each task, as keys and values"
    paper: ClassVar[str] = "Wang et al. 2022, arXiv 2204.04799"
    advised: ClassVar[Rates] = Rates(3e-4, 3e-4, SHAPES)
    may_change: ClassVar[frozenset[str]] = QueryMethod.may_change | {"pull"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts to the vision transformer."""
        both = sorted({*self.general_layers} & {*self.expert_layers})
        if both or not self.expert_layers:
            raise TuningError(
                f"general_layers={self.general_layers} and expert_layers={self.expert_layers} must share no block, and "
                "the second must have one."
            )
        layers = (self.general_layers, self.expert_layers)

        def make(dim: int, device: torch.device) -> DualPrompts:
            general = torch.rand(len(layers[0]), 2, self.general_length, dim, device=device) * WIDEST
            expert = torch.rand(self.num_tasks, len(layers[1]), 2, self.expert_length, dim, device=device) * WIDEST
            keys = torch.rand(self.num_tasks, dim, device=device) * WIDEST
            return DualPrompts(general, expert, keys, layers)

        attach_by_query(backbone, [*layers[0], *layers[1]], self.key, make)
        return ()

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return lambda times the pull of the last batch; None where nothing has been computed since."""
        return self.weighted(module, self.pull)


DualPromptMixin = TunedBy[DualPrompt]
