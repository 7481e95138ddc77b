"""Loads a delta file into a module, and turns a full checkpoint into a delta."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.delta import delta_names, save_delta
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.delta_fit import fitted, method_names
from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import canonical, unwrapped
from lightning_peft.core.select import near
from lightning_peft.core.sharded import like
from lightning_peft.core.storage import check_tensors, read_torch


def load_delta(module: nn.Module, path: str | Path, allow_other_backbone: bool = False) -> None:
    """Load a delta file (safetensors or a checkpoint) into ``module``, whose methods must be those of the file.

    Everything is checked before the first tensor changes.

    Raises:
        TuningError: the file is no whole delta, or was made for another backbone, method or set of tensors.
    """
    fill(unwrapped(module), *read_delta(path), str(path), allow_other_backbone)


def fill(
    module: nn.Module, tensors: dict[str, Tensor], meta: dict[str, Any], source: str, allow_other_backbone: bool = False
) -> None:
    """Put what was read of a file into a module, after all checks.

    Raises:
        TuningError: it was made for another backbone, method or set of tensors.
    """
    tensors = fitted(module, tensors, meta, source, allow_other_backbone)
    live = {canonical(name): tensor for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            live[name].copy_(like(live[name], tensor))


def complete(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a full state dict: the delta, and references to the live frozen tensors, so that strict loading passes."""
    state = dict(module.state_dict())
    return {name: tensors.get(canonical(name), live) for name, live in state.items()}


def convert(module: nn.Module, full: str | Path, delta: str | Path) -> Path:
    """Turn a full checkpoint of ``module`` (method applied, as when it was written) into a delta file.

    Raises:
        TuningError: the file lacks a tensor of the delta, or its frozen tensors are not those of ``module``.
    """
    checkpoint = read_torch(full, of_others=True)
    tensors = checkpoint.get("state_dict", checkpoint)
    check_tensors(tensors, full)
    state, names = module.state_dict(), set(delta_names(module))
    for name, live in state.items():
        if name not in tensors:
            raise TuningError(f"{full} lacks {name}{near(name, tensors)}: give the module that it is a checkpoint of.")
        if name not in names and not torch.equal(tensors[name].to(live), live):
            raise TuningError(
                f"{full} changed {name}, which {method_names(module)} freezes: only a tuned model is a delta."
            )
    module.load_state_dict(tensors)
    return save_delta(module, delta)
