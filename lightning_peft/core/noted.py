"""Grafts that note a part of the loss while a model is called, for the `penalty` of their method."""

from typing import Any

from torch import Tensor

from lightning_peft.core.graft import Graft


class Noting(Graft):
    """Notes a scalar of the last call, with its gradient, until the penalty takes it."""

    noted: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return what the last call noted, once; None where nothing has been computed since."""
        noted, self.noted = self.noted, None
        return noted

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: no tensor of the last call."""
        return self.__dict__ | {"noted": None}
