"""Bottleneck networks, ``s (U act(D x + b1) + b2)``, as grafts that add them to what goes through their host."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.placement import device_of


class Bottleneck(Graft):
    """Computes ``s (U act(D x + b1) + b2)``: ``down`` is D [m, d] with b1, ``up`` is U [d, m] with b2.

    Args:
        host: the module that it is to be attached to.
        width: size d of what it reads and writes.
        size: size m of the bottleneck.
        activation: name of the activation.
        std: standard deviation of D, and of U unless ``zero_up``.
        zero_up: start U at zero.
        scale: the factor s.
    """

    def __init__(
        self, host: nn.Module, width: int, size: int, activation: str, std: float, zero_up: bool, scale: float
    ) -> None:
        super().__init__()
        device = device_of(host)
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        self.down.float()
        self.up.float()
        self.activation = ACT2FN[activation]
        self.scale = scale
        for layer, zero in ((self.down, False), (self.up, zero_up)):
            nn.init.zeros_(layer.bias)
            if zero:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)

    def update(self, x: Tensor) -> Tensor:
        """Return ``s (U act(D x + b1) + b2)``, of the shape and dtype of ``x``, [..., d]."""
        down, up, dtype = self.down, self.up, x.dtype
        hidden = self.activation(F.linear(x, down.weight.to(dtype), down.bias.to(dtype)))
        out = F.linear(hidden, up.weight.to(dtype), up.bias.to(dtype)).to(dtype)
        return out if self.scale == 1 else out * self.scale

    def neutral(self, host: nn.Module, name: str) -> Tensor | None:
        """Return zeros for U and b2."""
        return torch.zeros_like(self.get_parameter(name)) if name.startswith("up.") else None

    def added(self, base: Tensor, x: Tensor) -> Tensor:
        """Return ``base + update(x)``, of the shape and dtype of ``base``."""
        return base + self.update(x).to(base.dtype)


class Serial(Bottleneck):
    """Adds the update of the host's output, or of the first tensor of it, to that."""

    def after(self, out: Any, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return ``out + update(out)``."""
        if isinstance(out, tuple):
            return (self.after(out[0], host), *out[1:])
        if out.shape[-1] != self.down.in_features:
            raise TuningError(
                f"{type(host).__name__} gives {list(out.shape)}, but its block is {self.down.in_features} wide, so no "
                "adapter can follow it: name others with target_modules=, or exclude it."
            )
        return self.added(out, out)


class AroundNorm(Bottleneck):
    """Norms twice: ``LN(x + update(LN(x)))``; the host is the norm after a residual sum."""

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the norm of its input and of the update of the normed input."""
        x = args[0] if args else kwargs["input"]
        normed = forward(x, *args[1:])
        if not isinstance(normed, Tensor):
            raise TuningError(
                f"{type(host).__name__} gives a {type(normed).__name__} and no tensor, so that it cannot norm twice: "
                "use form='houlsby'."
            )
        return forward(self.added(x, normed))


class Parallel(Bottleneck):
    """Adds the update of the host's input to its output; the host is a whole feed-forward sublayer."""

    def after(self, out: Tensor, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``out + update(x)``."""
        return self.added(out, x)


class ParallelResidual(Bottleneck):
    """Adds the update of the residual to it; the host computes ``LN(dense(h) + residual)`` of what the sublayer read.

    In blocks like BERT's the sublayer's input reaches its end as the residual, so that this is the parallel adapter.
    """

    def __init__(self, host: nn.Module, *args: Any) -> None:
        super().__init__(host, *args)
        self.names = structure.arguments_of(host)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the host gives for the residual and its update."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        residual = given[self.names[1]]
        return forward(**(given | {self.names[1]: self.added(residual, residual)}))
