"""Writes the delta, and what a run needs to resume exactly, into a module's checkpoint, and restores them."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.delta import delta_names, metadata
from lightning_peft.core.delta_file import META, meta_of, seal
from lightning_peft.core.delta_fit import fitted
from lightning_peft.core.delta_load import complete
from lightning_peft.core.errors import TuningError
from lightning_peft.core.pruned import whole_name
from lightning_peft.core.run import canonical
from lightning_peft.training import patches, resuming, strategy
from lightning_peft.training.conditions import conditions, warn_of_changes
from lightning_peft.training.guard import check_finite
from lightning_peft.training.place import loaders_of
from lightning_peft.training.random_states import of_rank, set_random_state
from lightning_peft.training.record import Life, trainer_of


def on_save_checkpoint(
    module: L.LightningModule, instance_hook: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    """Reduce the weights to the delta, and add its metadata and what a run needs to resume."""
    patches.inherited(module, instance_hook, "on_save_checkpoint")(checkpoint)
    check_finite(module, trainer_of(module))
    trainer, life = trainer_of(module), Life.of(module)
    if trainer is not None and life.started is not None:  # callbacks may have given the optimizers more
        life.hold(module, (p for o in trainer.optimizers for group in o.param_groups for p in group["params"]))
    life.note_moved(module)
    names = delta_names(module)
    meta = metadata(module, names)
    for holder, key in _states(checkpoint):
        holder[key] = _delta_of(module, holder[key], names)
    if trainer is not None and "optimizer_states" in checkpoint:
        flat = strategy.keeps_own_optimizer(module)
        meta["optimizers"] = [] if flat else optimizer_names(module, trainer.optimizers)
        # What a finder of Lightning saves before it trains, and loads again, shall not set random states.
        if trainer.fit_loop.epoch_progress.total.ready or loaders_of(trainer):
            meta["resume"] = resuming.note(module, trainer, checkpoint["loops"]["fit_loop"])
            meta["resume"]["conditions"] = conditions(trainer, module)
    checkpoint[META] = seal(meta, checkpoint)


def _delta_of(module: L.LightningModule, state: dict[str, Any], delta: Iterable[str]) -> dict[str, Any]:
    """Return what of a state dict belongs to the delta, by canonical name.

    Raises:
        TuningError: hooks, callbacks or ``state_dict`` have renamed or left out what is trained, or added something.
    """
    given = {canonical(name): tensor for name, tensor in state.items()}
    names = {whole_name(canonical(name), given) for name in delta}
    if lost := sorted(names - given.keys()):
        raise TuningError(
            f"{lost[0]} is trained and not among the {len(given)} tensors to be saved, e.g. {next(iter(given))}: let "
            "on_save_checkpoint, callbacks and state_dict keep their names."
        )
    live = {canonical(name) for name in module.state_dict()}
    if added := sorted(given.keys() - names - live):
        raise TuningError(
            f"a hook or callback has put {added[0]} into the state dict to be saved, and {type(module).__name__} has "
            "no tensor of that name: put it into the checkpoint beside the state dict, or register it as a buffer."
        )
    return {name: given[name] for name in given if name in names}


def on_load_checkpoint(
    module: L.LightningModule, instance_hook: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    """Check the delta against the module, and complete it with the frozen weights that are there.

    Raises:
        TuningError: the checkpoint is no delta, is not whole, or is not of this module.
    """
    trainer = trainer_of(module)
    source = str(trainer.ckpt_path) if trainer is not None and trainer.ckpt_path else "the checkpoint"
    meta = meta_of(checkpoint, source)
    for holder, key in _states(checkpoint):
        holder[key] = complete(module, fitted(module, holder[key], meta, source))
    pending = Life.of(module).resumed
    if trainer is not None and trainer.state.fn == "fit" and (pending is None or "resume" in meta):
        loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        Life.of(module).resumed = {
            META: meta,
            "optimizer_states": checkpoint.get("optimizer_states", []),
            "loaders": loops.get("combined_loader", []),
        }
    patches.inherited(module, instance_hook, "on_load_checkpoint")(checkpoint)


def _states(checkpoint: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return where a checkpoint holds state dicts of the module: its own, and those of averaging callbacks."""
    averages = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    candidates = [
        *((checkpoint, key) for key in ("state_dict", "current_model_state")),
        *((state, "average_model_state") for state in averages),
    ]
    return [(holder, key) for holder, key in candidates if holder.get(key)]


def remap_optimizers(module: L.LightningModule, optimizers: list[Optimizer]) -> None:
    """Bring the optimizer states of the checkpoint being resumed into the order of the parameters here.

    Optimizer states are numbered, so the moments of two parameters of one shape would change places silently.

    Raises:
        TuningError: the optimizer of the checkpoint held other parameters.
    """
    checkpoint = Life.of(module).resumed
    if checkpoint is None or "optimizers" not in checkpoint[META]:
        return
    saved = checkpoint[META].pop("optimizers", [])
    if strategy.keeps_own_optimizer(module):
        return
    for i, (names, now) in enumerate(zip(saved, optimizer_names(module, optimizers), strict=True)):
        then, here = [n for group in names for n in group], [n for group in now for n in group]
        if then == here:
            continue
        if sorted(then) != sorted(here) or [len(g) for g in names] != [len(g) for g in now]:
            odd = sorted(set(then) ^ set(here)) or ["the sizes of its groups"]
            raise TuningError(f"optimizer {i} of the checkpoint differs from this one in {odd[0]}: configure it alike.")
        state = checkpoint["optimizer_states"][i]
        by_name = {then[k]: value for k, value in state["state"].items()}
        state["state"] = {k: by_name[name] for k, name in enumerate(here) if name in by_name}
        for group, size in zip(state["param_groups"], range(len(now)), strict=True):
            start = sum(len(g) for g in now[:size])
            group["params"] = list(range(start, start + len(now[size])))


def optimizer_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[list[list[str]]]:
    """Return, for each optimizer and group, the canonical names of its parameters."""
    names = {id(p): canonical(name) for name, p in module.named_parameters()}
    return [[[names[id(p)] for p in group["params"]] for group in o.param_groups] for o in optimizers]


def warn_of_other_conditions(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Warn if the run that is resumed ran on other devices, or with other settings that its numbers depend on."""
    checkpoint = Life.of(module).resumed
    if checkpoint is not None and "resume" in checkpoint[META]:
        warn_of_changes(checkpoint[META]["resume"].get("conditions"), conditions(trainer, module))


def go_on(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Go on as the checkpoint being resumed says, if there is one; for ``on_train_start``."""
    life = Life.of(module)
    content, resumed, life.resumed = _content(module), life.resumed, None
    if content is not None and resumed is not None:
        resuming.restore(module, trainer, content, resumed["loaders"], str(trainer.ckpt_path))


def restore_random_state(module: L.LightningModule) -> None:
    """Restore the random state of a run that was saved between two epochs, before loaders are made from it."""
    content = _content(module)
    if content is not None and not content["mid_epoch"] and (state := of_rank(content["random"])) is not None:
        set_random_state(state)


def _content(module: L.LightningModule) -> dict[str, Any] | None:
    resumed = Life.of(module).resumed
    return None if resumed is None else resumed[META].get("resume")
