"""A module, its rows and its Trainer, and what watches where a step waits for the GPU."""

import warnings
from collections import Counter
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpu.models import Setup


class Module(L.LightningModule):
    """A model that reads batches by name, and notes its losses and where its parameters are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[Tensor] = []
        self.devices: set[str] = set()

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.detach())
        self.devices |= {p.device.type for p in self.parameters()}
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows_of(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return the rows of a batch, one by one, repeated."""
    size = len(next(iter(batch.values())))
    return [{name: value[i % size].cpu() for name, value in batch.items()} for i in range(count)]


def fit(setup: Setup, module: L.LightningModule, rows: Any, *callbacks: Any, **options: Any) -> L.Trainer:
    """Train on batches of four rows."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    resume = options.pop("ckpt_path", None)
    options = quiet | {"accelerator": setup.device, "devices": 1, "enable_checkpointing": False} | options
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(rows, 4), ckpt_path=resume)
    return trainer


class Waits(L.Callback):
    """Counts where the steps after the first wait for the GPU, from this callback to its `end`, the last of the list.

    torch warns of each wait at the line of Python that asks; those of a frozen model are none of ours.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.end = _End(self)
        self._catching: Any = None
        self._caught: list[warnings.WarningMessage] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if args[3] > 0:
            self._catching = warnings.catch_warnings(record=True)
            self._caught = self._catching.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        if self._catching is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._catching.__exit__(None, None, None)
            self._catching = None
            for each in self._caught:
                if "synchroniz" in str(each.message):
                    self.places[f"{'/'.join(each.filename.split('/')[-2:])}:{each.lineno}"] += 1


class _End(L.Callback):
    def __init__(self, begun: Waits) -> None:
        self.begun = begun

    def on_train_batch_end(self, *args: Any) -> None:
        self.begun.stop()

    def on_exception(self, *args: Any) -> None:
        self.begun.stop()
