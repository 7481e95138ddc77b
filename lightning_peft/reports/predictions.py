"""Predictions as a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict_step`` returns as JSON lines, one a row with its number, in the order of the rows.

    ``predict_step`` returns a mapping of things that have one entry a row, or one such thing. Each process writes as it
    goes; the first one puts the rows together in the end.

    Args:
        file: where to write, below the trainer's ``default_root_dir`` if it is no absolute path.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.file = file

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an empty file."""
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch."""
        columns = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
        plain = {name: v.float().tolist() if isinstance(v, Tensor) else list(v) for name, v in columns.items()}
        with self._part(trainer, trainer.global_rank).open("a") as file:
            for row, values in zip(batch_indices or (), zip(*plain.values(), strict=True), strict=True):
                file.write(json.dumps({"row": row, **dict(zip(plain, values, strict=True))}) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the rows of all processes together."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
            lines = [line for part in parts for line in part.read_text().splitlines()]
            rows = {json.loads(line)["row"]: line for line in lines}  # ranks may share a row, to be of equal length
            path = self._part(trainer, 0).with_name(Path(self.file).name)
            path.write_text("".join(f"{rows[row]}\n" for row in sorted(rows)))
            for part in parts:
                part.unlink()
            Console(soft_wrap=True).print(f"{len(rows)} predictions in {path}", highlight=False)

    def _part(self, trainer: L.Trainer, rank: int) -> Path:
        path = Path(trainer.default_root_dir) / self.file
        return path.with_name(f".{path.name}.{rank}")
