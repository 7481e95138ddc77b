"""Makes data loaders resume in the middle of an epoch, with the random state that belongs to it.

Lightning counts the batches of an interrupted epoch but starts its sampler again, so the first batches are seen twice
and the last ones never. `Resumable` is the one place that remembers where an epoch stands: the loaders of our
DataModules are of it, and training reads any other loader through a `ResumableLoader`. One with a state of its own
(torchdata's ``StatefulDataLoader``) is left alone.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import lightning as L
import numpy
import torch

from lightning_peft.core.delta_file import META
from lightning_peft.training import patches, signals
from lightning_peft.training.record import Life


class Resumable:
    """A loader that can resume in the middle of an epoch; a subclass makes the iterator and its state."""

    trainer: L.Trainer | None = None
    """Whose training reads it; it knows which of the batches that were given out have been begun."""
    _given = 0
    _resume: Mapping[str, Any] | None = None

    def begin(self, state: Mapping[str, Any] | None) -> tuple[Iterator[Any], int]:
        """Return an iterator that goes on from a state, and the number of its first batch; None: from the beginning."""
        raise NotImplementedError

    def position(self, batches: int) -> dict[str, Any]:
        """Return the state of an epoch of which so many batches have been taken; every rank must call it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator of batches, made now as without us or, in a run that resumes, with the first of them.

        Lightning may restore its loops and set the epoch after it has made one, and workers would have read on by then.
        """
        later = self._resume is not None or self._may_resume() or self._needs_epoch()
        return self._read(None if later else self._started())

    def _needs_epoch(self) -> bool:
        """Tell whether workers read at once what depends on the number of the epoch."""
        sampler = getattr(self, "sampler", None)
        inner = getattr(getattr(self, "batch_sampler", None), "sampler", None)
        return bool(getattr(self, "num_workers", 0)) and any(hasattr(each, "set_epoch") for each in (sampler, inner))

    def _may_resume(self) -> bool:
        if self.trainer is None:
            return False
        resumed = Life.of(self.trainer.lightning_module).resumed
        restores_late = self.trainer.strategy.restore_checkpoint_after_setup and self.trainer.ckpt_path is not None
        return restores_late or (resumed is not None and "resume" in resumed[META])

    def _started(self) -> Iterator[Any]:
        state, self._resume = self._resume, None
        with signals.held_back():  # worker processes are started here
            iterator, self._given = self.begin(state)
        return iterator

    def _read(self, iterator: Iterator[Any] | None) -> Iterator[Any]:
        if iterator is None:
            self._load_late()
            iterator = self._started()
        for batch in iterator:
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch; every rank must call it."""
        self._load_late()
        if self._resume is not None:  # nothing has been read since
            return dict(self._resume)
        return self.position(self._given if self.trainer is None else _begun(self.trainer))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make the next iterator start from that position."""
        self._resume = state_dict if state_dict["batches"] else None

    def _load_late(self) -> None:
        """Let Lightning load states that it forgets if a schedule has asked for the number of steps before.

        https://github.com/Lightning-AI/pytorch-lightning/issues/20550,
        https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/fit_loop.py
        """
        if self.trainer is not None:
            self.trainer.fit_loop._load_combined_loader_states()


class SameLoader:
    """A wrapper of a loader that forwards reading and writing of attributes to it, and is an instance of its class."""

    loader: Any = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the loader: ``trainer.train_dataloader`` stays a ``DataLoader``."""
        return type(self.loader)

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is of this class here and all else on the loader, such as Lightning's ``worker_init_fn``."""
        if hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.loader, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),), vars(self)


class ResumableLoader(Resumable, SameLoader):
    """Any loader, which resumes by reading the epoch again up to the batch, from the same random state."""

    _random: dict[str, Any] | None = None

    def begin(self, state: Mapping[str, Any] | None) -> tuple[Iterator[Any], int]:
        """Return an iterator that is made from the random state of this rank, read on to the batch that is next."""
        now, batches = random_state(), state["batches"] if state is not None else 0
        ranks = state["ranks"] if state is not None else []
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        then = ranks[rank] if len(ranks) == size else None
        if then is not None:
            set_random_state(then)
        self._random = then or now
        iterator = iter(self.loader)
        for _ in range(batches):
            next(iterator, None)
        # Without a length Lightning reads ahead, before the random state of the save is restored.
        if then is not None and (self.trainer is None or self.trainer.num_training_batches != float("inf")):
            set_random_state(now)
        return iterator, batches

    def position(self, batches: int) -> dict[str, Any]:
        """Return the number of batches, and for each rank the random state that its iterator was made from."""
        return {"batches": batches, "ranks": gather(self._random) if batches else []}


class ValidationLoader(SameLoader):
    """Any loader, which reports the random state that a validation begins from.

    Args:
        loader: what Lightning is about to read.
        on_iter: is told the state of the random generators just before an iterator is made.
    """

    on_iter: Any = None

    def __init__(self, loader: Any, on_iter: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(loader)
        self.on_iter = on_iter

    def __iter__(self) -> Iterator[Any]:
        self.on_iter(random_state())
        with signals.held_back():  # worker processes are started here
            return iter(self.loader)


def resume_loaders(trainer: L.Trainer, on_validation: Callable[[dict[str, Any]], None]) -> None:
    """Wrap the training loaders of fit in `ResumableLoader`; no loader's workers get the signals of `signals.STOP`.

    Args:
        trainer: its strategy is asked by Lightning to process each loader.
        on_validation: is told the state of the random generators before a validation makes an iterator.
    """
    hook = partial(_process, trainer, on_validation)
    patches.of_run(trainer).patch(trainer.strategy, "process_dataloader", hook)


def _process(trainer: L.Trainer, on_validation: Callable[[dict[str, Any]], None], loader: Any) -> Any:
    loader = type(trainer.strategy).process_dataloader(trainer.strategy, loader)
    if trainer.state.fn != "fit" or isinstance(loader, SameLoader):
        return loader
    if not trainer.training:
        return ValidationLoader(loader, on_validation)
    if not hasattr(loader, "state_dict"):
        loader = ResumableLoader(loader)
    if isinstance(loader, Resumable):
        loader.trainer = trainer
    return loader


def _begun(trainer: L.Trainer) -> int:
    """Return how many batches of this epoch training has begun, 0 when the epoch is over."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    # The next batch may have been read but not begun.
    if progress.current.started < progress.current.ready:  # type: ignore[attr-defined]
        return progress.current.completed
    return 0 if progress.is_last_batch else progress.current.ready


def random_state() -> dict[str, Any]:
    """Return the state of all random generators of this process as tensors and plain values.

    Of the GPUs it is that of the process's own, whatever number it has: other processes draw from the others.
    """
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys, "int64")), position, has_gauss, gauss],
        "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random generators of this process to what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def gather(state: Any) -> list[Any]:
    """Return the states of all ranks, in order; every rank must call it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
