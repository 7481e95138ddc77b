"""Trains a delta for each task of a sequence, and lets rows be computed by the delta of their task."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
from torch import nn

from lightning_peft.core import arguments
from lightning_peft.core.run import trained
from lightning_peft.deltas.members import Members
from lightning_peft.training.method import Method


@dataclass(eq=False)
class PerTask(Members):
    """Trains deltas of one method, NAME_0, NAME_1 ..., one for each task of a sequence, as `ContinualData` has them.

    While a task is trained, its delta alone computes and gets gradients; each has a task head of its own. Rows that
    are scored are computed by the delta of their task, whose number is that of their loader, so what a task has learnt
    stays as it is: nothing is forgotten. Which task a row is of has to be known, as in task-incremental learning
    (``known="task"`` of `ContinualTask`).

    Args:
        tasks: how many there are.
    """

    tasks: int = arguments.natural(2)

    def __post_init__(self) -> None:
        """Begin with the first task."""
        super().__post_init__()
        self.task = 0

    @cached_property
    def members(self) -> list[Method]:
        """The methods of the tasks."""
        base = self.name or self.method.delta
        return [dataclasses.replace(self.method, name=f"{base}_{task}") for task in range(self.tasks)]

    def prepare(self, batch: Any) -> Any:
        """Return a batch as the delta that computes wants it."""
        return self.computing.prepare(batch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the deltas, of which that of the task computes."""
        super().setup(trainer, pl_module, stage)
        if self.finds_backbone(pl_module) and self.is_applied(pl_module):
            self.turn_to(pl_module, self.task)

    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule, task: int) -> None:
        """Train the delta of a task from now on."""
        self.task = task
        self._train_one(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train the delta of the task alone, also where a run goes on in the middle of one."""
        super().on_train_epoch_start(trainer, pl_module)
        self._train_one(pl_module)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let the delta of the task whose rows these are compute."""
        self.turn_to(pl_module, dataloader_idx)
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    on_test_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the delta of the task that is trained compute again."""
        super().on_validation_end(trainer, pl_module)
        self.turn_to(pl_module, self.task)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the delta of the last task compute again."""
        super().on_test_end(trainer, pl_module)
        self.turn_to(pl_module, self.task)

    def turn_to(self, module: nn.Module, task: int) -> None:
        """Let the delta of a task compute, and the others rest."""
        self.computing = self.members[task]
        self.let_compute(module, self.computing)

    def state_dict(self) -> dict[str, Any]:
        """Return which task is trained."""
        return {"task": self.task, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the task of what `state_dict` has returned."""
        self.task = state_dict["task"]
        super().load_state_dict(state_dict)

    def _train_one(self, module: L.LightningModule) -> None:
        self.turn_to(module, self.task)
        known = {id(parameter) for parameter in trained(module).values()}
        for task, member in enumerate(self.members):
            for parameter in self.parameters_of(module, member).values():
                if id(parameter) in known:
                    parameter.requires_grad_(task == self.task)
