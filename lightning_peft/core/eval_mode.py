"""Computing something aside in eval mode, after which each module is in the mode that it was in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Compute in eval mode and without gradients inside the context; each module then has its mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
