"""Installs our hooks on a Trainer; `patches` removes them when its run ends."""

from functools import partial
from typing import Any

import lightning as L

from lightning_peft.core import host_copy
from lightning_peft.training import checkpoint_content, checkpoint_io, loaders, patches, requeue, strategy_files
from lightning_peft.training.record import Life


def install_hooks(trainer: L.Trainer, life: Life, module: L.LightningModule) -> None:
    """Install our hooks: atomic checkpoints, resumable data, strategies that save the delta, and SLURM requeueing.

    Raises:
        TuningError: the strategy would lose the delta, or a SLURM job was started wrongly.
    """
    patches.of_run(trainer).record(life, "run", life.end_run)
    strategy_files.save_deltas(trainer, partial(_restored, trainer, module))
    checkpoint_io.write_atomically(trainer)
    loaders.resume_loaders(trainer)
    requeue.add_requeue(trainer)
    patches.of_run(trainer).patch(trainer.strategy, "batch_to_device", partial(_moved, trainer))


def _moved(trainer: L.Trainer, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Move a batch, whose tensors then know what they were moved from."""
    strategy = trainer.strategy
    moved = type(strategy).batch_to_device(strategy, batch, *args, **kwargs)
    host_copy.note(moved, batch)
    return moved


def _restored(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Go on as the checkpoint says under strategies that read it later than the methods' ``on_fit_start``."""
    checkpoint_content.remap_optimizers(module, trainer.optimizers)
    checkpoint_content.restore_random_state(module)
