"""Modules that cannot be tuned as they are: programs made of modules, and those whose parameters have no shape yet."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.core.errors import TuningError
from lightning_peft.core.private_torch import is_compiled


def check_has_shapes(backbone: nn.Module) -> None:
    """Check that every parameter has a shape; those of lazy modules get theirs in their first call.

    Raises:
        TuningError: one has none.
    """
    for name, parameter in backbone.named_parameters():
        if is_lazy(parameter):
            raise TuningError(
                f"{name} of {type(backbone).__name__} is lazy and has no shape yet: call the model once with a batch "
                "before it is tuned, in __init__ of a LightningModule, say."
            )


def check_takes_hooks(host: nn.Module) -> None:
    """Check that a module calls hooks that are registered from now on.

    Raises:
        TuningError: it is a program that has been made of one.
    """
    if is_compiled(host):
        raise TuningError(f"{type(host).__name__} is compiled and would ignore grafts: compile it afterwards.")
    if isinstance(host, torch.jit.ScriptModule):
        raise TuningError(
            f"{type(host).__name__} is TorchScript and takes no graft: tune the module that it was made of, and script "
            "or trace that after lightning_peft.merge."
        )


def check_is_real(host: nn.Module, name: str) -> None:
    """Check that a layer computes with real numbers, as the gradients of what is added to it do.

    Raises:
        TuningError: it has complex ones.
    """
    if any(parameter.is_complex() for parameter in host.parameters(recurse=False)):
        raise TuningError(f"{name} is complex, and updates of layers are real: leave it out with exclude=.")
