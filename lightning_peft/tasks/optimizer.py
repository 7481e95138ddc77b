"""AdamW for a delta and a head: parameter groups with and without weight decay, and a linear schedule."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.rates import ADDED, EVERYTHING, head_rate, rates_of
from lightning_peft.core.run import canonical
from lightning_peft.core.tuning import Tuning

_NO_DECAY = " without decay"

Shapes: TypeAlias = dict[str, tuple[int, bool, float]]
"""Canonical name -> the number of dimensions of a parameter, whether it is of the head, and the recommended rate."""


def shapes_of(module: nn.Module, backbone: nn.Module) -> Shapes:
    """Return the shapes of the parameters; the head is that of the backbone, and all that lies outside of it."""
    heads = {f"backbone.{name}" for name in anatomy.head_names(backbone)}
    tuning = Tuning.of(backbone)
    rates = {} if tuning is None else rates_of(backbone, tuning)
    head = EVERYTHING.on(backbone).head if tuning is None else head_rate(backbone, tuning)
    other = EVERYTHING.on(backbone).delta if tuning is None else ADDED.delta
    found: Shapes = {}
    for name, parameter in module.named_parameters():
        is_head = name in heads or not name.startswith("backbone.")
        rate = head if is_head else rates.get(name.removeprefix("backbone."), other)
        found[canonical(name)] = parameter.ndim, is_head, rate
    return found


def parameter_groups(
    module: nn.Module, shapes: Shapes, rates: Mapping[str, float | None], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of what trains: the matrices of delta and head, with weight decay, and the rest without.

    Args:
        module: the task.
        shapes: those before a strategy flattened them.
        rates: the learning rates of 'delta' and 'head'; None: of each parameter that which its method recommends.
        weight_decay: of matrices.
    """
    members: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            dims, is_head, recommended = shapes[canonical(name)]
            part = "head" if is_head else "delta"
            rate = rates[part]
            members.setdefault((part, recommended if rate is None else rate, dims > 1), []).append(parameter)
    several = len({rate for part, rate, _ in members if part == "delta"}) > 1
    return [
        {
            "params": members[key],
            "name": (f"{part} at {rate:g}" if several and part == "delta" else part) + ("" if decays else _NO_DECAY),
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for key in sorted(members, key=lambda key: (key[0], -key[1], not key[2]))
        for part, rate, decays in [key]
    ]


def rates_in(optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the highest learning rates of optimizers, by the name of the group where it has one."""
    return rates_of_groups({"name": type(one).__name__} | group for one in optimizers for group in one.param_groups)


def rates_of_groups(groups: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the highest learning rates of an optimizer's groups, live ones or those of a checkpoint, by name."""
    found: dict[str, float] = {}
    for group in groups:
        name = str(group.get("name", "all")).removesuffix(_NO_DECAY)
        found[name] = max(found.get(name, 0.0), float(group.get("initial_lr", group.get("lr", 0.0))))
    return found


def adamw(groups: list[dict[str, Any]], warmup: float, steps: float, precision: str | None) -> OptimizerLRScheduler:
    """Return AdamW, fused where it can be, and a rate that rises in a share ``warmup`` of the steps and falls to 0.

    Raises:
        TuningError: the number of steps is not limited, so that the schedule has no end.
    """
    if steps == float("inf") or steps < 0:
        raise TuningError("the learning rate falls to 0 in the last step, and there is none: set max_epochs.")
    fused = all(_can_fuse(p) for group in groups for p in group["params"]) and precision != "16-mixed"
    optimizer = AdamW(groups, fused=fused)
    schedule = LambdaLR(optimizer, partial(linear, round(warmup * steps), int(steps)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def linear(warmup: int, steps: int, step: int) -> float:
    """Return the share of the learning rate in a step: it rises from 0 in the first ``warmup``, and falls to 0.

    It is that of transformers, whose module of schedules imports PEFT where that is installed.

    >>> [linear(2, 6, step) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


def _can_fuse(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
