"""Runs an ``nn.Sequential``, whose children are its steps, without those that are none."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def forward_of(host: nn.Module, no_step: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward pass of a module; an ``nn.Sequential`` leaves out its children of the class ``no_step``."""
    if type(host).forward is nn.Sequential.forward:
        return partial(_in_line, host, no_step)
    return partial(type(host).forward, host)


def _in_line(host: nn.Module, no_step: type[nn.Module], input: Any) -> Any:  # noqa: A002 (its name in nn.Sequential)
    for step in host.children():
        input = input if isinstance(step, no_step) else step(input)  # noqa: A001
    return input
