"""Weights that a layer computes at each call from other tensors, as with a weight norm, a spectral norm or pruning.

What is written to such a weight is gone at the next call.
"""

import inspect

from torch import Tensor, nn

from lightning_peft.core.errors import TuningError


def check_is_parameter(host: nn.Module, name: str, otherwise: str, known_as: str = "") -> None:
    """Check that what a host has under a name, if it has anything, is a parameter.

    Args:
        host: the module.
        name: below it.
        otherwise: what happens where it is none.
        known_as: its name in the model, if that is known.

    Raises:
        TuningError: it is a buffer, or is computed.
    """
    module, _, leaf = name.rpartition(".")
    owner = host.get_submodule(module)
    if leaf in dict(owner.named_parameters(recurse=False)):
        return
    # The value is not asked for: a spectral norm would go on by one iteration.
    found = inspect.getattr_static(owner, leaf, None)
    if leaf in dict(owner.named_buffers(recurse=False)) or isinstance(found, (property, Tensor)):
        own = known_as or f"{name} of {type(host).__name__}"
        raise TuningError(
            f"{own} is no parameter, but a buffer or computed at each call, as by a weight norm or by pruning, so "
            f"{otherwise}: make it one before a method is applied (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.prune.remove), or exclude the layer."
        )
