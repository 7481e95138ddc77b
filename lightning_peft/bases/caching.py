"""Caches the output of a model's frozen part, so that a fixed data set goes through it once.

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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.arguments import positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.features import heads
from lightning_peft.features.cached_rows import CachedRows
from lightning_peft.features.frozen_part import FrozenOutput, FrozenPart, Skipped, Tap
from lightning_peft.training.method import Method


@dataclass(eq=False, kw_only=True)
class CachingMethod(Method):
    """A method whose frozen part may be computed once for each row.

    Args:
        cache_features: run the frozen part once for each row and train on what it gave; for data without augmentation.
        cache_limit: most memory to take for that [GiB].
    """

    cache_features: bool = False
    cache_limit: float = positive(4.0, "is no amount of memory")

    may_change: ClassVar[frozenset[str]] = Method.may_change | {"cache_features", "cache_limit"}

    def cache(self, backbone: nn.Module, first: str | None = None, frozen: Iterable[str] = ()) -> None:
        """Attach the cache, if it is asked for, below the block ``first``, or below the head.

        Args:
            backbone: what is tuned.
            first: name of the first block that is trained; None: the head.
            frozen: names of the blocks before it.

        Raises:
            TuningError: the frozen part would not be in eval mode.
        """
        if not self.cache_features:
            return
        if self.backbone_mode != "eval":
            raise TuningError(
                f"cache_features=True keeps what dropout would change in each epoch with backbone_mode="
                f"{self.backbone_mode!r}: use backbone_mode='eval'."
            )
        name = f"{self.key}_cache"
        rows = CachedRows(int(self.cache_limit * 2**30))
        base = structure.base_model_of(backbone)
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
        """Begin to count the training rows anew: more of them than there are mean augmentation."""
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

    def _cached(self, module: nn.Module) -> CachedRows | None:
        applied = self.applied(module)
        return vars(applied).get("_rows") if applied is not None else None


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
