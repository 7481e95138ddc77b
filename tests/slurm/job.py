"""The data and the reports of the jobs, which run LoRA on a tiny BERT by the console script."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_peft import save_delta
from tests.modules import loader


class Rows(L.LightningDataModule):
    """Forty rows for training, four for validation, in batches of two for each rank."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(loader("bert", rows=40).dataset, batch_size=2, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(loader("bert", rows=4).dataset, batch_size=2)


class Reports(L.Callback):
    """Writes the losses of rank 0, takes its time, and saves the final delta.

    Args:
        folder: where the reports go.
        pause: seconds that a step takes at least.
    """

    def __init__(self, folder: str, pause: float = 0.0) -> None:
        self.folder, self.pause = Path(folder), pause

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"losses.{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{restarts} {trainer.global_step} {float(outputs['loss'].detach()).hex()}\n")
        if not restarts:
            time.sleep(self.pause)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        delta = save_delta(module, self.folder / f".{trainer.global_rank}.safetensors")  # all ranks gather
        delta.rename(self.folder / "final.safetensors") if trainer.is_global_zero else delta.unlink()
