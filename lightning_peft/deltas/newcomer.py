"""What goes on around the making of one more delta."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.tuning import Tuning


@contextmanager
def newcomer(backbone: nn.Module, name: str) -> Iterator[None]:
    """Let the deltas that are there rest while one is made; on any error that one goes, and they are as they were."""
    tuning = Tuning.of(backbone)
    before = frozenset() if tuning is None else tuning.switch.off
    if tuning is not None:
        tuning.rest(backbone, frozenset(tuning.methods))
    try:
        yield
    except BaseException:
        made = Tuning.of(backbone)
        if made is not None:
            for key in made.of_delta(name):
                made.undo(backbone, key)
        if (left := Tuning.of(backbone)) is not None:  # the last one takes the record with it
            left.rest(backbone, before)
        raise
