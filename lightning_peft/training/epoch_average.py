"""A weighted average of parameters over the epochs of a run."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.sharded import like, whole


def gaussian_weights(epochs: int, mean: float | None, std: float) -> list[float]:
    """Return a weight for each epoch, by a Gaussian over their numbers from 1; they add up to 1.

    Args:
        epochs: how many there are.
        mean: middle of the Gaussian; None: three quarters of them.
        std: its standard deviation.

    Raises:
        TuningError: the Gaussian is nowhere near these epochs, or their number has no limit.
    """
    if epochs < 1:
        raise TuningError("prompts are averaged over the epochs, and their number has no limit: set max_epochs.")
    mean = 0.75 * epochs if mean is None else mean
    weights = [math.exp(-0.5 * ((e - mean) / std) ** 2) for e in range(1, epochs + 1)]
    if sum(weights) < 1e-6:
        raise TuningError(f"mean_epoch={mean:g} is far from the {epochs} epochs of the run: take one of them.")
    return [weight / sum(weights) for weight in weights]


class EpochAverage:
    """The average so far.

    Attributes:
        weights: of the values after each epoch.
    """

    def __init__(self) -> None:
        self.weights: list[float] = []
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def begin(self, weights: list[float], epoch: int) -> None:
        """Take the weights of a run; one that does not resume, in epoch 0, begins with nothing."""
        self.weights = weights
        if epoch == 0:
            self._sums, self._summed = {}, 0

    @torch.no_grad()
    def add(self, module: nn.Module, epochs: int) -> None:
        """Add the parameters after this many epochs, unless they have been added."""
        if epochs <= self._summed:
            return
        for name, parameter in module.named_parameters():
            part = self.weights[epochs - 1] * parameter.detach()
            self._sums[name] = part if name not in self._sums else part + like(part, self._sums[name].to(part.device))
        self._summed = epochs

    @torch.no_grad()
    def write(self, module: nn.Module) -> None:
        """Give the parameters their average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self._sums[name])

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on."""
        return {"sums": {name: whole(each) for name, each in self._sums.items()}, "summed": self._summed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run has stopped."""
        self._sums, self._summed = dict(state_dict["sums"]), state_dict["summed"]
