"""``fit --lr_find true``: multiplies the learning rates by what a short fit of a copy of the model has shown."""

import gc
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_peft.core.errors import TuningError
from lightning_peft.tasks.base import Task
from lightning_peft.training import slurm
from lightning_peft.training.method import Method
from lightning_peft.training.rate_sweep import RateSweep
from lightning_peft.training.requeue import RequeueUnsaved, SafeRequeue

_LIMITS: dict[str, Any] = {
    "max_epochs": -1,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "profiler": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def find_rates(
    model: L.LightningModule,
    data: L.LightningDataModule | None,
    trainer: L.Trainer,
    sweeper: Callable[..., L.Trainer],
) -> None:
    """Multiply the learning rates of a task by the factor that is found; nothing else has changed.

    The model, its data and its methods are copied for it, so there has to be room for the backbone twice.

    Args:
        model: a task of this package.
        data: its data.
        trainer: what the fit is to run in.
        sweeper: builds another such Trainer with these callbacks and limits.

    Raises:
        TuningError: it is no task whose optimizer this package makes.
    """
    if not isinstance(model, Task) or "configure_optimizers" in vars(model):
        raise TuningError(
            "--lr_find multiplies the learning rates that a task of lightning_peft gives its own optimizer: leave it "
            "out beside a model of yours or --optimizer."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    sweep = RateSweep()
    with isolate_rng():
        copies = [deepcopy(callback) for callback in callbacks if isinstance(callback, Method)]
        ends = [RequeueUnsaved(_requeues(callbacks))] if slurm.is_job() or slurm.is_elastic() else []
        one = sweeper([*copies, sweep, *ends], max_steps=sweep.steps, **_LIMITS)
        one.fit(deepcopy(model), deepcopy(data))
    del one, copies
    gc.collect()
    model.rate_scale *= sweep.best()
    rank_zero_info(f"--lr_find: the learning rates are those recommended, or given, times {sweep.best():.2g}")


def _requeues(callbacks: list[Any]) -> bool:
    return all(one.requeue for one in callbacks if isinstance(one, SafeRequeue))
