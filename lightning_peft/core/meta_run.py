"""Runs of a part of a model on the meta device, which compute shapes and no numbers, whatever the size of the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_peft.core.private_torch import drop_hooks
from lightning_peft.core.sharded import is_part


def ran(part: nn.Module, *inputs: Any, each: Callable[[nn.Module], Any] | None = None, **named: Any) -> bool:
    """Run a part without numbers, put back what it keeps between two calls, and tell whether it came to its end.

    Args:
        part: the part.
        *inputs: what it is called with, on the meta device.
        each: a function that replaces the ``forward`` of each module inside the part for this run; None: none.
        **named: further inputs.
    """
    with _as_it_was(part, each), suppress(Exception), torch.no_grad(), _NoNumbers():
        torch.func.functional_call(part, _without_values(part), inputs, named, tie_weights=False)
        return True
    return False  # whatever a foreign model raises without numbers


def depended_on(
    part: nn.Module,
    results: Callable[[Any], list[Tensor]],
    each: Callable[[nn.Module], Any] | None = None,
    **named: Any,
) -> set[str] | None:
    """Return the names of the parameters that what a part gives in eval mode depends on.

    None: it cannot be run, or is sharded.

    Args:
        part: the part.
        results: picks the tensors that count from what the part gives.
        each: a function that replaces the ``forward`` of each module inside the part for this run; None: none.
        **named: what it is called with, on the meta device.
    """
    if any(
        is_part(parameter) for parameter in part.parameters()
    ):  # the first run of a sharded model is to be a real one
        return None
    with _as_it_was(part, each), suppress(Exception), torch.enable_grad(), _NoNumbers():
        for module in part.modules():
            vars(module)["training"] = False
        tensors = _without_values(part)
        names = [name for name, tensor in tensors.items() if tensor.requires_grad]
        out = torch.func.functional_call(part, tensors, (), named, tie_weights=False)
        total = torch.stack([tensor.float().sum() for tensor in results(out) if tensor.requires_grad]).sum()
        gradients = torch.autograd.grad(total, [tensors[name] for name in names], allow_unused=True)
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return None


@contextmanager
def _as_it_was(part: nn.Module, each: Callable[[nn.Module], Any] | None) -> Iterator[None]:
    """Replace the ``forward`` of modules inside a part, and put back what they keep when the context ends."""
    kept = {module: dict(vars(module)) for module in part.modules()}
    # Among these are the hooks, which transformers adds in a first run to note hidden states, once for each model.
    within = [(held, held.copy()) for own in kept.values() for held in own.values() if isinstance(held, dict)]
    try:
        for module in kept:
            drop_hooks(module, _is_of_a_library)
        for module in list(kept)[1:]:
            if each is not None and (forward := each(module)) is not None:
                vars(module)["forward"] = forward
        yield
    finally:
        for module, attributes in kept.items():
            vars(module).clear()
            vars(module).update(attributes)
        for held, before in within:
            held.clear()
            held.update(before)


def _is_of_a_library(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook is one that a model computes by, and none of the user's, who may count or keep something."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0] in ("torch", "transformers", "lightning_peft")


def _without_values(part: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a part on the meta device, those of a module with several names by one of these."""
    found = {}
    for path, module in part.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            empty = torch.empty_like(tensor, device="meta")
            learns = isinstance(tensor, nn.Parameter) and empty.is_floating_point()
            found[f"{path}.{name}".lstrip(".")] = empty.requires_grad_(learns)
    return found


class _NoNumbers(TorchFunctionMode):
    """Answers what the number in a tensor without values is by 1, whether it is true by yes, and equality by yes."""

    _NUMBERS: ClassVar[Mapping[Any, Any]] = {
        Tensor.item: 1, Tensor.__int__: 1, Tensor.__index__: 1, Tensor.__float__: 1.0, Tensor.__bool__: True,
        torch.equal: True, Tensor.equal: True,
    }  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._NUMBERS and args[0].is_meta:
            answer = self._NUMBERS[func]
            return bool(answer) if args[0].dtype is torch.bool else answer
        return func(*args, **(kwargs or {}))


def resting(joint: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for a graft: return what it gets."""
    if joint == "around":
        return args[0](*args[2:], **kwargs)
    return args[1] if joint == "before" else args if joint == "key_value" else args[0]
