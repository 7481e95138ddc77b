"""Checks that trained parameters are in one optimizer, get a gradient, and are copied by no callback beforehand."""

from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.errors import TuningError
from lightning_peft.training import strategy
from lightning_peft.training.lifecycle import trained
from lightning_peft.training.record import Life


def without_gradient(module: nn.Module) -> list[str]:
    """Return the names of trained parameters that have no gradient."""
    return [name for name, p in trained(module).items() if p.grad is None]


def check_averaging(trainer: L.Trainer, method: L.Callback) -> None:
    """Check that no callback has copied the module before this method changes it.

    Raises:
        TuningError: an averaging callback stands before the method in the list.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(method)]:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise TuningError(
                f"{type(callback).__name__} copies the module before {type(method).__name__} has changed it: "
                f"put {type(method).__name__} before it in the list of callbacks."
            )


def check_optimizers(module: L.LightningModule, optimizers: Iterable[Optimizer]) -> None:
    """Check that every trained parameter is in exactly one optimizer group.

    Raises:
        TuningError: it is in none or in several.
    """
    if strategy.keeps_own_optimizer(module):
        return
    counts: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, parameter in trained(module).items():
        if counts.get(id(parameter), 0) != 1:
            raise TuningError(
                f"{name} is trained but stands in {counts.get(id(parameter), 0)} optimizer groups: "
                "let configure_optimizers of the module list each parameter once."
            )


def check_gradients(module: L.LightningModule) -> None:
    """Check that every trained parameter has got a gradient.

    Raises:
        TuningError: one has none, since nothing in the forward pass that gave the loss uses it.
    """
    if not strategy.keeps_own_optimizer(module):  # whose gradients are no more where autograd has put them
        _refuse_without(without_gradient(module))


def note_gradients(module: L.LightningModule, optimizer: Optimizer) -> None:
    """Note which parameters of an optimizer that is about to step have a gradient."""
    names, seen = {id(p): name for name, p in module.named_parameters()}, Life.of(module).gradients
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen[name] = seen.get(name, False) or parameter.grad is not None


def check_noted_gradients(module: L.LightningModule) -> None:
    """Check that every parameter noted by `note_gradients` has got a gradient in one of the steps.

    Raises:
        TuningError: one has not.
    """
    seen, Life.of(module).gradients = Life.of(module).gradients, {}
    _refuse_without([name for name, has in seen.items() if not has])


def _refuse_without(without: list[str]) -> None:
    if without:
        raise TuningError(
            f"{len(without)} trained parameters got no gradient, e.g. {without[0]}: no loss depends on them, "
            "so leave them out with exclude= (a regex), or use the module that holds them in training_step."
        )
