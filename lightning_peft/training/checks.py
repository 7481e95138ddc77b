"""Checks that trained parameters are in one optimizer, get a gradient, and are copied by no callback beforehand."""

import re
from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.run import below_backbones, own_tunings, trained
from lightning_peft.training import finetuning, strategy
from lightning_peft.training.record import Life

_EXPERT = re.compile(r"(?<![^.])(experts?[._](?:expert_)?)\d+(?=\.)")
"""The place of one expert in the name of its parameters: ``experts.3`` or ``experts.expert_3``."""
STEPS = 200
"""How many optimizer steps a trained parameter may go without a gradient, if the first epoch has as many."""


def check_launcher(trainer: L.Trainer) -> None:
    """Check that what is trained comes back from the processes that a strategy starts.

    Raises:
        TuningError: it starts them by spawn or fork.
    """
    # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/launchers/multiprocessing.py
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise TuningError(
            "this strategy starts its processes by spawn or fork, from which grafts do not come back: "
            "use strategy='ddp' in a script."
        )


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
    """Check that an optimizer holds every trained parameter.

    Raises:
        TuningError: none holds one.
    """
    if strategy.keeps_own_optimizer(module):
        return
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    held |= finetuning.staged(module)
    below = below_backbones(module)
    for name, parameter in trained(module).items():
        if id(parameter) not in held and below(name):
            raise TuningError(
                f"{name} is trained but stands in no optimizer group: let configure_optimizers of the module hold it."
            )


def check_averages(module: L.LightningModule) -> None:
    """Check that no average of a backbone inside the module was made before a method has added parameters to it.

    Raises:
        TuningError: one was, and would be updated by the parameters of others.
    """
    tuned = [backbone for _, backbone, _ in own_tunings(module) if any(grafts(backbone))]
    for name, average in module.named_modules():
        if not isinstance(average, AveragedModel) or any(grafts(average)):
            continue
        if any(type(average.module) is type(backbone) for backbone in tuned):
            raise TuningError(
                f"{name} averages a {type(average.module).__name__} as it was without grafts, and would pair its "
                "parameters with others now: make it when the method has been applied, or use DeltaEMA, which averages "
                "what is trained."
            )


def expect_gradients(module: L.LightningModule) -> None:
    """Begin to look for gradients, of all that is trained now."""
    life = Life.of(module)
    life.without_gradient, life.steps = None, 0


def note_gradients(module: L.LightningModule, optimizer: Optimizer) -> None:
    """Note which trained parameters have a gradient before a step; after the first one, warn of those that have none.

    Raises:
        TuningError: one has had none in `STEPS` steps.
    """
    life = Life.of(module)
    if strategy.keeps_own_optimizer(module) or life.without_gradient == set():
        return  # gradients of such an optimizer are no more where autograd has put them
    first = life.without_gradient is None
    known = trained(module)
    waiting = set(known) if life.without_gradient is None else life.without_gradient
    life.without_gradient = {name for name in waiting if name in known and known[name].grad is None}
    life.steps += 1
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    late = sorted(name for name in life.without_gradient if id(known[name]) in held and known[name].requires_grad)
    if first and late:
        rank_zero_warn(
            f"{len(late)} trained parameters got no gradient in the first step, e.g. {late[0]}: it is an error if they "
            "get none in the first epoch."
        )
    if life.steps >= STEPS:
        check_gradients(module)


def check_gradients(module: L.LightningModule) -> None:
    """Check that every trained parameter has had a gradient; it is asked at the end of the first epoch.

    Of experts one will do, since it is the tokens that choose among them.

    Raises:
        TuningError: one has had none, since no loss depends on it.
    """
    life = Life.of(module)
    known = trained(module)
    late = sorted(name for name in life.without_gradient or () if name in known and known[name].requires_grad)
    others = {_EXPERT.sub(r"\1N", name) for name in known.keys() - set(late)}
    experts = [name for name in late if _EXPERT.sub(r"\1N", name) in others]  # no token has come to them so far
    life.without_gradient = set()
    if len(late) > len(experts):
        raise TuningError(_sentence(module, [name for name in late if name not in experts]))
    if experts:
        rank_zero_warn(f"no token came to experts with {len(experts)} trained parameters so far, e.g. {experts[0]}.")


def without_gradient(module: nn.Module) -> list[str]:
    """Return the names of trained parameters that have no gradient."""
    return [name for name, p in trained(module).items() if p.grad is None]


def _sentence(module: nn.Module, late: list[str]) -> str:
    inside = below_backbones(module)(late[0])
    remedy = "leave them out with exclude= (a regex)" if inside else "take them out of the optimizer"
    return (
        f"{len(late)} trained parameters got no gradient, e.g. {late[0]}: no loss depends on them, so {remedy}, or use "
        "the module that holds them in training_step."
    )
