"""CODA-Prompt: the prompt of an image is a weighted sum of components, ``p = Σ_m cos(q ∘ A_m, K_m) P_m``.

q is the [CLS] of the frozen model; P_m [L, d], the attention A_m and the key K_m are trained, apart in each block. The
first half of p goes before the keys of the block, the second before the values. Each task adds M / T components; those
of earlier tasks still count, but are trained no more. The penalty ``lambda (‖P Pᵀ - I‖² + ‖K Kᵀ - I‖² + ‖A Aᵀ - I‖²)``,
means over the entries, keeps components apart.

Source: Smith et al. 2023, arXiv 2211.13218, section 4, with its sizes and its lambda of 0.1, and its released code,
which draws the components of each task anew when the task begins, orthogonal to what the earlier ones have become, and
then gives lambda 0; its first release had 1e-7. The paper, it says, started all of them orthogonal to each other and
left them so, which is ``redraw=False``. No image of an earlier task is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.by_query import QueryMethod
from lightning_peft.core.arguments import bounded, check_divides, natural, numbers
from lightning_peft.core.errors import TuningError
from lightning_peft.core.gathering import of_the_first
from lightning_peft.core.orthogonal import rows_beside
from lightning_peft.core.rates import Rates
from lightning_peft.core.sharded import like, whole
from lightning_peft.towers.attended_prompts import PromptsByQuery, attach_by_query
from lightning_peft.training.mixin import TunedBy


class Components(PromptsByQuery):
    """The components of all blocks.

    Args:
        layers: the numbers of the blocks.
        count: M, in each block.
        length: L of a prompt, for keys and values together.
        tasks: how many tasks share the components.
        dim: d.
        device: of the parameters.
    """

    def __init__(self, layers: list[int], count: int, length: int, tasks: int, dim: int, device: torch.device) -> None:
        super().__init__(device)
        self.layers, self.each = layers, count // tasks
        shapes = {"prompts": length * dim, "attentions": dim, "keys": dim}
        for name, width in shapes.items():
            rows = torch.empty(len(layers), count, width, device=device)
            for block in rows:
                nn.init.orthogonal_(block)
            self.register_parameter(name, nn.Parameter(rows.view(len(layers), count, -1, dim).squeeze(2)))

    prompts: nn.Parameter
    attentions: nn.Parameter
    keys: nn.Parameter

    def rows(self, query: Tensor) -> dict[int, Tensor]:
        """Return the weighted sums of components of each image, the halves for keys and values."""
        known, held = self._known()
        prompts, attentions, keys = (_held(part, held) for part in (self.prompts, self.attentions, self.keys))
        asked = F.normalize(torch.einsum("bd,lmd->lbmd", query, attentions), dim=-1)
        weights = torch.einsum("lbmd,lmd->lbm", asked, F.normalize(keys, dim=-1)) * known
        sums = torch.einsum("lbm,lmtd->lbtd", weights, prompts)
        self.noted = self.overlap() if torch.is_grad_enabled() else None  # here, as sharding has gathered them now
        return {layer: sums[i].unflatten(1, (2, -1)) for i, layer in enumerate(self.layers)}

    def overlap(self) -> Tensor:
        """Return the mean of ``(X Xᵀ - I)²`` over the entries, for the sums over P, A and K and the blocks."""
        known, held = self._known()
        total = self.keys.new_zeros(())
        for part in (self.prompts, self.attentions, self.keys):
            rows = _held(part, held).flatten(2) * known.unsqueeze(-1)
            square = (rows @ rows.mT - torch.diag_embed(known.to(rows.dtype))) ** 2
            total = total + (square.sum((1, 2)) / known.sum() ** 2).sum()
        return total

    @torch.no_grad()
    def redraw(self, task: int) -> None:
        """Draw the components anew that no task up to now has had, orthogonal to each other and to those that had one.

        Args:
            task: the number of the one that begins.
        """
        begin, end = (int(self.task) + 1) * self.each, (task + 1) * self.each
        for part in (self.prompts, self.attentions, self.keys):
            rows = whole(part).clone()
            for block in rows.flatten(2):
                block[begin:end] = rows_beside(block[:begin], end - begin)
            part.copy_(like(part, of_the_first(rows)))

    def _known(self) -> tuple[Tensor, Tensor]:
        """Return which components tasks have so far, and which are those of earlier ones, [M] each."""
        number = torch.arange(self.keys.shape[1], device=self.keys.device)
        return number < (self.task + 1) * self.each, number < self.task * self.each


@dataclass(eq=False, kw_only=True)
class CODAPrompt(QueryMethod):
    """Train components of prompts, of which an image takes a weighted sum as keys and values of the first blocks.

    Args:
        components: M, how many components there are in each block.
        length: L, of a prompt, one half for keys and one for values [tokens].
        layers: numbers of the blocks.
        orthogonality: lambda, the weight of the overlap of components in the loss.
        redraw: draw the components of a task when it begins, orthogonal to what the earlier ones have become.
    """

    components: int = natural(100)
    length: int = bounded(8, "is no length of two halves", at_least=2)
    layers: list[int] = numbers([0, 1, 2, 3, 4])
    orthogonality: float = bounded(0.1, at_least=0)
    redraw: bool = True

    trains: ClassVar[str] = "components of prompts, which images weight by their queries"
    paper: ClassVar[str] = "Smith et al. 2023, arXiv 2211.13218"
    advised: ClassVar[Rates] = Rates(1e-3, 1e-3, "the authors' code, for Adam")
    may_change: ClassVar[frozenset[str]] = QueryMethod.may_change | {"orthogonality", "redraw"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the components to the vision transformer."""
        check_divides("num_tasks", self.num_tasks, self.components, "is the number of components")
        if self.length % 2:
            raise TuningError(f"length={self.length} has no half for keys and one for values: take {self.length + 1}.")
        if not self.layers:
            raise TuningError("layers=[] leaves no block for prompts: give numbers of blocks.")

        def make(dim: int, device: torch.device) -> Components:
            if self.components > dim:
                raise TuningError(f"components={self.components} cannot be orthogonal in {dim} features: take {dim}.")
            return Components(self.layers, self.components, self.length, self.num_tasks, dim, device)

        attach_by_query(backbone, self.layers, self.key, make)
        return ()

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return lambda times the overlap of the components; None where nothing has been computed since."""
        return self.weighted(module, self.orthogonality)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Train the components of this task from now on, beside those of earlier ones.

        Raises:
            TuningError: there are none.
        """
        graft = self.own_grafts(pl_module, Components)[0].graft
        if self.redraw and int(graft.task) < task < self.num_tasks:  # not where a run that resumes goes on with it
            graft.redraw(task)
        super().on_task_start(trainer, pl_module, task)


def _held(part: Tensor, held: Tensor) -> Tensor:
    """Return rows [blocks, M, ...], of which some get no gradient."""
    return torch.where(held.view(1, -1, *[1] * (part.dim() - 2)), part.detach(), part)


CODAPromptMixin = TunedBy[CODAPrompt]
