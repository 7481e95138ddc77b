"""The base class of our DataModules: splits of a stage, resumable and distributed loaders."""

from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.utilities import AttributeDict
from torch.utils.data import DataLoader

from lightning_peft.core.errors import TuningError
from lightning_peft.data.batches import Batches, BatchesLoader

SPLITS = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
"""Stage -> the splits that it reads."""


class DataArguments(L.LightningDataModule):
    """A DataModule whose arguments loggers are told as ``data/NAME``: tasks have some of the same names."""

    @property
    def hparams_initial(self) -> AttributeDict:
        """The arguments as a logger writes them; Lightning refuses two values of one name."""
        return AttributeDict({f"data/{name}": value for name, value in super().hparams_initial.items()})


class DataModule(DataArguments):
    """A DataModule whose training goes on with the batch that is next when a run is resumed."""

    batch_size: int
    num_workers: int

    def rows(self, split: str) -> Dataset | None:
        """Return the rows of 'train', 'validation', 'test' or 'predict', or None where there is no such split."""
        raise NotImplementedError

    def all_classes(self) -> Dataset:
        """Return rows among which every class occurs."""
        rows = self.rows("train")
        assert rows is not None
        return rows

    def prepare_data(self) -> None:
        """Read in one process of each machine; the others find the result in the cache of ``datasets``."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    @property
    def share(self) -> dict[str, Any]:
        """How many processes share the rows, and which of them this one is; empty where there is one alone."""
        return (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}

    @property
    def overfits(self) -> bool:
        """Whether the Trainer repeats a few batches, which it takes from a loader in the order of the rows."""
        return self.trainer is not None and bool(self.trainer.overfit_batches)  # type: ignore[attr-defined]

    def batches_loader(self, rows: Any, batches: Batches, **options: Any) -> BatchesLoader:
        """Return a loader of these batches of rows, which can go on in the middle of an epoch."""
        loader = BatchesLoader(rows, sampler=batches, batch_size=None, **self.loader_options(), **options)
        loader.trainer = self.trainer
        return loader

    def plain_loader(self, rows: Any, **options: Any) -> DataLoader[Any]:
        """Return a loader of the rows in their own order, which Lightning may share out as it likes."""
        return DataLoader(rows, batch_size=self.batch_size, **self.loader_options(), **options)

    def loader_options(self) -> dict[str, Any]:
        """Return what all loaders have in common."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "generator": torch.Generator(),  # without one, making an iterator draws from the global generator
        }


def check_least(least: int, **arguments: int | None) -> None:
    """See that arguments which are given are not too small.

    Raises:
        TuningError: one is below ``least``.
    """
    for name, value in arguments.items():
        if value is not None and value < least:
            raise TuningError(f"{name}={value} is out of range: take {least} or more.")
