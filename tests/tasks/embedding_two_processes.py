"""One step on pairs, of which one process has 4 and the other 3.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.tasks.embedding_two_processes MODEL FOLDER
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import LoRA, SentenceEmbedding, SentencePairsData, collect
from tests.processes import quiet_trainer
from tests.valley import set_up


class Descending(SentenceEmbedding):
    """Takes plain steps along the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


def step(model: str, folder: Path, ranks: int) -> dict[str, Tensor]:
    """Return what one step makes of 7 pairs."""
    L.seed_everything(0, verbose=False)
    data = SentencePairsData(tokenizer=model, dataset="made://matches", batch_size=7)
    set_up(data)
    rows = data.rows("validation").select(range(7)).to_list()
    own = rows if ranks == 1 else rows[:4] if os.environ["RANK"] == "0" else rows[4:]
    ids = [data.tokenizer([row["anchor"], row["positive"]])["input_ids"] for row in own]
    batch = data.padder("train")({"ids": ids})
    task = Descending(model, symmetric=True)
    run = quiet_trainer(folder, ranks, LoRA(r=2), max_steps=1, use_distributed_sampler=False, limit_val_batches=0)
    loader = DataLoader([batch], batch_size=None)
    run.fit(task, loader, loader)
    return collect(task)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    datasets.disable_progress_bars()
    found = step(sys.argv[1], Path(sys.argv[2]), 2)
    if os.environ["RANK"] == "0":
        torch.save(found, Path(sys.argv[2], "two.pt"))
