"""How a Trainer writes and reads checkpoint files while a method is at work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_peft.files import atomic, read_torch


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and that are refused in one sentence when they are damaged.

    Lightning writes to the system's temporary folder and moves the file, which copies it where that is another disk.
    Remote paths (``s3://``) go the way of the parent class.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint beside its place and then rename it."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with atomic(path) as temporary:
                torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it, unless ``weights_only=False`` is asked for."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)
        return read_torch(Path(path), weights_only is not False, map_location or "cpu")


def install(trainer: L.Trainer) -> None:
    """Let the trainer use `AtomicCheckpointIO` where it would use Lightning's default; a user's own stays.

    `AsyncCheckpointIO` stays as it is: the strategy puts Lightning's default into it each time it is asked for.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
