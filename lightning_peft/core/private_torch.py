"""Names of torch that are not public and that several files need: each is used here and nowhere else.

All private names, those of one file too, have a row in ``tests/test_private_names.py``, which fails when one changes.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, Self

from torch import Tensor, nn

# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/eval_frame.py (``OptimizedModule``),
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_common_utils.py (``FSDP_WRAPPED_MODULE``),
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""What torch.compile, FSDP and activation checkpointing put into the names of tensors."""


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` was applied to the module, as a wrapper or in place.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py (``_compiled_call_impl``).
    """
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def output_hooks(module: nn.Module) -> Collection[Callable[..., Any]]:
    """Return the hooks that see the output of a module, in their order.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py (``_forward_hooks``).
    """
    return module._forward_hooks.values()


def drop_hooks(module: nn.Module, keep: Callable[[Callable[..., Any]], bool]) -> None:
    """Take off the hooks before and after the forward pass of a module that a function does not keep.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py (``_forward_pre_hooks``).
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if not keep(hook)]:
            del hooks[number]


def note_last(module: nn.Module) -> None:
    """Let transformers, which notes outputs from a first run on, note that of a module as all other hooks leave it.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py (``_forward_hooks``).
    """
    hooks = module._forward_hooks
    noting = [n for n, hook in hooks.items() if hook.__module__ == "transformers.utils.output_capturing"]
    for number in noting:
        hooks.update({number: hooks.pop(number)})


def times_written(tensor: Tensor) -> int:
    """Return how often a tensor has been written to in place.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_C/__init__.pyi.in (``_version``).
    """
    return tensor._version


def replace_tensors(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
    """Replace the parameters and buffers of a module, and of those below it, by what a function makes of them.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py (``_apply``).
    """
    module._apply(fn, recurse)


class Movable(nn.Module):
    """A module that can change how it is moved to another device or dtype."""

    def moving(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the function that is applied to its tensors in place of ``fn``."""
        return fn

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(self.moving(fn), recurse)
