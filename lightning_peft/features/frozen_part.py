"""Grafts that skip the frozen part of a model for rows whose features are cached."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import cache_argument, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft
from lightning_peft.core.tracing import is_traced
from lightning_peft.features.cached_rows import CachedRows, identify


class FrozenPart(Graft):
    """Runs its host without a graph, and not at all when all rows are cached: its output is then a stub of zeros.

    Args:
        rows: shared with the taps that put the kept rows in place of the stub.
        skip: whether the host can be left out; else it holds blocks to be trained, and `Skipped` ones.
    """

    def __init__(self, rows: CachedRows, skip: bool) -> None:
        super().__init__()
        self.rows, self.skip = rows, skip

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host, or a stub of it; a tracer sees the whole computation."""
        if is_traced():
            return forward(*args, **kwargs)
        names = structure.arguments_of(host)
        given = dict(zip(names, args, strict=False)) | kwargs
        self._check(host, given)
        keys, shape = identify(given)
        if not self.skip:
            self.rows.begin(keys)
            return forward(*args, **kwargs)
        if self.rows.begin(keys) and shape in self.rows.stubs:
            return _stub(self.rows.stubs[shape], given, len(keys))
        self.rows.mode = "record"
        trained = next((name for name, p in host.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise TuningError(f"{trained} is trained below the features to be cached: set cache_features=False.")
        with torch.no_grad():
            out = forward(*args, **kwargs)
        self.rows.stubs[shape] = _map(out, lambda tensor: tensor.to("meta"))
        return out

    def _check(self, host: nn.Module, given: dict[str, Any]) -> None:
        if host.training:
            raise TuningError(
                "cache_features=True needs the frozen part in eval mode, and it is in training mode: use "
                "backbone_mode='eval', and outside of a Trainer call eval() on it."
            )
        config = structure.config_of(host)
        for name in ("output_hidden_states", "output_attentions", *cache_argument.NAMES):
            value = given.get(name)
            asked = value if value is not None else structure.setting(config, name)
            if asked:
                raise TuningError(f"cache_features=True keeps no {name}: leave that out, or set cache_features=False.")


class FrozenOutput(FrozenPart):
    """Returns the host's cached output for these rows: for a backbone whose head lies outside of it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host, from the cache if all rows are known."""
        out = super().around(forward, host, *args, **kwargs)
        if is_traced():
            return out
        fields: list[Tensor] = []
        _map(out, fields.append)
        if self.rows.trained is None:
            self.rows.trained = list(range(len(fields)))
        kept = iter([self.rows.tap(i, x) for i, x in enumerate(fields)])
        return _map(out, lambda _: next(kept))


class Tap(Graft):
    """Caches the input of its host, or replaces it by the cached one."""

    def __init__(self, rows: CachedRows, index: int) -> None:
        super().__init__()
        self.rows, self.index = rows, index

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the kept input, or keep ``x``."""
        return x if is_traced() else self.rows.tap(self.index, x)


class Skipped(Graft):
    """Skips a frozen block when all rows are cached: its input is its output."""

    def __init__(self, rows: CachedRows) -> None:
        super().__init__()
        self.rows = rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the block, or its input."""
        if is_traced():
            return forward(x, *args, **kwargs)
        if self.rows.mode == "replay":
            return x
        out = forward(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TuningError(
                f"{type(host).__name__} hands on more than hidden states, so its features cannot be cached: set "
                "cache_features=False."
            )
        return out


def _map(out: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return an output of a model with each tensor changed; what is neither tensor nor container becomes None."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, dict):
        return type(out)(**{name: _map(value, change) for name, value in out.items()})
    if isinstance(out, (tuple, list)):
        return type(out)(_map(value, change) for value in out)
    return None


def _stub(shapes: Any, given: dict[str, Any], count: int) -> Any:
    """Return zeros, which take no memory, in the shape of an output for a batch of ``count`` rows."""
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    return _map(shapes, lambda t: torch.zeros((), dtype=t.dtype, device=device).expand(count, *t.shape[1:]))
