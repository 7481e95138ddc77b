"""The base of the DataModules: training goes on with the batch that is next."""

from collections.abc import Mapping
from typing import Any, TypeVar

import lightning as L
from torch.utils.data import DataLoader

from lightning_peft.data.batches import BatchesLoader

Loader = TypeVar("Loader", bound=DataLoader[Any])


class ResumingData(L.LightningDataModule):
    """Says in a checkpoint how far its training batches have been given out, and goes on from there.

    Lightning restores loaders too, but not one that was asked for the number of steps before: a schedule does that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self._train_loader: BatchesLoader | None = None
        self._resume: Mapping[str, int] | None = None

    def resuming(self, loader: Loader) -> Loader:
        """Return the loader of the training batches, at the place where a checkpoint has left them."""
        if isinstance(loader, BatchesLoader):
            self._train_loader = loader
            if self._resume is not None:
                loader.load_state_dict(self._resume)
                self._resume = None
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Return how far the training batches have been given out."""
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches go on from there."""
        self._resume = state_dict
