"""By what all learning rates of a task are multiplied; a checkpoint keeps it, so a fit goes on with what was found."""

from typing import Any

from torch import nn

from lightning_peft.core.method import TuningMethod
from lightning_peft.core.rates import Rates

_KEY = "rate_scale"


class RateScaled:
    """A task whose learning rates have a factor in common, beside those that are given or recommended."""

    rate_scale = 1.0
    """What all learning rates are multiplied by, for who tries several."""

    def advised(self, method: TuningMethod, backbone: nn.Module) -> Rates:
        """Return the learning rates that a method recommends for a backbone and the optimizer of this task."""
        return method.advice().on(backbone)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the factor."""
        checkpoint[_KEY] = self.rate_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the factor, before the optimizer is made: a schedule may be computed from it."""
        self.rate_scale = checkpoint.get(_KEY, self.rate_scale)
