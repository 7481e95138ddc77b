"""Data in the same order after an interruption in the middle of an epoch, and the random numbers that go with it.

Lightning counts the batches of an interrupted epoch but starts its sampler again, so the first batches are seen twice
and the last ones never. Here a loader knows
the state that the random generators had when its iterator was made; the resumed one makes its iterator from that state
and reads on to the batch that comes next. A loader with a state of its own (torchdata's ``StatefulDataLoader``) is left
alone.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy
import torch

from lightning_peft.training import patches, signals


class ResumableLoader:
    """A DataLoader that can go on in the middle of an epoch; in all else it is the loader that it is made of.

    Args:
        loader: what Lightning is about to read.
        fetched: returns how many batches of this epoch training has taken, 0 when the epoch is over.
        epoch: returns the number of this epoch, or None where samplers know it already.
        on_iter: is told the state of the random generators just before an iterator is made.
    """

    def __init__(
        self,
        loader: Any,
        fetched: Callable[[], int],
        epoch: Callable[[], int | None] = lambda: None,
        on_iter: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.loader, self._fetched, self._epoch, self._on_iter = loader, fetched, epoch, on_iter
        self._random: dict[str, Any] | None = None
        self._resume: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        if resume is not None and resume["random"] is not None:
            set_random_state(resume["random"])
        self._random = random_state()
        if self._on_iter is not None:
            self._on_iter(self._random)
        if (epoch := self._epoch()) is not None:
            # Lightning tells samplers the epoch of a resumed run when the iterator has been made.
            _set_epoch(self.loader, epoch)
        with signals.held_back():  # worker processes are started here
            iterator = iter(self.loader)
        for _ in range(resume["batches"] if resume is not None else 0):
            next(iterator, None)
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Return where each rank stands in its epoch; every rank must call it."""
        batches = self._fetched()
        return {"batches": batches, "ranks": gather(self._random) if batches else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iterator go on where the rank of this number stood."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        same = len(state["ranks"]) == (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        if state["batches"]:
            self._resume = {"batches": state["batches"], "random": state["ranks"][rank] if same else None}


def install(trainer: L.Trainer, on_validation: Callable[[dict[str, Any]], None]) -> None:
    """Let fit read its training data through `ResumableLoader`; no loader's workers get the signals of `signals.STOP`.

    Args:
        trainer: its strategy is asked by Lightning to process each loader.
        on_validation: is told the state of the random generators before a validation makes an iterator.
    """
    hook = partial(_process, trainer, on_validation)
    patches.of_run(trainer).patch(trainer.strategy, "process_dataloader", hook)


def _process(trainer: L.Trainer, on_validation: Callable[[dict[str, Any]], None], loader: Any) -> Any:
    loader = type(trainer.strategy).process_dataloader(trainer.strategy, loader)
    if trainer.state.fn != "fit" or isinstance(loader, ResumableLoader):
        return loader
    if not trainer.training:
        return ResumableLoader(loader, lambda: 0, on_iter=on_validation)
    if hasattr(loader, "state_dict"):
        return loader
    return ResumableLoader(loader, partial(_fetched, trainer), partial(_epoch, trainer))


def _epoch(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def _set_epoch(loader: Any, epoch: int) -> None:
    batches = getattr(loader, "batch_sampler", None)
    for sampler in {
        id(s): s for s in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    }.values():
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _fetched(trainer: L.Trainer) -> int:
    progress = trainer.fit_loop.epoch_loop.batch_progress
    # The next batch may have been read but not begun.
    if progress.current.started < progress.current.ready:  # type: ignore[attr-defined]
        return progress.current.completed
    return 0 if progress.is_last_batch else progress.current.ready


def random_state() -> dict[str, Any]:
    """Return the state of all random generators of this process as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys, "int64")), position, has_gauss, gauss],
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the random generators of this process where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def gather(state: Any) -> list[Any]:
    """Return the states of all ranks, in order; every rank must call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
