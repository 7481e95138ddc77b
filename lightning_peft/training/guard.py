"""Keeps a run that has diverged from writing over its last good file."""

from typing import Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import trained


class DeltaGuard(L.Callback):
    """Says what happens when a trained tensor is not finite and a checkpoint is to be written.

    Without it a run ends with an error; give it to a Trainer for a warning in its place.

    Args:
        action: 'raise' ends the run before the file is written, 'warn' writes it.
    """

    def __init__(self, action: Literal["raise", "warn"] = "warn") -> None:
        if action not in ("raise", "warn"):
            raise TuningError(f"action={action!r} is no action of DeltaGuard: take 'raise' or 'warn'.")
        self.action = action


def check_finite(module: L.LightningModule, trainer: L.Trainer | None) -> None:
    """Check that what is trained is finite, before it is saved.

    Raises:
        TuningError: it is not, and no `DeltaGuard` says that a warning is enough.
    """
    broken = [name for name, p in trained(module).items() if not p.detach().isfinite().all()]
    if not broken:
        return
    sentence = (
        f"{broken[0]} has NaN or infinity, so no checkpoint is written over the last one: lower the learning rate or "
        "clip gradients, and go on from the last checkpoint; DeltaGuard('warn') saves it all the same."
    )
    callbacks: list[L.Callback] = trainer.callbacks if trainer is not None else []  # type: ignore[attr-defined]
    if any(isinstance(callback, DeltaGuard) and callback.action == "warn" for callback in callbacks):
        rank_zero_warn(sentence)
    else:
        raise TuningError(sentence)
