"""A LightningModule around a tiny model, its data, and a Trainer that says nothing."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.models import batch, known


class Tuned(L.LightningModule):
    """Trains a tiny model by the loss that it computes itself. It knows nothing of any method."""

    def __init__(
        self, kind: str = "bert", dropout: float = 0.0, optimizer: Literal["Adam", "SGD"] = "Adam", lr: float = 1e-2
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = known(kind, dropout).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.hparams.optimizer)(self.parameters(), lr=self.hparams.lr)


class OfPairs(Tuned):
    """As `Tuned`, of batches that are pairs of inputs (a mapping of texts, or images themselves) and labels."""

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(_named(batch), batch_idx)

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        super().validation_step(_named(batch), batch_idx)


def _named(pair: tuple[Any, Tensor]) -> dict[str, Tensor]:
    inputs = {"pixel_values": pair[0]} if isinstance(pair[0], Tensor) else pair[0]
    return {**inputs, "labels": pair[1]}


def pairs(batches: DataLoader) -> DataLoader:
    """Return a loader of the same rows, each a pair of inputs and labels."""
    rows = [({n: c for n, c in row.items() if n != "labels"}, row["labels"]) for row in batches.dataset]
    images = [(inputs.get("pixel_values", inputs), labels) for inputs, labels in rows]
    return DataLoader(images, batches.batch_size)


def loader(kind: str, rows: int = 12, size: int = 4, shuffle: bool = False, padded: bool = True) -> DataLoader:
    """Return batches of plain dicts."""
    columns = batch(kind, size=rows, padded=padded, seed=1)
    return DataLoader([{name: c[i] for name, c in columns.items()} for i in range(rows)], size, shuffle)


def trainer(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """Return a Trainer on one CPU; without a ModelCheckpoint among the callbacks it writes nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    writes = any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks)
    defaults = quiet | {"accelerator": "cpu", "devices": 1, "enable_checkpointing": writes, "max_epochs": 1}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **defaults | kwargs)
