"""AdamW for a delta and a head: parameter groups with and without weight decay, and a linear schedule."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import canonical

Shapes: TypeAlias = dict[str, tuple[int, bool]]
"""Canonical name -> the number of dimensions of a parameter, and whether it is of the head."""


def shapes_of(module: nn.Module, backbone: nn.Module) -> Shapes:
    """Return the shapes of the parameters; the head is that of the backbone, and all that lies outside of it."""
    heads = {f"backbone.{name}" for name in anatomy.head_names(backbone)}
    return {
        canonical(name): (parameter.ndim, name in heads or not name.startswith("backbone."))
        for name, parameter in module.named_parameters()
    }


def parameter_groups(
    module: nn.Module, shapes: Mapping[str, tuple[int, bool]], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of what trains: the matrices of delta and head, with weight decay, and the rest without.

    Args:
        module: the task.
        shapes: those before a strategy flattened them.
        rates: the learning rates of 'delta' and 'head'.
        weight_decay: of matrices.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            dims, is_head = shapes[canonical(name)]
            members.setdefault(("head" if is_head else "delta", dims > 1), []).append(parameter)
    return [
        {
            "params": members[part, decays],
            "name": part if decays else f"{part} without decay",
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part, rate in rates.items()
        for decays in (True, False)
        if (part, decays) in members
    ]


def adamw(
    groups: list[dict[str, Any]], lr: float, warmup: float, steps: float, precision: str | None
) -> OptimizerLRScheduler:
    """Return AdamW, fused where it can be, and a rate that rises in a share ``warmup`` of the steps and falls to 0.

    Raises:
        TuningError: the number of steps is not limited, so that the schedule has no end.
    """
    if steps == float("inf") or steps < 0:
        raise TuningError("the learning rate falls to 0 in the last step, and there is none: set max_epochs.")
    fused = all(_can_fuse(p) for group in groups for p in group["params"]) and precision != "16-mixed"
    optimizer = AdamW(groups, lr=lr, fused=fused)
    schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * steps), int(steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
