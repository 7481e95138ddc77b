"""Runs of a part of a model on the meta device, which compute shapes and no numbers, whatever the size of the model."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def ran(part: nn.Module, *inputs: Any, each: Callable[[nn.Module], Any] | None = None, **named: Any) -> bool:
    """Run a part without numbers, put back what it keeps between two calls, and tell whether it came to its end.

    Args:
        part: the part.
        *inputs: what it is called with, on the meta device.
        each: a function that replaces the ``forward`` of each module inside the part for this run; None: none.
        **named: further inputs.
    """
    kept = {module: dict(vars(module)) for module in part.modules()}
    try:
        for module in list(kept)[1:]:
            if each is not None and (forward := each(module)) is not None:
                vars(module)["forward"] = forward
        with suppress(Exception), torch.no_grad(), _NoNumbers():  # whatever a foreign model raises without numbers
            torch.func.functional_call(part, _without_values(part), inputs, named, tie_weights=False)
            return True
    finally:
        for module, attributes in kept.items():
            vars(module).clear()
            vars(module).update(attributes)
    return False


def _without_values(part: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a part on the meta device, those of a module with several names by one of these."""
    return {
        f"{path}.{name}".lstrip("."): torch.empty_like(tensor, device="meta")
        for path, module in part.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


class _NoNumbers(TorchFunctionMode):
    """Answers what the number in a tensor without values is by 1, whether it is true by yes, and equality by yes."""

    _NUMBERS: ClassVar[Mapping[Any, Any]] = {
        Tensor.item: 1, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.__float__: 1.0, Tensor.__bool__: True,
        torch.equal: True, Tensor.equal: True,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._NUMBERS and args[0].is_meta:
            return self._NUMBERS[func]
        return func(*args, **(kwargs or {}))
