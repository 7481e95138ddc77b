"""By what all learning rates of a task are multiplied; a checkpoint keeps it, so a fit goes on with what was found."""

from typing import Any

_KEY = "rate_scale"


class RateScaled:
    """A task whose learning rates have a factor in common, beside those that are given or recommended."""

    rate_scale = 1.0
    """What all learning rates are multiplied by, for who tries several."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the factor."""
        checkpoint[_KEY] = self.rate_scale

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the factor, before the optimizer is made: a schedule may be computed from it."""
        self.rate_scale = checkpoint.get(_KEY, self.rate_scale)
