"""By what to multiply all learning rates, as a short fit at rising rates shows it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lightning_peft.core.errors import TuningError

_MEMORY = 0.9
"""What a smoothed loss keeps of the one before."""
_DIVERGED = 2.0
"""How many times the best smoothed loss is the end of the sweep."""


class RateSweep(Callback):
    """Multiplies all learning rates by a factor that rises at each step from ``lowest`` to ``highest``.

    Lightning's ``LearningRateFinder`` sets all groups of an optimizer to one rate, and runs without other callbacks. A
    delta and a head have rates of their own, and a method is a callback: here one factor is for all of them, in a
    Trainer that has the methods.

    Source: Smith 2017, arXiv 1506.01186, section 3.3.

    Args:
        steps: how many factors are tried.
        lowest: the first one.
        highest: the last one.
    """

    def __init__(self, steps: int = 100, lowest: float = 0.01, highest: float = 100.0) -> None:
        self.steps = steps
        self.lowest = lowest
        self.highest = highest
        self.losses: list[float] = []
        self._rates: list[float] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the rates of the groups, which a schedule may have begun to change."""
        self._rates = [float(group.get("initial_lr", group["lr"])) for group in _groups(trainer)]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Set the rates of this step, whatever the schedule says."""
        for group, rate in zip(_groups(trainer), self._rates, strict=True):
            group["lr"] = rate * self.factor(len(self.losses))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss over all processes, and end where it has gone."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.losses.append(float(trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
            trainer.should_stop = trainer.should_stop or _has_diverged(self.losses)

    def factor(self, step: int) -> float:
        """Return the factor of a step."""
        return float(self.lowest * (self.highest / self.lowest) ** (step / max(1, self.steps - 1)))

    def best(self) -> float:
        """Return a third of the factor at which the smoothed loss is lowest, which lies behind the steepest part.

        Raises:
            TuningError: the loss never fell.
        """
        losses = smoothed(self.losses)
        lowest = min(range(len(losses)), key=losses.__getitem__, default=0)
        if lowest == 0:
            raise TuningError(
                f"--lr_find saw no loss fall in {len(losses)} steps at {self.lowest:g} to {self.highest:g} times the "
                "learning rates: leave it out, or give other rates, --model.lr 1e-3."
            )
        return self.factor(lowest) / 3


def _groups(trainer: L.Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the running mean of losses, each of which weighs 0.9 of the next.

    >>> smoothed([1.0, 1.0, 2.0])[:2]
    [1.0, 1.0]
    """
    total, weight, found = 0.0, 0.0, []
    for loss in losses:
        total = _MEMORY * total + loss
        weight = _MEMORY * weight + 1
        found.append(total / weight)
    return found


def _has_diverged(losses: Sequence[float]) -> bool:
    return not math.isfinite(losses[-1]) or smoothed(losses)[-1] > _DIVERGED * min(smoothed(losses))
