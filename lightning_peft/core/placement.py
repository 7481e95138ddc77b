"""Tells where the modules of a backbone compute that accelerate has spread over devices, on CPU or disk among them.

With a ``device_map`` accelerate replaces the ``forward`` of a module: there it moves the input to the module's device
and, where weights are offloaded, loads them for the call. Between two calls these are on the meta device, without
values. So a graft belongs where its host computes, and sees the input where the module before has left it.

https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/hooks.py
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError

_HOOK = "_hf_hook"


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of accelerate's hook, or that of its first parameter."""
    for part in module.modules():
        if (device := execution_device(part)) is not None:
            return device
        if (parameter := next(part.parameters(recurse=False), None)) is not None:
            return parameter.device
    return torch.device("cpu")


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate moves the input of a module, or None: it does not."""
    device = next((d for hook in _hooks(module) if (d := vars(hook).get("execution_device")) is not None), None)
    return None if device is None else torch.device(device)


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether a module has weights of its own that are loaded for each call alone."""
    return any(vars(hook).get("offload") for hook in _hooks(module)) and any(
        p.is_meta for p in module.parameters(recurse=False)
    )


def has_values(module: nn.Module) -> bool:
    """Tell whether a module computes numbers: its weights are not on the meta device, or are loaded for a call."""
    return is_offloaded(module) or not any(p.is_meta for p in module.parameters())


def value_of(backbone: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a backbone with its values, which lie elsewhere if it is offloaded."""
    if not tensor.is_meta:
        return tensor
    path, _, leaf = name.rpartition(".")
    for hook in _hooks(backbone.get_submodule(path)):
        known = vars(hook).get("weights_map")
        if known is not None and vars(hook).get("offload"):
            return known[leaf]
    return tensor


def check_trainable(backbone: nn.Module, names: Iterable[str]) -> None:
    """Check that no tensor that is to be trained is loaded anew for each call.

    Raises:
        TuningError: one is.
    """
    for name in names:
        if is_offloaded(backbone.get_submodule(name.rpartition(".")[0])):
            raise TuningError(
                f"{name} is to be trained, but is offloaded and read anew for each call: load the backbone with a "
                "device_map that keeps it on a device, or take a method that leaves weights alone, such as LoRA."
            )


def check_readable(host: nn.Module, what: str) -> None:
    """Check that the weights of a host can be read outside of its call.

    Raises:
        TuningError: they are offloaded.
    """
    if is_offloaded(host):
        raise TuningError(
            f"{what} needs the weights of {type(host).__name__}, which are offloaded and there during a call alone: "
            "load the backbone with a device_map that keeps them on a device."
        )


def is_dispatched(backbone: nn.Module) -> bool:
    """Tell whether accelerate calls some module by hooks of its own."""
    return any(_hooks(module) for module in backbone.modules())


@contextmanager
def undispatched(backbone: nn.Module) -> Iterator[None]:
    """Let the modules compute by their own ``forward``, where tensors are, while the context lasts."""
    replaced = {module: vars(module).pop("forward", None) for module in backbone.modules() if any(_hooks(module))}
    try:
        yield
    finally:
        for module, forward in replaced.items():
            if forward is not None:
                vars(module)["forward"] = forward


def moved(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call on the device to which accelerate will move them, or as they are."""
    if device is None:
        return args, kwargs
    new = [value.to(device) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
    return tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True))


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks of a module, which may be one of several."""
    hook = vars(module).get(_HOOK)
    return [] if hook is None else list(vars(hook).get("hooks", [hook]))
