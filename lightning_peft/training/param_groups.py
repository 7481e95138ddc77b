"""Splits optimizer groups, so that single parameters have options of their own, such as a learning rate.

A method states them by `Method.optimizer_options`. The groups of the optimizer are split where they differ, and what a
scheduler keeps per group is kept for the new group too, so the module's ``configure_optimizers`` needs no change.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_peft.core.errors import TuningError

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
# What the schedulers of torch keep for each group, and how some keep others:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/lr_scheduler.py
_RATE_LISTS = ("base_lrs", "min_lrs", "max_lrs", "_last_lr")
_LISTS = (*_RATE_LISTS, "lr_lambdas")


def add_new(optimizers: Iterable[Optimizer], parameters: Iterable[tuple[nn.Parameter, dict[str, Any]]]) -> None:
    """Add parameters to groups, with the state that an optimizer gives to those it is built with (Adagrad)."""
    for parameter, group in parameters:
        group["params"].append(parameter)  # in place: LBFGS keeps the list
        optimizer = next(o for o in optimizers if any(each is group for each in o.param_groups))
        if optimizer.state:
            options = {name: value for name, value in group.items() if name in optimizer.defaults}
            optimizer.state.update(type(optimizer)([parameter], **options).state)


def drop(optimizers: Iterable[Optimizer], ids: set[int]) -> None:
    """Take parameters out of optimizers, by identity, with what is kept for them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in ids]
        for parameter in [p for p in optimizer.state if id(p) in ids]:
            del optimizer.state[parameter]


def split_groups(
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[Any],
    options: Callable[[nn.Parameter], dict[str, Any]],
) -> None:
    """Move the parameters for which ``options`` gives something into groups of their own, made from their group.

    Args:
        optimizers: those of a module.
        schedulers: theirs.
        options: of a parameter; ``lr_ratio`` multiplies the learning rate of its group, every other name is an
            option of the optimizer.

    Raises:
        TuningError: the optimizer has no option of that name.
    """
    schedulers = [inner for scheduler in schedulers for inner in _unwrapped(scheduler)]
    for optimizer in optimizers:
        for index, group in enumerate(list(optimizer.param_groups)):
            apart: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                new = {name: value for name, value in options(parameter).items() if group.get(name, 0.0) != value}
                apart.setdefault(tuple(sorted(new.items())), []).append(parameter)
            stay = apart.pop((), [])
            if not stay and apart:  # an empty group would remain: the first of the others takes its place
                key, stay = next(iter(apart.items()))
                del apart[key]
                _change(group, dict(key), optimizer, schedulers, index)
            group["params"][:] = stay
            for key, parameters in apart.items():
                new = {name: value for name, value in group.items() if name not in ("params", "param_names")}
                optimizer.add_param_group({"params": parameters, **new})
                _extend(schedulers, optimizer, index)
                _change(optimizer.param_groups[-1], dict(key), optimizer, schedulers, len(optimizer.param_groups) - 1)


def _change(
    group: dict[str, Any], options: dict[str, Any], optimizer: Optimizer, schedulers: list[Any], index: int
) -> None:
    for name, value in options.items():
        if name == "lr_ratio":
            _scale(group, value, optimizer, schedulers, index)
        elif name == "lr":
            rate = group.get("initial_lr", group["lr"])
            if not rate:
                raise TuningError(
                    f"a learning rate of {value} is asked for where that of the group is {rate}: give the group one."
                )
            _scale(group, value / rate, optimizer, schedulers, index)
        elif name in optimizer.defaults:
            group[name] = value
        else:
            raise TuningError(
                f"{type(optimizer).__name__} has no option {name!r}, which a method gives one of its parameters: "
                "use an optimizer that has it, e.g. AdamW."
            )


def _scale(group: dict[str, Any], ratio: float, optimizer: Optimizer, schedulers: list[Any], index: int) -> None:
    for name in _RATES:
        if name in group:
            group[name] = group[name] * ratio
    for scheduler in schedulers:
        if scheduler.optimizer is optimizer:
            for name in _RATE_LISTS:
                rates = vars(scheduler).get(name)
                if isinstance(rates, list):
                    rates[index] = rates[index] * ratio


def _extend(schedulers: list[Any], optimizer: Optimizer, index: int) -> None:
    """Give the last group of the optimizer a copy of all that its schedulers keep for the group at ``index``."""
    for scheduler in schedulers:
        if scheduler.optimizer is optimizer:
            for name in _LISTS:
                values = vars(scheduler).get(name)
                if isinstance(values, list):
                    values.append(values[index])


def schedulers_in(configured: Any) -> Iterator[LRScheduler]:
    """Yield the schedulers in whatever form ``configure_optimizers`` may return them."""
    if isinstance(configured, LRScheduler):
        yield configured
    elif isinstance(configured, dict):
        for key in ("lr_scheduler", "scheduler"):
            yield from schedulers_in(configured.get(key))
    elif isinstance(configured, (list, tuple)):
        for entry in configured:
            yield from schedulers_in(entry)


def advance(before: Any, now: Any) -> None:
    """Bring a new scheduler to the step that an old one stands at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # this optimizer has made none
        for old, new in zip(schedulers_in(before), schedulers_in(now), strict=True):
            if not isinstance(new, ReduceLROnPlateau):
                for _ in range(old.last_epoch - new.last_epoch):
                    new.step()


def _unwrapped(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and those that it chains."""
    yield scheduler
    for inner in vars(scheduler).get("_schedulers", ()):
        yield from _unwrapped(inner)
