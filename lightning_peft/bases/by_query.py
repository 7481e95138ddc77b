"""Methods whose prompts are keys and values of an image by its query, for tasks that come one after the other."""

from dataclasses import dataclass
from typing import ClassVar

import lightning as L
from torch import Tensor, nn

from lightning_peft.core import compatibility
from lightning_peft.core.arguments import natural
from lightning_peft.core.errors import TuningError
from lightning_peft.towers.attended_prompts import PromptsByQuery
from lightning_peft.training.method import Method


@dataclass(eq=False, kw_only=True)
class QueryMethod(Method):
    """A method whose graft is one `PromptsByQuery`.

    Args:
        num_tasks: how many tasks come one after the other, each with prompts of its own; they begin by `on_task_start`.
    """

    num_tasks: int = natural(10)

    kind: ClassVar[str] = "prompt"
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS, compatibility.LENGTH})

    def pool(self, model: nn.Module) -> PromptsByQuery:
        """Return the graft with all prompts.

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        return self.own_grafts(model, PromptsByQuery)[0].graft

    def weighted(self, module: nn.Module, weight: float) -> Tensor | None:
        """Return what the last batch noted, times a weight; None where nothing has been computed since."""
        noted = self.pool(module).take()
        return None if noted is None or not weight else weight * noted

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Train the prompts of this task from now on.

        Raises:
            TuningError: there are none.
        """
        if task >= self.num_tasks:
            raise TuningError(f"task {task} begins, and num_tasks={self.num_tasks}: give as many as there are.")
        self.pool(pl_module).task.fill_(task)
