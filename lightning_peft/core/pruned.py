"""Parameters that ``torch.nn.utils.prune`` has taken apart: ``weight`` is ``weight_orig`` times ``weight_mask`` then.

https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/utils/prune.py
"""

from collections.abc import Container

from torch import nn

from lightning_peft.core.errors import TuningError

_PARAMETER, _MASK = "_orig", "_mask"


def live_name(name: str, names: Container[str]) -> str:
    """Return the name that a parameter has now, given its name and all that there are."""
    pruned = name + _PARAMETER
    return pruned if name not in names and pruned in names else name


def whole_name(name: str, names: Container[str]) -> str:
    """Return the name of the parameter that a tensor is a part of while that is pruned, or its own."""
    plain = name.removesuffix(_PARAMETER).removesuffix(_MASK)
    return plain if name not in names and plain in names else name


def parameter_of(mask: str) -> str | None:
    """Return the name of the parameter that a buffer of this name would mask."""
    return mask.removesuffix(_MASK) + _PARAMETER if mask.endswith(_MASK) else None


def check_pruned(backbone: nn.Module, trained: Container[str]) -> None:
    """Check that nothing frozen is pruned, which would be a change of the backbone that no delta has.

    Raises:
        TuningError: a parameter that no method trains is.
    """
    names = dict(backbone.named_parameters())
    for name, _ in backbone.named_buffers():
        parameter = parameter_of(name)
        if parameter in names and parameter not in trained:
            raise TuningError(
                f"{name.removesuffix(_MASK)} of {type(backbone).__name__} is pruned and no method trains it, so the "
                "delta would not have it: give ModelPruning its parameters_to_prune, or use FullFineTuning."
            )
