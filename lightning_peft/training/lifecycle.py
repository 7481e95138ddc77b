"""Extends the hooks of a LightningModule to apply methods, optimize what they train, and save the delta.

Lightning has no callback hook between ``configure_model`` and the making of the optimizer, does not call
``Callback.on_save_checkpoint`` with ``save_weights_only``, and loads weights before ``Callback.on_load_checkpoint``. So
four hooks of the module are extended on the instance.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core import select
from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.run import below_backbones, canonical, own_tunings, trained
from lightning_peft.core.stand_in import stand_ins
from lightning_peft.core.tuning import Tuning, tunings
from lightning_peft.training import checkpoint_content, patches, precision, strategy
from lightning_peft.training.finetuning import staged
from lightning_peft.training.param_groups import add_new, drop, schedulers_in, split_groups
from lightning_peft.training.record import Life, trainer_of
from lightning_peft.training.weights import on_meta

if TYPE_CHECKING:
    from lightning_peft.training.method import Method


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


def name_backbone(module: L.LightningModule, methods: list[TuningMethod]) -> None:
    """Let methods without ``backbone=`` name the only network of a module that has no transformers model.

    It is the one child with parameters, if that is made of several layers. Where the module has parameters of its own,
    or builds further children in ``configure_model``, the user names it.
    """
    networks = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    builds = type(module).configure_model is not L.LightningModule.configure_model
    if len(networks) != 1 or not any(networks[0][1].children()) or own or builds:
        return
    for method in methods:
        if method.backbone is None and not method.finds_backbone(module):
            method.backbone = networks[0][0]


def await_backbone(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Apply the methods when ``configure_model`` has built the backbone; the extension then removes itself."""
    patches.extend(patches.of_run(trainer), module, "configure_model", _configure_model)


def apply_methods(module: L.LightningModule) -> None:
    """Apply each method whose backbone is there, and freeze again what something else may have thawed."""
    plugin = _replace_layers(module)
    life, frozen = Life.of(module), staged(module)
    trainer = trainer_of(module)
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    own = [method for method in callbacks if isinstance(method, TuningMethod)]
    life.keys = set().union(*(method.keys for method in own or life.methods))
    for method in life.methods:
        if method.finds_backbone(module) and not strategy.goes_first(module):
            life.tuned = {*(life.tuned or ()), _path_of(module, method)}
            if method.is_applied(module):
                _check_at_work(module, method)
                continue
            try:
                method.apply(module)
            except TuningError as error:
                if hint := precision.hint(plugin):
                    raise TuningError(f"{error}{hint}") from None
                raise
    for _, backbone, tuning in own_tunings(module):
        tuning.freeze(backbone)
    for parameter in (p for p in module.parameters() if id(p) in frozen):
        parameter.requires_grad_(False)
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


def _check_at_work(module: L.LightningModule, method: "Method") -> None:
    tuning = Tuning.of(select.backbone_of(module, method.backbone))
    if tuning is not None and method.key in tuning.switch.off:
        raise TuningError(
            f"{method.delta} is a callback of this Trainer, but rests: let it compute by activate(model, "
            f"{method.delta!r}) before."
        )


def _path_of(module: L.LightningModule, method: "Method") -> str:
    """Return where the backbone of a method is in the module."""
    backbone = select.backbone_of(module, method.backbone)
    return canonical(next(name for name, child in module.named_modules() if child is backbone))


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
    optimizers, below = optimizers_in(configured), below_backbones(module)
    wanted = {name: p for name, p in trained(module).items() if below(name)}
    ours = {id(p) for p in module.parameters()}
    held = [p for o in optimizers for group in o.param_groups for p in group["params"] if id(p) in ours]
    frozen = {id(p) for name, p in module.named_parameters() if below(name)} - {id(p) for p in wanted.values()}
    outside = [p for p in held if id(p) not in frozen]
    if not wanted and not outside:
        raise TuningError(
            f"{type(module).__name__} has nothing to train: give it a head, or train more of the backbone."
        )
    if not held:
        raise TuningError(
            f"configure_optimizers of {type(module).__name__} gives no optimizer that holds one of the {len(wanted)} "
            "trained parameters: build it from self.parameters()."
        )
    add_new(optimizers, _homeless(module, optimizers, wanted))
    drop(optimizers, frozen)
    if not strategy.keeps_own_optimizer(module) and not strategy.is_flat(module):
        Life.of(module).begin(module, outside)
    options = _options(module)
    split_groups(optimizers, schedulers_in(configured), lambda parameter: options.get(id(parameter), {}))
    return configured


def _homeless(
    module: L.LightningModule, optimizers: list[Optimizer], wanted: dict[str, nn.Parameter]
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Return the trained parameters that no optimizer holds, each with the group that holds others of its backbone.

    Raises:
        TuningError: no group of several optimizers holds one.
    """
    groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
    found: list[tuple[nn.Parameter, dict[str, Any]]] = []
    elsewhere = groups.keys() | staged(module)
    for path, backbone, _ in own_tunings(module):
        start = f"{path}." if path else ""
        new = [p for name, p in wanted.items() if name.startswith(start) and id(p) not in elsewhere]
        home = next((groups[id(p)] for p in backbone.parameters() if id(p) in groups), None)
        if new and home is None and len(optimizers) > 1:
            raise TuningError(
                f"none of the {len(optimizers)} optimizers of {type(module).__name__} holds a parameter of "
                f"{path or 'its backbone'}, so it is not known which shall train what the methods add: give it to one."
            )
        found += [(p, optimizers[0].param_groups[0] if home is None else home) for p in new]
    return found


def _options(module: L.LightningModule) -> dict[int, dict[str, Any]]:
    """Return what the methods ask of the optimizer for single parameters, by the identity of the parameter."""
    found: dict[int, dict[str, Any]] = {}
    for _, backbone, tuning in own_tunings(module):
        for name, parameter in _named_as_in_the_base(backbone):
            merged = [item for m in tuning.methods.values() for item in m.optimizer_options(name).items()]
            if merged:
                found[id(parameter)] = dict(merged)
    for method in Life.of(module).methods:
        for parameter, lr in method.rates(module).items():
            found.setdefault(id(parameter), {})["lr"] = lr
    return found


def _named_as_in_the_base(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is trained of a backbone, by name; what stands in for one of its tensors by the name of that one."""
    names = stand_ins(backbone)
    return ((names.get(name, name), parameter) for name, parameter in trained(backbone).items())


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in whatever form ``configure_optimizers`` may return them."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return optimizers_in(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        return [optimizer for entry in configured for optimizer in optimizers_in(entry)]
    return []
