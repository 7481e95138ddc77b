"""Writes and reads a Trainer's checkpoint files: atomically, in order, and in folders that no other job writes to."""

import fcntl
import os
import socket
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_peft.core.delta_file import IN_FOLDER, read_checkpoint
from lightning_peft.core.errors import TuningError
from lightning_peft.core.sharded import is_folder
from lightning_peft.core.storage import DiskError, atomic, sweep
from lightning_peft.training import patches


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or absent, and that are refused in one sentence when they are damaged.

    Lightning writes to the system's temporary folder and moves the file, which copies it where that is another disk.
    Remote paths (``s3://``) go the way of the parent class.

    Args:
        on_error: what a full disk does: end training with an error, or warn and go on with the file that is there.
    """

    def __init__(self, on_error: Literal["raise", "warn"] = "raise") -> None:
        self.on_error = on_error
        self._failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint beside its place and then rename it."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            try:
                with atomic(path) as temporary:
                    torch.save(checkpoint, temporary)
            except DiskError as error:
                self._failed = True
                if self.on_error == "raise":
                    raise
                warnings.warn(str(error), stacklevel=2)
                return
            self._failed = False

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, but not to make room for one that could not be written."""
        if not self._failed:
            super().remove_checkpoint(path)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it, unless ``weights_only=False`` is asked for."""
        if is_folder(path):
            return read_checkpoint(path)
        if (Path(path) / IN_FOLDER).is_file():
            raise TuningError(
                f"{path} is of DeepSpeed, which alone can go on from it: take that strategy again, or read what was "
                f"learnt with load_delta(module, {str(path)!r})."
            )
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)
        return read_checkpoint(Path(path), weights_only is not False, map_location or "cpu")


class OrderedAsyncCheckpointIO(AsyncCheckpointIO):
    """Writes and removes in one background thread, in the order in which it is asked to.

    Lightning's removes at once, so that the old file is gone before the new one is whole:
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/plugins/io/async_plugin.py
    """

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Remove a checkpoint when what was to be written before has been."""
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(self._remove, *args, **kwargs)

    def _remove(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().remove_checkpoint(*args, **kwargs)
        except BaseException as error:  # it is raised in the training thread
            self._error = self._error or error


def write_atomically(trainer: L.Trainer) -> None:
    """Use `AtomicCheckpointIO` in place of Lightning's default; a user's own stays."""
    chosen, ours = trainer.strategy.checkpoint_io, AtomicCheckpointIO()
    table = patches.of_run(trainer)
    if type(chosen) is TorchCheckpointIO:
        table.patch(trainer.strategy, "checkpoint_io", ours, lasting=True)
    elif type(chosen) is AsyncCheckpointIO and type(chosen.checkpoint_io) is TorchCheckpointIO:
        table.patch(trainer.strategy, "checkpoint_io", OrderedAsyncCheckpointIO(ours), lasting=True)


class Claim:
    """Keeps other jobs out of the folders that a run writes checkpoints to, until it or the process ends."""

    _held: ClassVar[dict[Path, IO[str]]] = {}

    @classmethod
    def folders(cls, trainer: L.Trainer) -> None:
        """Claim the folders of all ModelCheckpoints for this process; every rank must call it.

        Raises:
            TuningError: one cannot be written to, or another process has claimed it.
        """
        problem = ""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            folders = {str(c.dirpath) for c in callbacks if c.dirpath is not None and "://" not in str(c.dirpath)}
            problem = next((said for folder in sorted(folders) if (said := cls._claim(trainer, Path(folder)))), "")
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise TuningError(problem)

    @classmethod
    def _release(cls, path: Path) -> None:
        path.unlink(missing_ok=True)
        cls._held.pop(path).close()

    @classmethod
    def _claim(cls, trainer: L.Trainer, folder: Path) -> str:
        path = folder / ".in-use"
        if path in cls._held:
            return ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            return f"checkpoints cannot be written to {folder} ({error.strerror}): give another dirpath."
        try:
            # Locks of this kind end with the process, also by kill -9, and reach across nodes on NFS and Lustre.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(folder)
        except BlockingIOError:
            with file:
                file.seek(0)
                who = file.read().strip() or "another process"
            return f"{who} writes checkpoints to {folder}: give this run its own."
        except OSError:
            pass  # this file system has no locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        cls._held[path] = file
        patches.of_run(trainer).record(cls, str(path), partial(cls._release, path))
        return ""
