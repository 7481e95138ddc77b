"""Finds tensors that grafts hold after a step: one of a call that is over would be overwritten by a CUDA graph."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.graft import grafts

ASKED_AGAIN = {"OfThisCall.rows", "Positions.real"}
"""What a block that is computed anew in the backward pass asks again; the next call has others."""
CONSTANT = {"Noise.seed"}
"""A number on the CPU."""


def kept_tensors(model: nn.Module) -> set[str]:
    """Return the class and attribute of each tensor that grafts hold and that is no parameter and no buffer."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: set[str] = set()
    for place in grafts(model):
        found |= set(_held(place.graft, own))
    return found - ASKED_AGAIN - CONSTANT


def _held(holder: Any, own: set[int]) -> Iterator[str]:
    for name, value in vars(holder).items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for each in list(values):
            if isinstance(each, Tensor) and id(each) not in own:
                yield f"{type(holder).__name__}.{name}"
            elif type(each).__module__.startswith("lightning_peft") and not isinstance(each, nn.Module):
                yield from _held(each, own)
