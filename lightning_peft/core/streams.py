"""Streams of random numbers of their own, such as that of each of several deltas that are trained in one step."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Stream:
    """Random numbers that go on where they were left, whenever this is entered as a context.

    Args:
        seed: where it begins.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.state = torch.Generator().manual_seed(seed).get_state()
        self.cuda: Tensor | None = None
        self._others: list[tuple[Tensor, Tensor | None] | None] = []

    def __enter__(self) -> None:
        """Draw from this stream from now on; inside of itself nothing changes."""
        if self._others:
            self._others.append(None)
            return
        self._others.append((torch.get_rng_state(), torch.cuda.get_rng_state() if _cuda() else None))
        torch.set_rng_state(self.state)
        if not _cuda():
            return
        if self.cuda is None:
            torch.cuda.manual_seed(self.seed)
        else:
            torch.cuda.set_rng_state(self.cuda)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Draw from where the numbers came before."""
        others = self._others.pop()
        if others is None:
            return
        self.state = torch.get_rng_state()
        if others[1] is not None:
            self.cuda = torch.cuda.get_rng_state()
            torch.cuda.set_rng_state(others[1])
        torch.set_rng_state(others[0])

    def state_dict(self) -> dict[str, Any]:
        """Return where it is."""
        return {"state": self.state, "cuda": self.cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        self.state, self.cuda = state["state"].cpu(), None if state["cuda"] is None else state["cuda"].cpu()


def _cuda() -> bool:
    return torch.cuda.is_initialized()
