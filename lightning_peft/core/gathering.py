"""Brings what each process has to all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def processes() -> int:
    """Return how many processes run together."""
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    return 1 if alone else torch.distributed.get_world_size()


def rows_of_each(rows: Tensor) -> list[Tensor]:
    """Return the rows of each process, [N, ...], with gradients; they may have unlike many."""
    if processes() == 1:
        return [rows]
    from torch.distributed.nn.functional import all_gather  # where torch has no processes it cannot be imported

    counts = torch.cat(all_gather(torch.tensor([len(rows)], device=rows.device))).tolist()
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))
    found = all_gather(padded.contiguous())
    return [part[:count] for part, count in zip(found, counts, strict=True)]


def rows_of_all(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in their order, [N, ...], with gradients; they may have unlike many."""
    return torch.cat(rows_of_each(rows))


def rows_in_turn(rows: Tensor) -> Tensor:
    """Return the rows of all processes, one of each in turn, as they were dealt out to them, [N, ...]."""
    parts = rows_of_each(rows)
    turns = torch.cat([torch.arange(len(part)) * len(parts) + i for i, part in enumerate(parts)])
    return torch.cat(parts)[turns.argsort().to(rows.device)]


def of_the_first(tensor: Tensor) -> Tensor:
    """Return the tensor of the first process, in each of them."""
    if processes() > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor
