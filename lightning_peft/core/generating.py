"""The joint `generated`: what ``generate`` of a model returns, seen by the grafts of the model."""

from functools import partial
from typing import Any

from torch import nn


def surround(host: nn.Module) -> None:
    """Let the grafts of a model that have the joint see what it generates; without any, it is as it was."""
    inner = vars(host).pop("generate", None)
    if isinstance(inner, partial) and inner.func is _generate:
        inner = inner.args[1]
    if any(hasattr(child, "generated") for child in host.children()):
        inner = partial(_generate, host, inner)
    if inner is not None:
        vars(host)["generate"] = inner


def _generate(host: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    run = inner or partial(type(host).generate, host)
    out = run(*args, **kwargs)
    for child in host.children():
        if hasattr(child, "generated") and not child.rests:
            out = child("generated", out)
    return out
