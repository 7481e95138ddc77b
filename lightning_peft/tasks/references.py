"""The backbone as it is without its deltas, or another model, as a reference or teacher in the same step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.switching import muted


@contextmanager
def without_deltas(backbone: nn.Module) -> Iterator[None]:
    """Compute with the bare backbone inside the context, in eval mode and without gradients.

    Raises:
        TuningError: a method trains the backbone's own tensors and keeps no copy.
    """
    with muted(backbone), in_eval(backbone):
        yield
