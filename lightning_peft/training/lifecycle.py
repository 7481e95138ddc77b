"""What a method adds to a LightningModule so that its checkpoints hold the delta and resume exactly.

Lightning has no callback hook between ``configure_model`` and the making of the optimizer, does not call
``Callback.on_save_checkpoint`` with ``save_weights_only``, and loads weights before ``Callback.on_load_checkpoint``. So
four hooks of the module are extended on the instance, by `functools.partial` of functions of this file: such a module
still pickles and deep-copies, and Lightning sees that the hook is overridden (with `functools.wraps` it would not).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core import select
from lightning_peft.core.delta import META, canonical, check, complete, delta_names, meta_of, metadata
from lightning_peft.core.errors import TuningError
from lightning_peft.core.tuning import tunings
from lightning_peft.training import patches, precision, strategy
from lightning_peft.training.loaders import gather, random_state, set_random_state
from lightning_peft.training.param_groups import schedulers_in, split_groups
from lightning_peft.training.weights import on_meta

if TYPE_CHECKING:
    from lightning_peft.training.method import Method

_ATTRIBUTE = "_lightning_peft_life"


class Pause(NamedTuple):
    """A save between two batches.

    Attributes:
        random: the state of the random generators to go on with.
        in_validation: whether a validation was running, which is then done again as a whole.
    """

    random: dict[str, Any]
    in_validation: bool


@dataclass
class Life:
    """What is known of a LightningModule that methods tune.

    Attributes:
        methods: the methods, in the order in which they are applied.
        resumed: metadata and optimizer states of the checkpoint that fit resumes from, until they are restored.
        pause: where a save stands that falls between two batches; None: at the hook that saves.
        validation_random: the random state before the latest validation during fit.
        gradients: whether each parameter that an optimizer has stepped has got a gradient yet, by name; it is kept in
            the first epoch of manual optimization.
    """

    methods: list["Method"] = field(default_factory=list)
    resumed: dict[str, Any] | None = None
    pause: Pause | None = None
    validation_random: dict[str, Any] | None = None
    gradients: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, module: L.LightningModule) -> "Life":
        """Return the record of this module; the first call extends the module's hooks."""
        life: Life | None = vars(module).get(_ATTRIBUTE)
        if life is None:
            life = vars(module)[_ATTRIBUTE] = cls()
            for hook, extend in (
                ("configure_optimizers", _configure_optimizers),
                ("on_save_checkpoint", _on_save_checkpoint),
                ("on_load_checkpoint", _on_load_checkpoint),
            ):
                patches.Patches.of(module).patch(module, hook, partial(extend, module, vars(module).get(hook)))
        return life

    def await_backbone(self, module: L.LightningModule, trainer: L.Trainer) -> None:
        """Apply the methods when ``configure_model`` has built the backbone; the extension then removes itself."""
        hook = vars(module).get("configure_model")
        if not isinstance(hook, partial) or hook.func is not _configure_model:
            patches.of_run(trainer).patch(module, "configure_model", partial(_configure_model, module, hook))

    def end_run(self) -> None:
        """Forget what concerns one run: an exception may have ended it before a checkpoint was restored."""
        self.resumed = self.pause = self.validation_random = None
        self.gradients = {}

    def apply(self, module: L.LightningModule) -> None:
        """Apply each method whose backbone is there, and freeze again what something else may have thawed."""
        plugin = self._replace_layers(module)
        for method in self.methods:
            if method.finds_backbone(module) and not method.is_applied(module) and not strategy.goes_first(module):
                try:
                    method.apply(module)
                except TuningError as error:
                    if hint := precision.hint(plugin):
                        raise TuningError(f"{error}{hint}") from None
                    raise
        for _, backbone, tuning in tunings(module):
            tuning.freeze(backbone)
        if precision.replaces_layers(plugin):
            precision.check_trainable(module)

    def _replace_layers(self, module: L.LightningModule) -> Any:
        """Let the Trainer's precision plugin replace layers while there are no grafts, which would go with them."""
        trainer = _trainer(module)
        plugin = None if trainer is None else trainer.precision_plugin
        if not precision.replaces_layers(plugin) or any(tunings(module)) or strategy.goes_first(module):
            return plugin
        found = [select.backbone_of(module, m.backbone) for m in self.methods if m.finds_backbone(module)]
        if found:
            precision.replace_layers(module, found, plugin)
        return plugin


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


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


def restore_random_state(module: L.LightningModule, rank: int, mid_epoch: bool) -> None:
    """Put this rank's generators where they were when the checkpoint being resumed was written.

    A run saved at the end of an epoch makes its next data iterator after that, one saved inside an epoch has made it
    before: the caller says at which of the two it stands.
    """
    checkpoint = Life.of(module).resumed
    resume = checkpoint[META].get("resume") if checkpoint is not None else None
    if resume is not None and resume["mid_epoch"] is mid_epoch and rank < len(resume["random"]):
        set_random_state(resume["random"][rank])


def _previous(module: L.LightningModule, instance_hook: Callable[..., Any] | None, name: str) -> Callable[..., Any]:
    return instance_hook or partial(getattr(type(module), name), module)


def _configure_model(module: L.LightningModule, instance_hook: Callable[..., Any] | None) -> None:
    trainer = _trainer(module)
    if trainer is not None:
        patches.of_run(trainer).undo(module, "configure_model")
    _previous(module, instance_hook, "configure_model")()
    strategy.split(module, trainer)
    if on_meta(module):
        strategy.shard(module, trainer)  # its weights come shard by shard; methods may look at them
    Life.of(module).apply(module)
    strategy.shard(module, trainer)


def _configure_optimizers(module: L.LightningModule, instance_hook: Callable[..., Any] | None) -> Any:
    configured = _previous(module, instance_hook, "configure_optimizers")()
    optimizers = optimizers_in(configured)
    wanted = trained(module)
    if not wanted:
        raise TuningError(
            f"{type(module).__name__} has nothing to train: give it a head, or train more of the backbone."
        )
    ids = {id(p) for p in wanted.values()}
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]} & ids
    if not held:
        raise TuningError(
            f"configure_optimizers of {type(module).__name__} gives no optimizer that holds one of the {len(wanted)} "
            "trained parameters: build it from self.parameters()."
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in ids]
    optimizers[0].param_groups[0]["params"].extend(p for p in wanted.values() if id(p) not in held)
    options = _options(module)
    split_groups(optimizers, schedulers_in(configured), lambda parameter: options.get(id(parameter), {}))
    return configured


def _options(module: L.LightningModule) -> dict[int, dict[str, Any]]:
    """Return what the methods ask of the optimizer for single parameters, by the identity of the parameter."""
    return {
        id(parameter): dict(merged)
        for _, backbone, tuning in tunings(module)
        for name, parameter in trained(backbone).items()
        if (merged := [item for m in tuning.methods.values() for item in m.optimizer_options(name).items()])
    }


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form ``configure_optimizers`` may return them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for entry in configured for optimizer in optimizers_in(entry)]
    return []


def _on_save_checkpoint(
    module: L.LightningModule, instance_hook: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    _previous(module, instance_hook, "on_save_checkpoint")(checkpoint)
    names = {canonical(name) for name in delta_names(module)}
    for holder, key in _states(checkpoint):
        holder[key] = {canonical(n): t for n, t in holder[key].items() if canonical(n) in names}
    meta = metadata(module)
    trainer = _trainer(module)
    if trainer is not None and "optimizer_states" in checkpoint:
        flat = strategy.keeps_own_optimizer(module)
        meta["optimizers"] = [] if flat else optimizer_names(module, trainer.optimizers)
        pause = Life.of(module).pause
        mid_epoch = pause is not None or not trainer.is_last_batch
        meta["resume"] = {"mid_epoch": mid_epoch, "random": gather(pause.random if pause else random_state())}
        if pause is not None:
            _rewind(checkpoint["loops"]["fit_loop"], pause)
    checkpoint[META] = meta


def _on_load_checkpoint(
    module: L.LightningModule, instance_hook: Callable[..., Any] | None, checkpoint: dict[str, Any]
) -> None:
    trainer = _trainer(module)
    source = str(trainer.ckpt_path) if trainer is not None and trainer.ckpt_path else "the checkpoint"
    meta = meta_of(checkpoint, source)
    for holder, key in _states(checkpoint):
        holder[key] = complete(module, check(module, holder[key], meta, source))
    if trainer is not None and trainer.state.fn == "fit":
        Life.of(module).resumed = {META: meta, "optimizer_states": checkpoint.get("optimizer_states", [])}
    _previous(module, instance_hook, "on_load_checkpoint")(checkpoint)


def _rewind(loops: dict[str, Any], pause: Pause) -> None:
    """Say of the loops that they stand just after the latest training batch, or just before a validation.

    Lightning resumes rightly from few places. The names are those of its loops' ``state_dict``, which have no public
    form; ``tests/training/test_requeue.py`` compares interrupted runs with uninterrupted ones.
    """
    if pause.in_validation:
        progress = loops["epoch_loop.val_loop.batch_progress"]
        done = progress["total"]["completed"] - progress["current"]["completed"]
        progress["total"].update(ready=done + 1, started=done + 1, processed=done, completed=done)
        progress["current"].update(ready=0, started=0, processed=0, completed=0)
        progress["is_last_batch"] = False
        return
    progress = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches = progress[part]["completed"]
        progress[part].update(ready=batches, started=batches, processed=batches, completed=max(batches - 1, 0))
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _trainer(module: L.LightningModule) -> L.Trainer | None:
    try:
        return module.trainer
    except RuntimeError:  # it is attached to none
        return None


def _states(checkpoint: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return where a checkpoint holds state dicts of the module: its own, and those of averaging callbacks."""
    averages = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    candidates = [
        *((checkpoint, key) for key in ("state_dict", "current_model_state")),
        *((state, "average_model_state") for state in averages),
    ]
    return [(holder, key) for holder, key in candidates if holder.get(key)]
