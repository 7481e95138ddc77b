"""What a checkpoint holds besides weights, moments and loops for a run to go on as if it had not been interrupted.

The random states, gradients that are being accumulated, metrics that callbacks and schedulers follow, schedulers that
would have followed one after the save, and what the validation loaders begin from. What no file can hold is noted as a
sentence, which the run that resumes says.
"""

import time
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_peft.core.delta import delta_names
from lightning_peft.core.run import canonical, trained
from lightning_peft.core.sharded import is_part
from lightning_peft.training import epoch_metrics
from lightning_peft.training.loader_state import state_of
from lightning_peft.training.loaders import Resumable
from lightning_peft.training.place import (
    Place,
    accumulates,
    is_last,
    loaders_of,
    place_of,
    read_ahead,
    read_anew,
    restart,
    write,
)
from lightning_peft.training.random_states import gather, of_rank, plain, random_state, set_random_state
from lightning_peft.training.record import Life


def note(module: L.LightningModule, trainer: L.Trainer, loops: dict[str, Any]) -> dict[str, Any]:
    """Return what a run that is saved now resumes from, and say so in the state of its loops; every rank must call it.

    Args:
        module: its own module.
        trainer: in fit, or after it.
        loops: state of the fit loop that is about to be saved; Lightning goes on from what is written into it.
    """
    place = place_of(trainer)
    metrics = _scalars(trainer.callback_metrics)
    held = Life.of(module).marks if _is_step_again(trainer, place) else epoch_metrics.marks(trainer)
    content = {
        "stage": place.stage,
        "mid_epoch": place.stage != "epoch",
        "random": gather(_random_state(module, trainer, place)),
        "metrics": metrics,
        "sums": gather(epoch_metrics.sums(trainer, held) if _is_inside(place) else {}),
        "schedulers": _schedulers_to_step(trainer, place, metrics),
        "validation": gather(_validation_states(module, place)),
        "gradients": gather(_gradients(module, trainer, place)),
        "says": _sentences(module, trainer, place),
        "clock": None if _interval(trainer) is None else time.monotonic() - trainer._last_val_time,  # type: ignore[attr-defined]
    }
    write(loops, place, trainer)
    return content


def restore(
    module: L.LightningModule, trainer: L.Trainer, content: dict[str, Any], loaders: list[Any], path: str
) -> None:
    """Go on as a checkpoint says; for ``on_train_start``, when Lightning has restored its own part.

    Args:
        module: its own module.
        trainer: in fit.
        content: what `note` returned.
        loaders: the states of the training loaders.
        path: of the checkpoint.
    """
    restart(trainer, Place(content["stage"]))
    life = Life.of(module)
    life.validation_states = list(of_rank(content["validation"]) or [])
    life.sums = dict(of_rank(content["sums"]) or {})
    gradients = of_rank(content["gradients"]) or {}
    for name, parameter in trained(module).items():
        if canonical(name) in gradients:
            parameter.grad = gradients[canonical(name)].to(parameter.device, parameter.dtype)
    trainer.callback_metrics.update({name: value.to(module.device) for name, value in content["metrics"].items()})
    for i, value in content["schedulers"]:
        module.lr_scheduler_step(trainer.lr_scheduler_configs[i].scheduler, value)
    if content.get("clock") is not None and _interval(trainer) is not None:
        trainer._last_val_time = time.monotonic() - content["clock"]  # type: ignore[attr-defined]
    for sentence in [*content["says"], *_says_now(trainer, content)]:
        rank_zero_warn(f"{path} does not resume exactly: {sentence}")
    if _is_inside(Place(content["stage"])):
        set_random_state(of_rank(content["random"]) or random_state())
    elif trainer.num_training_batches != float("inf"):  # without a length Lightning has read ahead
        _begin_epoch(trainer, loaders, of_rank(content["random"]) or random_state())


def _random_state(module: L.LightningModule, trainer: L.Trainer, place: Place) -> dict[str, Any]:
    life = Life.of(module)
    if place.is_again and place.stage in ("epoch", "validation") and life.validation_random is not None:
        return life.validation_random
    if place.is_again and place.stage in ("epoch", "begun", "batch"):
        ahead = 2 if trainer.num_training_batches == float("inf") and place.batches else 1
        for loader in loaders_of(trainer):
            if isinstance(loader, Resumable) and (fetch := loader.fetch(place.batches + ahead)) is not None:
                return plain(fetch.before)
    return random_state()


def _begin_epoch(trainer: L.Trainer, states: list[Any], random: dict[str, Any]) -> None:
    """Let the loaders begin an epoch as after the one that the checkpoint has ended with.

    Lightning gives states to those of an epoch that has begun alone, or begins with what is left of the one before.
    """
    stateful = [loader for loader in loaders_of(trainer) if hasattr(loader, "state_dict")]
    for loader, state in zip(stateful, states, strict=False):
        loader.load_state_dict(state)
        if not isinstance(loader, Resumable) and next(iter(loader), loader) is not loader:
            loader.load_state_dict(state)  # it had begun anew, and nothing was left of the epoch before
    set_random_state(random)
    read_anew(trainer)


def _validation_states(module: L.LightningModule, place: Place) -> list[Any]:
    loaders = Life.of(module).validation_loaders
    again = place.stage == "validation" and place.is_again
    return [loader.began if again and loader.began else state_of(loader.loader) for loader in loaders]


def _scalars(metrics: dict[str, Any]) -> dict[str, Tensor]:
    single = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and value.numel() == 1}
    return {name: value.detach().cpu().clone() for name, value in single.items()}


def _schedulers_to_step(trainer: L.Trainer, place: Place, metrics: dict[str, Tensor]) -> list[list[Any]]:
    """Return the numbers of the schedulers that would have followed a metric after the save, with its value.

    After a validation Lightning does it itself in the run that resumes.
    """
    epoch: Any = trainer.fit_loop.epoch_progress.current
    interval, count = "", 0
    if place.stage in ("batch", "end") and place.is_hook and not accumulates(trainer, place.batches):
        interval, count = "step", place.batches
    elif place.stage == "epoch" and epoch.completed < epoch.processed and is_last(trainer):
        interval, count = "epoch", trainer.current_epoch + 1
    return [
        [i, metrics[str(config.monitor)]]
        for i, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau and config.interval == interval and count % config.frequency == 0
        if config.monitor in metrics
    ]


def _gradients(module: L.LightningModule, trainer: L.Trainer, place: Place) -> dict[str, Tensor]:
    """Return the gradients that wait for the optimizer step of a later batch."""
    waits = accumulates(trainer, place.batches) and _is_inside(place)
    if not module.automatic_optimization:
        waits = trainer.global_step == Life.of(module).steps_before
    if not waits or _is_step_again(trainer, place):
        return {}
    grads = {canonical(name): p.grad for name, p in trained(module).items() if p.grad is not None}
    return {name: grad.detach().cpu().clone() for name, grad in grads.items() if not is_part(grad)}


def _interval(trainer: L.Trainer) -> float | None:
    """Return the seconds between two validations, if they come by the clock; a run keeps no time for the next.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py
    """
    seconds: float | None = trainer._val_check_time_interval  # type: ignore[attr-defined]
    return seconds


def _is_inside(place: Place) -> bool:
    """Tell whether a batch of the epoch is done."""
    return place.stage not in ("epoch", "begun")


def _is_step_again(trainer: L.Trainer, place: Place) -> bool:
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return place.is_again and batch.started > batch.processed


def _sentences(module: L.LightningModule, trainer: L.Trainer, place: Place) -> list[str]:
    """Return what the run that resumes from this place cannot do as this one would have."""
    said = [*_of_a_step(module, trainer, place), *_of_hooks(module, trainer, place)]
    if trainer.should_stop:
        said.append("the run that wrote it had been told to stop, as by EarlyStopping, and this one goes on.")
    waits = accumulates(trainer, place.batches) and _is_inside(place)
    if waits and any(is_part(p) for p in trained(module).values()):
        said.append("gradients in parts that were being accumulated are in no file: save after an optimizer step.")
    if _is_inside(place) and (others := epoch_metrics.others(trainer, Life.of(module))):
        said.append(f"what {others[0]} has summed in the epoch is in no file: log its value, not the metric.")
    ahead, foreign = read_ahead(trainer, place), [x for x in loaders_of(trainer) if not isinstance(x, Resumable)]
    if place.stage in ("begun", "batch") and ahead > 0 and foreign:
        said.append(f"its loader has a state of its own, which was {ahead} batches ahead of the training.")
    return said


def _of_a_step(module: L.LightningModule, trainer: L.Trainer, place: Place) -> Iterator[str]:
    if place.mid_step:
        yield "it was written while an optimizer was stepping: take the file before it."
    if not _is_step_again(trainer, place):
        return
    buffers = {canonical(name) for name, _ in module.named_buffers()}
    if moving := sorted(buffers.intersection(delta_names(module))):
        yield f"it was written inside of a training step, which may have moved {moving[0]} already."
    if not module.automatic_optimization and any(p.grad is not None for p in trained(module).values()):
        yield "it was written inside of a training step, with gradients of manual optimization in no file."
    if again := trainer.fit_loop.epoch_loop.batch_progress.current.completed - place.batches:
        yield f"{again} batches of the step that was not taken are done again, and count twice in metrics."


def _of_hooks(module: L.LightningModule, trainer: L.Trainer, place: Place) -> Iterator[str]:
    epoch: Any = trainer.fit_loop.epoch_progress.current
    ends = place.stage == "epoch" and epoch.completed < epoch.processed
    hooks = {"on_train_batch_end": place.is_hook, "on_validation_end": place.stage == "validated"}
    for hook in [hook for hook, runs in hooks.items() if runs and is_overridden(hook, module)]:
        yield f"{type(module).__name__}.{hook} comes after callbacks save, and is not called again: do it in the step."
    if trainer.interrupted and (ends or any(hooks.values())):
        yield "an exception has ended the hooks at the end of a batch, a validation or an epoch: not all have run."


def _says_now(trainer: L.Trainer, content: dict[str, Any]) -> list[str]:
    """Return what a run that resumes here cannot go on with, as it is set up."""
    said = []
    if trainer.reload_dataloaders_every_n_epochs > 1:  # type: ignore[attr-defined]
        said.append("the epochs in which loaders are made anew are counted from here: reload them in every epoch.")
    if _interval(trainer) is not None:
        said.append(
            "validation comes by the clock, so at other batches than there: give batches as val_check_interval."
        )
    unequal = (
        _is_inside(Place(content["stage"]))
        and len(loaders_of(trainer)) > 1
        and trainer.num_training_batches == float("inf")
    )
    if unequal:
        said.append("which of several loaders without a length was read to its end is in no file: save between epochs.")
    return said
