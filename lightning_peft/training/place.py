"""Says between which two batches a run stands when it is saved, and puts a resumed run there.

Lightning resumes rightly from few places: a file that was written at the last batch of an epoch skips its validation
and the hooks of its end, one that was written in a training step skips that step's batch, one of a run with
``max_steps`` counts an epoch twice. So a file says of the loops that they stand at one of the places below, from which
they go on. The names are those of the loops and of their ``state_dict``, which have no public form:
https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/fit_loop.py and
https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py
"""

from dataclasses import dataclass
from typing import Any, Literal

import lightning as L

from lightning_peft.training.record import Life

Stage = Literal["epoch", "begun", "batch", "validation", "validated", "end"]


@dataclass(frozen=True)
class Place:
    """Where a run goes on.

    Attributes:
        stage: before an epoch ('epoch'), before its first batch ('begun'), before another one ('batch'), before a
            validation, in the hooks after it, or at the end of an epoch whose batches are all done ('end').
        batches: how many batches of the epoch are done.
        is_again: whether what the run was doing is done again from its beginning, as a training step in which a save
            was made.
        is_hook: whether the hooks after a training batch were running.
        mid_step: whether an optimizer was being stepped, so that what is saved may be half of it.
    """

    stage: Stage
    batches: int = 0
    is_again: bool = False
    is_hook: bool = False
    mid_step: bool = False


def place_of(trainer: L.Trainer) -> Place:
    """Return where a run goes on that is saved now, during or after fit."""
    life = Life.of(trainer.lightning_module)
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if epoch.processed == epoch.ready and batch.ready > 0 and not is_last(trainer):
        return Place("batch", batch.completed, is_again=True)  # a limit of steps has ended the epoch early
    if epoch.processed == epoch.ready or epoch.started < epoch.ready:
        return Place("epoch", is_again=batch.ready == 0)  # it may have failed to read its first batch
    if trainer.validating:
        return Place("validated" if life.validated else "validation", batch.ready, is_again=not life.validated)
    if batch.processed > batch.completed:
        return _after(trainer, batch.processed, is_hook=True)
    if batch.started == batch.completed:
        last = batch.ready == batch.completed and is_last(trainer) and batch.ready > 0
        return Place("end" if last else "batch" if batch.completed else "begun", batch.completed, is_again=True)
    if trainer.global_step > life.steps_before:
        return _after(trainer, batch.started, mid_step=True)
    done = batch.completed - batch.completed % trainer.accumulate_grad_batches
    return Place("batch" if done else "begun", done, is_again=True, mid_step=life.stepping)


def batches_done(trainer: L.Trainer) -> int:
    """Return how many batches of the present epoch have been begun; 0 before it begins."""
    epoch = trainer.fit_loop.epoch_progress.current
    begun = epoch.ready > epoch.processed  # type: ignore[attr-defined]
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready if begun else 0


def is_last(trainer: L.Trainer) -> bool:
    """Tell whether the latest batch is the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.is_last_batch or progress.current.ready == trainer.num_training_batches


def accumulates(trainer: L.Trainer, batches: int) -> bool:
    """Tell whether gradients are kept after so many batches of an epoch, for the step of a later one."""
    latest = batches == trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return batches % trainer.accumulate_grad_batches != 0 and not (latest and is_last(trainer))


def write(loops: dict[str, Any], place: Place, trainer: L.Trainer) -> None:
    """Say in the state of the fit loop that a run stands at this place."""
    for part in ("total", "current"):
        epoch, batch = loops["epoch_progress"][part], loops["epoch_loop.batch_progress"][part]
        if place.stage == "epoch":
            epochs = max(epoch["processed"], epoch["completed"])
            epoch.update(ready=epochs, started=epochs, processed=epochs, completed=epochs)
        else:
            epochs = epoch["ready"] - 1
            epoch.update(ready=epochs + 1, started=epochs + 1, processed=epochs, completed=epochs)
        undone = 0 if place.stage == "epoch" else trainer.fit_loop.epoch_loop.batch_progress.current.ready
        done = place.batches if part == "current" else batch["ready"] - max(undone - place.batches, 0)
        # One that is completed by half makes Lightning go straight on to the next one.
        batch.update(ready=done, started=done, processed=done, completed=done - (place.stage == "batch"))
    if place.stage in ("epoch", "begun", "batch"):
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += _steps_to_note(place, trainer)
    _write_validation(loops["epoch_loop.val_loop.batch_progress"], place)


def restart(trainer: L.Trainer, place: Place) -> None:
    """Make the restored loops go on at a place; for ``on_train_start``."""
    loop = trainer.fit_loop
    load_loaders(trainer)
    total: Any = loop.epoch_loop.val_loop.batch_progress.total
    total.ready = total.started = total.processed = total.completed  # a validation that is done again is not begun
    if place.stage in ("epoch", "begun"):
        loop.epoch_loop.restarting = False
    elif place.stage == "end" and loop._data_fetcher is not None:
        loop._data_fetcher.iterator = iter(())
    # A loop that restarts leaves out the schedulers that follow a metric. Its setter would tell the loops below.
    loop._restarting = False


def loaders_of(trainer: L.Trainer) -> list[Any]:
    """Return the loaders of training, as Lightning reads them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def load_loaders(trainer: L.Trainer) -> None:
    """Let Lightning give the loaders the states of a checkpoint, if it has not done so."""
    trainer.fit_loop._load_combined_loader_states()


def read_anew(trainer: L.Trainer) -> None:
    """Let Lightning begin an epoch's iterator again."""
    if trainer.fit_loop._data_fetcher is not None:
        iter(trainer.fit_loop._data_fetcher)


def read_ahead(trainer: L.Trainer, place: Place) -> int:
    """Return how many batches have been read that are not done at a place."""
    fetcher = trainer.fit_loop._data_fetcher
    return 0 if fetcher is None else fetcher.fetched - place.batches


def _after(trainer: L.Trainer, batches: int, **known: bool) -> Place:
    """Return the place after a batch that is done: before what comes between it and the next one."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None and loop._should_check_val_fx(fetcher):
        return Place("validation", batches, **known)
    return Place("end" if is_last(trainer) else "batch", batches, **known)


def _steps_to_note(place: Place, trainer: L.Trainer) -> int:
    """Return what to add to the number of batches that stepped, of which Lightning adds one itself at some places."""
    if accumulates(trainer, place.batches):
        return 0
    if place.stage == "batch":
        return -1 if place.is_again else 0
    return int(place.stage == "end" and not place.is_again)


def _write_validation(progress: dict[str, Any], place: Place) -> None:
    total, current, again = progress["total"], progress["current"], place.stage == "validation"
    done = total["completed"] - (current["completed"] if again and place.is_again else 0)
    total.update(ready=done + again, started=done + again, processed=done, completed=done)
    if again:
        current.update(ready=0, started=0, processed=0, completed=0)
        progress["is_last_batch"] = False
