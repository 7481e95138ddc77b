"""What a Trainer is given when a method joins it, and what is taken from it again."""

import lightning as L

from lightning_peft.training import checkpoint_io, lifecycle, loaders, requeue, strategy, strategy_files
from lightning_peft.training.lifecycle import Life


def prepare(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let checkpoints be written whole, data resume in order, strategies know the delta, and SLURM jobs requeue.

    Raises:
        TuningError: the strategy would lose the delta, or a SLURM job was started wrongly.
    """
    life = Life.of(module)

    def remember(state: dict[str, object]) -> None:
        life.validation_random = state

    def restored() -> None:  # strategies that restore after their setup come later than the methods' on_fit_start
        lifecycle.remap_optimizers(module, trainer.optimizers)
        lifecycle.restore_random_state(module, trainer.global_rank, mid_epoch=False)

    strategy_files.install(trainer, restored)
    checkpoint_io.install(trainer)
    loaders.install(trainer, remember)
    requeue.install(trainer)


def begin(trainer: L.Trainer) -> None:
    """Claim the folders that checkpoints go to, before the first batch.

    Raises:
        TuningError: one cannot be written to, or another job writes there.
    """
    checkpoint_io.Claim.folders(trainer)


def release(trainer: L.Trainer) -> None:
    """Leave the trainer's parts as they were."""
    strategy.uninstall(trainer)
    loaders.uninstall(trainer)
    checkpoint_io.Claim.release()
