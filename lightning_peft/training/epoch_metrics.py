"""Sums of training metrics over an epoch, which Lightning keeps in memory alone, for a run that resumes inside of it.

https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py keeps
them, and none of its files.
"""

from typing import Any

import lightning as L
from torch import Tensor

from lightning_peft.training.record import Life


def marks(trainer: L.Trainer) -> dict[str, Any]:
    """Return the present sums of the metrics that are logged with ``on_epoch``, as they are held; nothing is copied."""
    return {
        key: (metric.value, metric.cumulated_batch_size if metric.meta.is_mean_reduction else None)
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        if metric.meta.on_epoch and _is_sum(metric) and not metric.has_reset
    }


def sums(trainer: L.Trainer, held: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be saved of the sums that `marks` returned."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: {
            "names": sorted({results[key].meta.name, results[key].meta.forked_name(False)}),
            "value": value.detach().cpu().clone(),
            "count": None if count is None else count.cpu().clone(),
        }
        for key, (value, count) in held.items()
    }


def others(trainer: L.Trainer, life: Life) -> list[str]:
    """Return the names of the metrics of the epoch that sum by themselves, whether they are logged or not."""
    metrics = [m for m in trainer.fit_loop.epoch_loop._results.values() if m.meta.on_epoch and not m.has_reset]
    logged = [metric.meta.name for metric in metrics if not _is_sum(metric)]
    return logged + sorted(name for name in life.summed if life.objects[name][0].update_called)


def _is_sum(metric: Any) -> bool:
    return metric.is_tensor and not metric.meta.is_custom_reduction


def add(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    """Add the sums to those of the metrics that have been logged since, and take them out of ``saved``."""
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if key not in saved or metric.has_reset:
            continue
        before = saved.pop(key)
        value: Tensor = before["value"].to(metric.value.device)
        extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
        metric.value = metric.meta.reduce_fx(value, metric.value) if extreme else value + metric.value
        if before["count"] is not None:
            metric.cumulated_batch_size = metric.cumulated_batch_size + before["count"].to(value.device)
        metric._computed = None


def close(trainer: L.Trainer, saved: dict[str, Any]) -> None:
    """Tell callbacks and schedulers of metrics that have not been logged since, and take them out of ``saved``."""
    for before in saved.values():
        value = before["value"] if before["count"] is None else before["value"] / before["count"]
        device = trainer.strategy.root_device
        trainer.callback_metrics.update(dict.fromkeys(before["names"], value.to(device)))
    saved.clear()
