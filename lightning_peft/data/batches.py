"""Batch samplers (shuffled, bucketed by length, distributed, multi-task), and a loader that resumes inside an epoch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_peft.core.errors import TuningError
from lightning_peft.training.loaders import Resumable

POOL = 50
"""How many batches are sorted by length together: more spares padding, fewer shuffles better."""


class Batches(DistributedSampler[list[int]]):
    """The batches of one process, as lists of row numbers: a function of the seed and the epoch alone.

    In an epoch every row is in one batch of one process, and all processes have equally many batches: a collective
    operation in the last one would wait forever otherwise. Together the processes see the batches that one process
    would see with a batch size that many times as large. Lightning leaves a DistributedSampler as it is and sets its
    epoch.

    Args:
        lengths: the length of each row [tokens].
        batch_size: rows of a batch in each process; the last batch may have fewer. If it has fewer than there are
            processes, its rows join the batch before.
        shuffle: whether the order changes with the epoch.
        bucket: whether rows of like length share batches.
        seed: of the order.
        num_replicas: how many processes share the rows.
        rank: which of them this one is.

    >>> list(Batches([3, 9, 4, 8, 5], 2, shuffle=False, bucket=True))
    [[0, 2], [4, 3], [1]]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        shuffle: bool,
        bucket: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        if len(lengths) < num_replicas:
            raise TuningError(f"{len(lengths)} rows do not go round {num_replicas} processes: use fewer processes.")
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.bucket = bucket
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the epoch, from batch number ``start`` on."""
        for batch in self._shared_batches()[self.start :]:
            yield batch[self.rank :: self.num_replicas].tolist()

    def __len__(self) -> int:
        """Return the number of batches of the whole epoch."""
        return sum(len(self._sizes(count)) for count in self._counts())

    def _counts(self) -> list[int]:
        """Return how many rows an epoch has of each group that shares no batch with the others."""
        return [len(self.lengths)]

    def _groups(self, draw: np.random.Generator) -> list[np.ndarray]:
        """Return the rows of an epoch, by group."""
        return [np.arange(len(self.lengths))]

    def _sizes(self, count: int) -> list[int]:
        """Return how many of ``count`` rows each batch has in all processes together."""
        full, rest = divmod(count, self.batch_size * self.num_replicas)
        sizes = [self.batch_size * self.num_replicas] * full
        if rest >= self.num_replicas or not full:
            return [*sizes, rest]
        sizes[-1] += rest
        return sizes

    def _shared_batches(self) -> list[np.ndarray]:
        draw = np.random.default_rng((self.seed, self.epoch))
        groups = self._groups(draw)
        batches = [batch for rows in groups for batch in self._batches_of(rows, draw)]
        if self.shuffle and (self.bucket or len(groups) > 1):
            batches = [batches[i] for i in draw.permutation(len(batches))]
        return batches

    def _batches_of(self, rows: np.ndarray, draw: np.random.Generator) -> list[np.ndarray]:
        if self.shuffle:
            draw.shuffle(rows)
        if self.bucket:
            size = POOL * self.batch_size * self.num_replicas if self.shuffle else len(rows)
            pools = (rows[start : start + size] for start in range(0, len(rows), size))
            rows = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        return np.split(rows, np.cumsum(self._sizes(len(rows)))[:-1])


class TaskBatches(Batches):
    """The batches of several tasks together: each task has its share of an epoch, the largest ones are capped.

    In training an epoch has ``min(rows, cap)`` rows of each task, drawn anew each epoch (examples-proportional mixing,
    Raffel et al. 2020, section 3.5.2; a cap of 3,000 in Wei et al. 2021, section 2.1).

    >>> list(TaskBatches([1, 1, 1, 1], 2, False, False, tasks=[0, 0, 1, 1], cap=None, mixed=False))
    [[0, 1], [2, 3]]

    Args:
        *args: as in `Batches`.
        tasks: the number of the task of each row.
        cap: the most rows of a task in an epoch of training; None: all.
        mixed: whether a batch has rows of several tasks.
        **kwargs: as in `Batches`.
    """

    def __init__(
        self, *args: Any, tasks: Sequence[int] | np.ndarray, cap: int | None, mixed: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        tasks = np.asarray(tasks)
        self.rows_of = [np.flatnonzero(tasks == task) for task in range(int(tasks.max()) + 1)]
        self.cap = cap if self.shuffle and cap is not None else len(tasks)
        self.mixed = mixed
        if min(self._counts()) < self.num_replicas:
            raise TuningError(
                f"a task has {min(map(len, self.rows_of))} rows, too few for {self.num_replicas} processes: "
                "use fewer processes, or mixed batches."
            )

    def _counts(self) -> list[int]:
        counts = [min(len(rows), self.cap) for rows in self.rows_of if len(rows)]
        return [sum(counts)] if self.mixed else counts

    def _groups(self, draw: np.random.Generator) -> list[np.ndarray]:
        groups = [
            rows if len(rows) <= self.cap else np.sort(draw.choice(rows, self.cap, replace=False))
            for rows in self.rows_of
            if len(rows)
        ]
        return [np.concatenate(groups)] if self.mixed else [rows.copy() for rows in groups]


class BatchesLoader(Resumable, DataLoader[Any]):  # type: ignore[misc]  # its __iter__ gives any iterator
    """A loader over `Batches` that goes on with the batch that is next, without reading those before it.

    Build it with ``sampler=Batches(...), batch_size=None``. A state holds for the epoch that it was saved in: another
    epoch starts at its first batch.
    """

    sampler: Batches

    def begin(self, state: Mapping[str, Any] | None) -> tuple[Iterator[Any], int]:
        """Return an iterator over the batches that are left.

        Raises:
            TuningError: the epoch of the state had another number of batches.
        """
        batches = self.sampler
        batches.start = 0
        if state is not None and state["epoch"] == batches.epoch:
            if state["batches"] and state["of"] != len(batches):
                raise TuningError(
                    f"the checkpoint was written after batch {state['batches']} of {state['of']}, now an epoch has "
                    f"{len(batches)}: resume with the same data, batch size and number of processes."
                )
            batches.start = state["batches"]
        return DataLoader.__iter__(self), batches.start

    def position(self, batches: int | None) -> dict[str, Any]:
        """Return the epoch, how many of its batches have been taken, and how many it has."""
        of = len(self.sampler)
        done = (batches or 0) % of  # the shorter of two is begun anew
        return {"epoch": self.sampler.epoch, "batches": done, "of": of}
