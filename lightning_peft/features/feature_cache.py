"""A cache of what the frozen part of a model computes, so that a fixed data set goes through it once.

The rows of a batch are told by a hash of all that the frozen part is given, so that it works in any module, whatever
the batches and their order, for training and validation rows alike. What is kept for a row is the input of the part
that is trained: a head's (one vector, in most models), or a block's (one vector a token). When all rows of a batch are
known, the frozen part is left out. Without augmentation training on the cache gives what training without it gives, up
to rounding: a row is kept as its first batch gave it, and a batch of another size or order is rounded otherwise.

A text row is the same row with more padding at its end, if what is kept is one vector; the first time that a row comes
with other padding it is computed again and compared. Kept tokens are used again for the same padding alone: pad to a
fixed length there.

What cannot be cached is refused: a frozen part in training mode (dropout), one that something trains, rows that change
from epoch to epoch (augmentation), more than fits the limit.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.errors import TuningError
from lightning_peft.features import heads
from lightning_peft.features.kept_rows import Rows, identify
from lightning_peft.graft import Graft, attach
from lightning_peft.method import Method


class FrozenPart(Graft):
    """Runs its host without a graph, and not at all when all rows are known: its output is then a stub of zeros.

    Args:
        rows: shared with the taps that put the kept rows in place of the stub.
        skip: whether the host can be left out; else it holds blocks to be trained, and `Skipped` ones.
    """

    def __init__(self, rows: Rows, skip: bool) -> None:
        super().__init__()
        self.rows, self.skip = rows, skip

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host, or a stub of it."""
        names = list(inspect.signature(type(host).forward).parameters)[1:]
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
        config = getattr(host, "config", None)
        for name in ("output_hidden_states", "output_attentions", "past_key_values"):
            value = given.get(name)
            asked = value if value is not None else getattr(config, name, False)
            if asked:
                raise TuningError(f"cache_features=True keeps no {name}: leave that out, or set cache_features=False.")


class FrozenOutput(FrozenPart):
    """Gives what the host gave for these rows before: for a backbone whose head lies outside of it."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host, from the cache if all rows are known."""
        out = super().around(forward, host, *args, **kwargs)
        fields: list[Tensor] = []
        _map(out, fields.append)
        if self.rows.trained is None:
            self.rows.trained = list(range(len(fields)))
        kept = iter([self.rows.tap(i, x) for i, x in enumerate(fields)])
        return _map(out, lambda _: next(kept))


class Tap(Graft):
    """Keeps the input of its host, or replaces it by what was kept."""

    def __init__(self, rows: Rows, index: int) -> None:
        super().__init__()
        self.rows, self.index = rows, index

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the kept input, or keep ``x``."""
        return self.rows.tap(self.index, x)


class Skipped(Graft):
    """Leaves a frozen block out when all rows are known: it hands its input on."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around(self, forward: Callable[..., Any], host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the block, or its input."""
        if self.rows.mode == "replay":
            return x
        out = forward(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TuningError(
                f"{type(host).__name__} hands on more than hidden states, so its features cannot be cached: set "
                "cache_features=False."
            )
        return out


@dataclass(eq=False, kw_only=True)
class CachingMethod(Method):
    """A method whose frozen part may be computed once for each row.

    Args:
        cache_features: run the frozen part once for each row and train on what it gave; for data without augmentation.
        cache_limit: most memory to take for that [GiB].
    """

    cache_features: bool = False
    cache_limit: float = 4.0

    may_change: ClassVar[frozenset[str]] = Method.may_change | {"cache_features", "cache_limit"}

    def cache(self, backbone: nn.Module, first: str | None = None, frozen: Iterable[str] = ()) -> None:
        """Attach the cache, if it is asked for, below the block ``first``, or below the head.

        Args:
            backbone: what is tuned.
            first: name of the first block that is trained; None: the head.
            frozen: names of the blocks before it.

        Raises:
            TuningError: the frozen part would not be in eval mode, or the limit is no size.
        """
        if not self.cache_features:
            return
        if self.backbone_mode != "eval":
            raise TuningError(
                f"cache_features=True keeps what dropout would change in each epoch with backbone_mode="
                f"{self.backbone_mode!r}: use backbone_mode='eval'."
            )
        if not self.cache_limit > 0:
            raise TuningError(f"cache_limit={self.cache_limit} is no amount of memory: give GiB.")
        name = f"{self.name}_cache"
        rows = Rows(int(self.cache_limit * 2**30))
        base = getattr(backbone, "base_model", backbone)
        head = heads.head_modules(backbone)
        if first is not None:
            rows.trained = [0]
            attach(base, FrozenPart(rows, skip=False), name)
            for block in frozen:
                attach(backbone.get_submodule(block), Skipped(rows), name)
            attach(backbone.get_submodule(first), Tap(rows, 0), name)
        elif head:
            attach(base, FrozenPart(rows, skip=True), name)
            for i, module in enumerate(head.values()):
                attach(module, Tap(rows, i), name)
        else:
            attach(base, FrozenOutput(rows, skip=True), name)
        self._rows = rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how many rows there are, to tell augmentation by a row too many."""
        super().on_fit_start(trainer, pl_module)
        rows = self._cached(pl_module)
        if rows is not None:
            rows.seen, rows.epochs, rows.expected = set(), 0, None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the rows of the training data, which Lightning has by now."""
        super().on_train_epoch_start(trainer, pl_module)
        rows = self._cached(pl_module)
        if rows is not None:
            rows.expected = _count(trainer.train_dataloader)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that the rows to come are of training."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        rows = self._cached(pl_module)
        if rows is not None:
            rows.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the rows of training are over."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        rows = self._cached(pl_module)
        if rows is not None:
            rows.training = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the epochs."""
        super().on_train_epoch_end(trainer, pl_module)
        rows = self._cached(pl_module)
        if rows is not None:
            rows.epochs += 1

    def _cached(self, module: nn.Module) -> Rows | None:
        applied = self.applied(module)
        return vars(applied).get("_rows") if applied is not None else None


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


def _count(loaders: Any) -> int | None:
    """Return how many rows the data sets of all loaders have; None if one does not say."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        counts = [_count(loader) for loader in loaders]
        return None if None in counts else sum(count or 0 for count in counts)
    try:
        return len(loaders.dataset)
    except (AttributeError, TypeError):  # an iterable has no length
        return None
