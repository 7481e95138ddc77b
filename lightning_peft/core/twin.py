"""What adapters of Hugging Face PEFT call a method, its arguments and its tensors; `interop` converts by it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Twin:
    """The form that PEFT gives a method that changes layers, tensor by tensor the same.

    Attributes:
        peft_type: the name of the form.
        tensors: tensor of a graft -> what PEFT calls it at the layer.
        arguments: argument of the method -> its key in ``adapter_config.json``.
        defaults: every key that PEFT writes for this form, but those that all forms have, with its default.
        free: keys that change nothing of what is computed, such as those of the initial values; any other key that is
            no argument must have its default.
        kinds: the layers that PEFT has it for.
    """

    peft_type: str
    tensors: Mapping[str, str]
    arguments: Mapping[str, str]
    defaults: Mapping[str, Any]
    free: frozenset[str] = field(default=frozenset())
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
