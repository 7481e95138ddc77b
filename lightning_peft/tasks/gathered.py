"""The vectors of all processes, which are each other's negatives."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.tasks.base import Task


def gathered(task: Task, vectors: Tensor) -> list[Tensor]:
    """Return the vectors of each process, with gradients; they may be unlike many."""
    trainer = task.attached
    if trainer is None or trainer.world_size == 1:
        return [vectors]
    strategy = trainer.strategy
    counts = strategy.all_gather(torch.tensor(len(vectors), device=vectors.device)).tolist()
    padded = F.pad(vectors, (0, 0, 0, max(counts) - len(vectors)))
    whole = strategy.all_gather(padded, sync_grads=True)
    return [part[:count] for part, count in zip(whole, counts, strict=True)]
