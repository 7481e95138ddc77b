"""Makes data loaders resume in the middle of an epoch, with the random state that belongs to it.

Lightning counts the batches of an interrupted epoch but starts its sampler again, so the first batches are seen twice
and the last ones never. `Resumable` is the one place that remembers where an epoch stands: the loaders of our
DataModules are of it, and training reads any other loader through a `ResumableLoader`. One with a state of its own
(torchdata's ``StatefulDataLoader``) is left alone.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.delta_file import META
from lightning_peft.training import patches, signals
from lightning_peft.training.loader_state import (
    SameLoader,
    ValidationLoader,
    go_on_from,
    goes_on,
    sample_of,
    state_of,
)
from lightning_peft.training.place import batches_done, is_last, load_loaders, place_of
from lightning_peft.training.random_states import difference, gather, of_rank, plain, set_random_state, snapshot
from lightning_peft.training.record import Life


class Fetch(NamedTuple):
    """One batch that a loader was asked for.

    Attributes:
        number: its number in the epoch, from 1.
        place: its number in the pass through the loader, which is the same unless a shorter one of two begins anew.
        before: the random state before it, and before its pass was begun if it is the first one.
        of: the state that the pass was begun from.
        sample: a checksum of a part of it.
    """

    number: int
    place: int
    before: dict[str, Any]
    of: Any = None
    sample: int = 0


class Resumable:
    """A loader that can resume in the middle of an epoch; a subclass makes the iterator and its state."""

    trainer: L.Trainer | None = None
    """Whose training reads it; it knows which of the batches that were given out are done."""
    _resume: Mapping[str, Any] | None = None
    _fetched: deque[Fetch] | None = None
    _pass: Any = None

    def begin(self, state: Mapping[str, Any] | None) -> tuple[Iterator[Any], int]:
        """Return an iterator that goes on from a state, and the number of batches before; None: from the beginning."""
        raise NotImplementedError

    def position(self, batches: int | None) -> dict[str, Any]:
        """Return the state of an epoch of which so many batches are done, None: before it; every rank must call it."""
        raise NotImplementedError

    def fetch(self, number: int) -> Fetch | None:
        """Return what is known of the batch of this number of the epoch, if it is one of the latest."""
        return next((fetch for fetch in self._fetched or () if fetch.number == number), None)

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator of batches, made now as without us or, in a run that resumes, with the first of them.

        Lightning may restore its loops and set the epoch after it has made one, and workers would have read on by then.
        """
        inside = self._resume is not None and (self._resume["batches"] or self._is_over())
        later = inside or self._may_resume() or self._needs_epoch()
        return self._read(None if later else self._started())

    def _needs_epoch(self) -> bool:
        """Tell whether workers read at once what depends on the number of the epoch."""
        sampler = getattr(self, "sampler", None)
        inner = getattr(getattr(self, "batch_sampler", None), "sampler", None)
        return bool(getattr(self, "num_workers", 0)) and any(hasattr(each, "set_epoch") for each in (sampler, inner))

    def _is_over(self) -> bool:
        """Tell whether all batches of the epoch that is resumed are done, and the next one has not begun."""
        over = self._resume is not None and self._resume.get("over")
        return bool(over and self.trainer is not None and batches_done(self.trainer))

    def _may_resume(self) -> bool:
        if self.trainer is None:
            return False
        resumed = Life.of(self.trainer.lightning_module).resumed
        restores_late = self.trainer.strategy.restore_checkpoint_after_setup and self.trainer.ckpt_path is not None
        return restores_late or (resumed is not None and "resume" in resumed[META])

    def _started(self) -> tuple[Iterator[Any], int, int]:
        """Return an iterator, and the numbers of the batches before it in the epoch and in the pass."""
        number = 0 if self.trainer is None else batches_done(self.trainer)
        state, self._resume = self._resume, None
        before = snapshot()
        with signals.held_back():  # worker processes are started here
            iterator, index = self.begin(state)
        if index and self._is_sized:  # else Lightning reads ahead, before the random state of the save is restored
            set_random_state(plain(before))
        if not number or self._fetched is None:
            self._fetched = deque(maxlen=3 + (self.trainer.accumulate_grad_batches if self.trainer is not None else 0))
        self._fetched.append(Fetch(number + 1, index + 1, before if not index else snapshot(), self._pass))
        return iterator, number, index

    def _read(self, started: tuple[Iterator[Any], int, int] | None) -> Iterator[Any]:
        if started is None:
            self._load_late()
            if self._is_over():
                return
            started = self._started()
        iterator, number, index = started
        of, fetched, is_first = self._pass, self._fetched, True
        assert fetched is not None
        while True:
            number, index, now = number + 1, index + 1, snapshot()
            if index == 1 and of is not None:
                of["first"] = now  # another loader may have begun a pass since, and a sampler draws late
            if not is_first:
                fetched.append(Fetch(number, index, now, of))
            is_first = False
            batch = next(iterator, _END)
            if batch is _END:
                return
            fetched[-1] = fetched[-1]._replace(sample=sample_of(batch))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch; every rank must call it."""
        self._load_late()
        if self._resume is not None:  # nothing has been read since
            return dict(self._resume)
        if self.trainer is None:
            return self.position(self._fetched[-1].number if self._fetched else 0)
        place = place_of(self.trainer)
        if place.stage in ("validation", "validated", "end") and is_last(self.trainer):
            return self.position(None) | {"over": True}
        return self.position(None if place.stage == "epoch" and not place.is_again else place.batches)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make the next iterator start from that position."""
        self._resume = state_dict

    @property
    def _is_sized(self) -> bool:
        return self.trainer is None or self.trainer.num_training_batches != float("inf")

    def _load_late(self) -> None:
        """Let Lightning load states that it forgets if a schedule has asked for the number of steps before.

        https://github.com/Lightning-AI/pytorch-lightning/issues/20550
        """
        if self.trainer is not None:
            load_loaders(self.trainer)


class ResumableLoader(Resumable, SameLoader):
    """Any loader, which resumes by reading the epoch again up to the batch, from the same random state."""

    def begin(self, state: Mapping[str, Any] | None) -> tuple[Iterator[Any], int]:
        """Return an iterator that is made from the random state of this rank, read on to the batch that is next."""
        mine = of_rank(state["ranks"]) if state is not None else None
        batches = state["batches"] if state is not None else 0
        if mine is not None:
            if mine["goes_on"] and not batches and not goes_on(self.loader):
                rank_zero_warn(
                    "worker processes that persist go on with random states of their own, which no file holds: if the "
                    "dataset draws random numbers, set persistent_workers=False for a run that resumes exactly."
                )
            go_on_from(self.loader, mine)
            if "made" in mine:
                set_random_state(mine["made"])
        self._pass = state_of(self.loader) | {"made": snapshot()}
        iterator = iter(self.loader)
        if mine is not None and batches:
            set_random_state(mine["made"] | mine["first"])
        self._pass["first"] = snapshot()
        for index in range(1, batches + 1):
            if mine is not None and index == batches > 1:
                set_random_state(mine["made"] | mine["last"])
            batch = next(iterator, None)
            if mine is not None and index == batches and sample_of(batch) != mine["sample"]:
                rank_zero_warn(
                    f"batch {index} of the epoch is not what it was in the run that is resumed, so the next ones may "
                    "differ, too: its loader draws from something that no file holds; give it a state_dict."
                )
        if mine is not None and "next" in mine and not self._is_sized:
            set_random_state(mine["made"] | mine["next"])
        return iterator, batches

    def position(self, batches: int | None) -> dict[str, Any]:
        """Return the number of batches, and for each rank the random state that its iterator was made from."""
        following, latest = (None, None) if batches is None else (self.fetch(batches + 1), self.fetch(batches))
        index = following.place - 1 if following is not None else latest.place if latest is not None else 0
        known = following or latest
        begun = known.of if known is not None else None
        if begun is None:
            return {"batches": 0, "ranks": gather(state_of(self.loader))}
        mine = {key: value for key, value in begun.items() if key not in ("made", "first")}
        if index or not self._is_sized:
            mine["made"] = plain(begun["made"])
        if index and latest is not None:
            mine |= {"sample": latest.sample, "first": difference(begun["first"], begun["made"])}
            mine["last"] = difference(latest.before, begun["made"])
            if following is not None and not self._is_sized:
                mine["next"] = difference(following.before, begun["made"])
        return {"batches": index, "ranks": gather(mine)}


def resume_loaders(trainer: L.Trainer) -> None:
    """Wrap the training loaders of fit in `ResumableLoader`; no loader's workers get the signals of `signals.STOP`.

    Args:
        trainer: its strategy is asked by Lightning to process each loader.
    """
    patches.of_run(trainer).patch(trainer.strategy, "process_dataloader", partial(_process, trainer))


def _process(trainer: L.Trainer, loader: Any) -> Any:
    loader = type(trainer.strategy).process_dataloader(trainer.strategy, loader)
    if trainer.state.fn != "fit" or isinstance(loader, SameLoader):
        return loader
    if not trainer.training:
        return ValidationLoader(loader, trainer)
    if not hasattr(loader, "state_dict"):
        loader = ResumableLoader(loader)
    if isinstance(loader, Resumable):
        loader.trainer = trainer
    return loader


_END = object()
