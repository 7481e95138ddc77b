"""Goes along with Lightning's ``BaseFinetuning``, which freezes modules in ``setup`` and unfreezes them later."""

import lightning as L
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import below_backbones, trained
from lightning_peft.training.record import trainer_of


def staged(module: L.LightningModule) -> set[int]:
    """Return the ids of the parameters that such a callback has frozen and adds to an optimizer itself."""
    trainer = trainer_of(module)
    if trainer is None or not any(isinstance(callback, BaseFinetuning) for callback in _callbacks(trainer)):
        return set()
    return {id(p) for p in module.parameters() if not p.requires_grad}


def check_callbacks(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Check that no callback is going to train weights of a tuned backbone that the methods keep frozen.

    Raises:
        TuningError: ``BackboneFinetuning`` is.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, BackboneFinetuning):
            below = dict(module.named_modules()).get("backbone", nn.Module())
            frozen = _frozen(module).keys() & {id(p) for p in below.parameters()}
            if frozen:
                raise _refusal(type(callback).__name__, _frozen(module)[min(frozen)])


def check_optimized(module: L.LightningModule, trainer: L.Trainer) -> None:
    """Check that no optimizer trains what the methods keep frozen, whoever has given it to one since the fit began.

    Raises:
        TuningError: one does.
    """
    frozen = _frozen(module)
    for parameter in (p for o in trainer.optimizers for group in o.param_groups for p in group["params"]):
        if parameter.requires_grad and id(parameter) in frozen:
            found = (type(c).__name__ for c in _callbacks(trainer) if isinstance(c, BaseFinetuning))
            raise _refusal(next(found, f"a hook of {type(module).__name__}"), frozen[id(parameter)])


def _frozen(module: L.LightningModule) -> dict[int, str]:
    """Return the names of the parameters of tuned backbones that no method trains, by identity."""
    below, ours = below_backbones(module), trained(module)
    return {id(p): name for name, p in module.named_parameters() if below(name) and name not in ours}


def _refusal(who: str, name: str) -> TuningError:
    return TuningError(
        f"{who} trains {name}, which is frozen and in no delta: let it unfreeze what lies outside of the backbone, "
        "let the method train it by also_train=, or take FullFineTuning."
    )


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]
