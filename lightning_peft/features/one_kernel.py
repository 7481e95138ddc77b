"""Activations that a model computes in several kernels, computed in one, which keeps less for the backward pass.

GPT-2's GELU, for one, is written as eight operations and keeps four tensors; as one kernel it keeps its input.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.graft import Graft, Grafted, attach
from lightning_peft.features.activation_memory import Kept

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
}
"""The kernels that PyTorch has, by name."""


class OneKernel(Graft):
    """Computes an activation by one kernel where a gradient goes through it; elsewhere the host computes it itself."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def around(self, forward: Callable[..., Tensor], host: nn.Module, x: Tensor) -> Tensor:
        """Return the activation of x."""
        return KERNELS[self.kernel](x) if x.requires_grad else forward(x)


def fuse(backbone: nn.Module, name: str) -> Iterator[Grafted[OneKernel]]:
    """Attach a graft of this name to each activation that one kernel computes as well; yield their places."""
    for path, module in anatomy.without_grafts(backbone).items():
        kernel = kernel_of(module)
        if kernel is not None:
            yield Grafted(path, module, name, attach(module, OneKernel(kernel), name))


def kernel_of(module: nn.Module) -> str | None:
    """Return the name of the kernel that computes what a module computes, if it keeps less; found by computing both."""
    own, size = _computed_by(module)
    found = {name: _computed(kernel, _probe()) for name, kernel in KERNELS.items()} if size else {}
    return next((name for name, (out, smaller) in found.items() if smaller < size and _same(own, out)), None)


def same_function(module: nn.Module, kernel: str) -> bool:
    """Tell whether a module computes what the kernel of a name does."""
    own = _computed_by(module)[0]
    return own is not None and _same(own, KERNELS[kernel](_probe()))


def _probe() -> Tensor:
    return torch.linspace(-12, 12, 1001, dtype=torch.float64, device="cpu", requires_grad=True)


def _computed_by(module: nn.Module) -> tuple[Any, int]:
    """Return as `_computed`, of a module that has one argument and nothing of its own."""
    parts = [*module.parameters(), *module.buffers(), *module.children()]
    return (None, 0) if parts or len(structure.arguments_of(module)) != 1 else _computed(module.forward, _probe())


@torch.random.fork_rng(devices=[])
@torch.enable_grad()
def _computed(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, int]:
    """Return what a function makes of x, and the bytes that it keeps: none where it wants another input."""
    with contextlib.suppress(Exception), Kept([]) as kept:  # of a module of any kind
        return function(x), kept.bytes
    return None, 0


def _same(own: Any, theirs: Tensor) -> bool:
    return isinstance(own, Tensor) and own.shape == theirs.shape and torch.allclose(own, theirs, rtol=1e-9, atol=1e-9)
