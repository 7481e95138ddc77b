"""Logs rows, tokens and images a second, and the share of the device's peak that is used."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ThroughputMonitor
from torch import Tensor

from lightning_peft.training import patches

_TOKENS = ("input_ids", "decoder_input_ids")


class Throughput(ThroughputMonitor):
    """Logs what Lightning's ``ThroughputMonitor`` measures, for any batch, with the arithmetic of tuning a delta.

    A frozen weight costs two operations a token forward and two backward (for what lies before it), a trained one two
    more for its own gradient, so ``flops = tokens * (4 frozen + 6 trained)``; an image model's tokens are its patches,
    counted as rows where their number is not known. Under ``train/device/mfu`` stands the share of the peak, where
    Lightning knows the device's.

    Args:
        window_size: over how many batches to average.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=rows, length_fn=length, window_size=window_size)
        self.window_size = window_size
        self._per_token, self._own = 0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the parameters; a module that states its own ``flops_per_batch`` is believed."""
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in pl_module.parameters() if not p.requires_grad)
        self._per_token = 4 * frozen + 6 * trained
        self._own = not hasattr(pl_module, "flops_per_batch")
        super().on_train_start(trainer, pl_module)

    # Between a hook's own count of rows and its measurement there is no other place:
    # https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/callbacks/throughput_monitor.py
    def _update(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, iter_num: int) -> None:
        if self._own:
            patches.of_run(trainer).patch(pl_module, "flops_per_batch", length(batch) * self._per_token)
        super()._update(trainer, pl_module, batch, iter_num)


def rows(batch: Any) -> int:
    """Return the number of rows of a batch: the length of its first tensor."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def length(batch: Any) -> int:
    """Return the number of tokens of a batch that the model reads, padding included, or of its rows without tokens."""
    if isinstance(batch, Mapping):
        tokens = [batch[name] for name in _TOKENS if isinstance(batch.get(name), Tensor)]
        if tokens:
            return sum(tensor.numel() for tensor in tokens)
    return rows(batch)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]
