"""An adapter of PEFT in memory."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class PeftAdapter:
    """The contents of an adapter folder.

    Attributes:
        config: ``adapter_config.json``.
        tensors: its tensors, by the names of PEFT.
        header: what this package says of the adapter in the header of the file, which PEFT does not read.
        source: what it is called in errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)
    source: str = "the adapter"
