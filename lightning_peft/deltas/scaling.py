"""Makes the effect of a delta larger or smaller, for good."""

import torch
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, Grafted, grafts
from lightning_peft.core.run import unwrapped
from lightning_peft.core.tuning import chosen


@torch.no_grad()
def rescale(model: nn.Module, factor: float, name: str | None = None) -> None:
    """Multiply the effect of a delta: 0 is the bare backbone, 1 the delta as it is, 2 goes twice as far.

    Each tensor in which the effect is linear moves on the line from the value that has no effect: B of a LoRA from 0,
    the vectors of IA3 from 1, what was trained in place or copied from the backbone's own value, magnitudes of DoRA
    from the norms of the weight. So a saved file has the factor in it.

    Args:
        model: a backbone, or a module with one.
        factor: by which the effect is multiplied.
        name: of the delta; None: all.

    Raises:
        TuningError: there is no such delta, or its effect has no scale, as that of prompts and prefixes.
    """
    for backbone, tuning, keys in chosen(unwrapped(model), None if name is None else (name,)):
        places = [place for key in keys for place in grafts(backbone, key)]
        for place in places:
            if any(True for _ in place.graft.parameters()) and not linear_tensors(place):
                raise TuningError(
                    f"{type(place.graft).__name__} at {place.path or 'the root'} has no scale to multiply: "
                    "rescale a delta such as one of LoRA, IA3, Adapter or BitFit."
                )
        in_place = set().union(*(tuning.trains[key] for key in keys))
        if lost := sorted(n for n in in_place if not isinstance(tuning.originals[n], Tensor)):
            raise TuningError(f"{lost[0]} was trained in place and no copy of it was kept: load the backbone anew.")
        for place in places:
            for tensor, neutral in linear_tensors(place).values():
                tensor.copy_(neutral + factor * (tensor - neutral))
        parameters = dict(backbone.named_parameters())
        for tensor_name in in_place:
            original = tuning.originals[tensor_name].to(parameters[tensor_name].device)  # type: ignore[union-attr]
            parameters[tensor_name].copy_(original + factor * (parameters[tensor_name] - original))


def linear_tensors(place: Grafted[Graft]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the tensors of a graft in which its effect is linear, each with the value that has none."""
    tensors: dict[str, Tensor] = dict(place.graft.named_parameters())
    tensors |= {name: buffer for name, buffer in place.graft.named_buffers() if buffer.is_floating_point()}
    found = ((name, tensor, place.graft.neutral(place.host, name)) for name, tensor in tensors.items())
    return {name: (tensor, neutral) for name, tensor, neutral in found if neutral is not None}
