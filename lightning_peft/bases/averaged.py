"""Methods that keep, at the end of a run, an average over its epochs of what they train."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import lightning as L
from torch import nn

from lightning_peft.core.arguments import positive
from lightning_peft.training.epoch_average import EpochAverage, gaussian_weights
from lightning_peft.training.method import Method


@dataclass(eq=False, kw_only=True)
class AveragedMethod(Method):
    """A method that averages parameters over the epochs, weighted by a Gaussian, and writes the average after the last.

    Args:
        mean_epoch: middle of the Gaussian that weights the epochs, counted from 1; None: three quarters of them.
        std_epochs: its standard deviation [epochs].
    """

    mean_epoch: float | None = positive(None)
    std_epochs: float = positive(1.0)

    may_change: ClassVar[frozenset[str]] = Method.may_change | {"mean_epoch", "std_epochs"}

    def averaged(self, module: nn.Module) -> nn.Module:
        """Return the module whose parameters are averaged."""
        raise NotImplementedError

    def weights_of_epochs(self, epochs: int) -> list[float]:
        """Return the weight of the parameters after each epoch; they add up to 1.

        Raises:
            TuningError: the Gaussian is nowhere near these epochs, or their number has no limit.
        """
        return gaussian_weights(epochs, self.mean_epoch, self.std_epochs)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the epochs can be weighted, and begin with none."""
        super().on_fit_start(trainer, pl_module)
        self._average.begin(self.weights_of_epochs(trainer.max_epochs or 0), trainer.current_epoch)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the parameters after the epoch before to the average."""
        super().on_train_epoch_start(trainer, pl_module)
        self._average.add(self.averaged(pl_module), trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the average after the last epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 == len(self._average.weights):
            self._average.add(self.averaged(pl_module), trainer.current_epoch + 1)
            self._average.write(self.averaged(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return the average so far, for a run that resumes."""
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the average of a run that resumes."""
        self._average.load_state_dict(state_dict)

    @cached_property
    def _average(self) -> EpochAverage:
        return EpochAverage()
