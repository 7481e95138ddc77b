"""Makes all ranks of a job fail together, with the reason, when one of them cannot begin.

A rank that cannot build its model would end before the others have met it, and they would wait for it until a time-out.
So it meets them, says why, and all end.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_peft.core.errors import TuningError
from lightning_peft.training import patches, slurm
from lightning_peft.training.requeue import environment_of

PLACES = ("accelerator", "strategy", "devices", "num_nodes", "plugins")
"""The arguments of a Trainer that say which ranks there are."""


def agree_to_begin(trainer: L.Trainer, problem: str = "") -> None:
    """Make the ranks of this trainer exchange their problems as soon as they are connected.

    Args:
        trainer: its strategy is changed on the instance; one of a single process is left alone.
        problem: of this rank; '' for none.
    """
    if trainer.world_size > 1:
        patches.once(trainer.strategy, "setup_environment", partial(_meet, trainer, problem))


def tell(trainer_class: Callable[..., L.Trainer], settings: Mapping[str, Any], problem: str) -> None:
    """Meet the other ranks, if there are any that wait, and end with them.

    Args:
        trainer_class: what the others have, or a function that makes one.
        settings: its arguments, those of `PLACES`.
        problem: why this rank has no model.

    Raises:
        TuningError: what all ranks say.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    trainer = trainer_class(**given, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    environment = environment_of(trainer)
    started = environment is not None and environment.creates_processes_externally
    if trainer.world_size > 1 and (started or trainer.num_nodes > 1 or "LOCAL_RANK" in os.environ):
        agree_to_begin(trainer, problem)
        trainer.fit(_Absent(), train_dataloaders=[torch.zeros(1)])


class _Absent(L.LightningModule):
    """Stands in for the model that could not be built."""

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Train nothing."""

    def configure_optimizers(self) -> None:
        """Optimize nothing."""


def _meet(trainer: L.Trainer, problem: str) -> None:
    trainer.strategy.setup_environment()
    if not torch.distributed.is_initialized():
        return
    said, where = [""] * trainer.world_size, f"rank {trainer.global_rank} on {slurm.node()}"
    torch.distributed.all_gather_object(said, f"{where}: {problem}" if problem else "")
    said = [sentence for sentence in said if sentence]
    if said:
        more = f" ({len(said)} of {trainer.world_size} ranks say so)" if len(said) > 1 else ""
        raise TuningError(f"{said[0]}{more}")
