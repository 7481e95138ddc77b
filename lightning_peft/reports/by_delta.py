"""What several deltas say of the same batch, one after the other, on one backbone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.switching import activate
from lightning_peft.deltas.loading import load_delta

DELTA = "delta"
"""The column that says which."""


class ByDelta(dict[str | None, Any]):
    """File of a delta -> what the module says of a batch with it."""


def load_side_by_side(module: nn.Module, files: Sequence[str | Path]) -> None:
    """Load deltas of one backbone, each under a name.

    Raises:
        TuningError: a file is there twice, or is no delta of the backbone.
    """
    if len({str(file) for file in files}) < len(files):
        raise TuningError(f"deltas={[str(file) for file in files]} name a file twice: name each once.")
    for i, file in enumerate(files):
        load_delta(module, file, _name(i))


def each_alone(module: nn.Module, files: Sequence[str | Path], step: Callable[[], Any]) -> ByDelta:
    """Return what a step says with each of the deltas alone, in the order of their files."""
    found = ByDelta()
    for i, file in enumerate(files):
        activate(module, _name(i))
        found[str(file)] = step()
    return found


def _name(i: int) -> str:
    return f"predicts_{i}"
