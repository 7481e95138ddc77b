"""Extends the hooks of a LightningModule to apply methods, optimize what they train, and save the delta.

Lightning has no callback hook between ``configure_model`` and the making of the optimizer, does not call
``Callback.on_save_checkpoint`` with ``save_weights_only``, and loads weights before ``Callback.on_load_checkpoint``. So
four hooks of the module are extended on the instance.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core import select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.tuning import tunings
from lightning_peft.training import checkpoint_content, patches, precision, strategy
from lightning_peft.training.param_groups import schedulers_in, split_groups
from lightning_peft.training.record import Life, trainer_of
from lightning_peft.training.weights import on_meta


def extend_hooks(module: L.LightningModule) -> Life:
    """Extend the hooks of this module, if that has not been done, and return its record.

    They stay when a run ends: its checkpoints hold the delta, whoever writes them.
    """
    life, table = Life.of(module), patches.Patches.of(module)
    if not life.is_extended:
        patches.extend(table, module, "configure_optimizers", _configure_optimizers)
        patches.extend(table, module, "on_save_checkpoint", checkpoint_content.on_save_checkpoint)
        patches.extend(table, module, "on_load_checkpoint", checkpoint_content.on_load_checkpoint)
        life.is_extended = True
    return life


def await_backbone(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Apply the methods when ``configure_model`` has built the backbone; the extension then removes itself."""
    patches.extend(patches.of_run(trainer), module, "configure_model", _configure_model)


def apply_methods(module: L.LightningModule) -> None:
    """Apply each method whose backbone is there, and freeze again what something else may have thawed."""
    plugin = _replace_layers(module)
    for method in Life.of(module).methods:
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


def _replace_layers(module: L.LightningModule) -> Any:
    """Let the Trainer's precision plugin replace layers while there are no grafts, which would go with them."""
    trainer = trainer_of(module)
    plugin = None if trainer is None else trainer.precision_plugin
    if not precision.replaces_layers(plugin) or any(tunings(module)) or strategy.goes_first(module):
        return plugin
    found = [select.backbone_of(module, m.backbone) for m in Life.of(module).methods if m.finds_backbone(module)]
    if found:
        precision.replace_layers(module, found, plugin)
    return plugin


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _configure_model(module: L.LightningModule, instance_hook: Callable[..., Any] | None) -> None:
    trainer = trainer_of(module)
    if trainer is not None:
        patches.of_run(trainer).undo(module, "configure_model")
    patches.inherited(module, instance_hook, "configure_model")()
    strategy.split(module, trainer)
    if on_meta(module):
        strategy.shard(module, trainer)  # its weights come shard by shard; methods may look at them
    apply_methods(module)
    strategy.shard(module, trainer)


def _configure_optimizers(module: L.LightningModule, instance_hook: Callable[..., Any] | None) -> Any:
    configured = patches.inherited(module, instance_hook, "configure_optimizers")()
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
