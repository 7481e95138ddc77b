"""A callback that measures four steps: one to begin with, two small ones, and one of a whole batch."""

from collections.abc import Callable, MutableMapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core import text_structure
from lightning_peft.core.private_torch import times_written
from lightning_peft.core.run import canonical
from lightning_peft.core.tuning import tunings
from lightning_peft.reports.findings import Finding
from lightning_peft.reports.live_memory import LiveBytes, extrapolate
from lightning_peft.reports.memory import Memory, before_step, of_one_process
from lightning_peft.reports.parameters import count, size
from lightning_peft.training import checks, strategy

TOLERANCE = 0.15
"""How far a prediction of bytes may be from what is measured."""
STEPS = 4


class Probe(L.Callback):
    """Measures four steps of a fit on the same rows, and ends it then.

    The first step makes the optimizer's state; the next two take a few rows of the batch and say what the whole one
    will need, which is measured in the last. Where the rows of a batch cannot be told apart, it is measured alone.

    Args:
        recompute: whether the strategy to be checked computes activations anew in the backward pass.
    """

    def __init__(self, recompute: bool = False) -> None:
        self.recompute = recompute
        self.series: dict[int, list[int]] = {}
        self.longest: dict[str, int] = {}
        self.rows = 0
        self.memory = Memory(0, 0, 0)
        self._start: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._without: list[str] = []
        self._batch: dict[str, Any] = {}
        self._step = 0
        self._live: LiveBytes | None = None
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switch activation checkpointing on, if the strategy to be checked does."""
        if self.recompute:
            strategy.checkpoint_activations(pl_module, on=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the trained parameters, which the steps must change, and the frozen ones, which none may."""
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                self._start[name] = p.detach().clone()
            else:
                self._versions[name] = times_written(p)
        for path, backbone, _ in tunings(pl_module):
            self.watch_positions(path, backbone)

    def watch_positions(self, path: str, backbone: nn.Module) -> None:
        """Note how many positions the backbone at ``path`` looks up."""
        for table in text_structure.position_tables(backbone).values():
            self._handles.append(table.register_forward_pre_hook(self._looked_up(canonical(path))))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Cut the batch to a few rows or not, and count what is alive from here on."""
        self._cut(batch)
        self._live = None
        if self._step and _steps(trainer, batch_idx):
            self._live = LiveBytes(before_step(pl_module, trainer.optimizers, batch)).__enter__()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Note the parameters without a gradient."""
        self._without = checks.without_gradient(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the count of this step."""
        if self._live is not None:
            self.series[_rows(batch)] = self._live.series
            self.close()
        if not _steps(trainer, batch_idx):
            return
        self._step += 1
        if self._step == STEPS:
            trainer.should_stop = True
        self.memory = of_one_process(pl_module, trainer.optimizers)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop measuring."""
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """Stop counting; a step that failed has not come to its end."""
        if self._live is not None:
            live, self._live = self._live, None
            live.__exit__(None, None, None)

    def findings(self, module: nn.Module) -> list[Finding]:
        """Return the findings about the parameters."""
        now = dict(module.named_parameters())
        still = [name for name, p in self._start.items() if torch.equal(p, now[name])]
        written = [name for name, number in self._versions.items() if times_written(now[name]) != number]
        total = f"{len(self._start)} tensors, {count(self._start.values()):,} values"
        return [
            Finding("every trained tensor is in one optimizer group", True, total),  # else the fit has ended
            Finding("every trained tensor gets a gradient", not self._without, _first(self._without, total),
                    "leave them out with exclude=, or DDP waits for them"),
            Finding("every trained tensor moves", not still, _first(still, total),
                    "see its learning rate (a warm-up may begin at 0) and its dtype"),
            Finding("no frozen tensor is written to", not written, _first(written, f"{len(self._versions)} tensors"),
                    "something changes the backbone in place"),
        ]  # fmt: skip

    def predicted(self) -> int | None:
        """Return the predicted peak of a step with the whole batch; None: there were no smaller ones to draw it on."""
        small = [(rows, series) for rows, series in self.series.items() if rows in self._few()]
        return extrapolate(small[0], small[1], self.rows) if len(small) == 2 else None

    def in_step(self, module: nn.Module) -> list[Finding]:
        """Return the memory that a step takes at its peak, as predicted from a few rows and as measured with all."""
        predicted, series = self.predicted(), self.series.get(self.rows)
        peak = max(series) if series else predicted
        if peak is None:
            return []
        self.memory = self.memory.at_peak(peak)
        parts = f"{self.rows or 'all'} rows: {size(peak)}" + ("" if series else " predicted")
        if torch.cuda.is_available() and next(module.parameters()).is_cuda:
            parts += f" (allocator of the GPU: {size(torch.cuda.max_memory_allocated())})"
        if predicted is None or series is None or self.rows <= 2:
            return [Finding("memory of a process", True, f"{parts}: {self.memory}")]
        few = " and ".join(map(str, self._few()))
        seen = f"{parts} measured, {size(predicted)} predicted from {few} rows: {self.memory}"
        near = abs(predicted - peak) <= TOLERANCE * peak
        return [Finding("memory of a process is as predicted", near, seen, "the step treats large batches otherwise")]

    def _few(self) -> tuple[int, ...]:
        """Return how many rows the small steps have; one row alone takes other paths than several, so it is avoided."""
        return (2, 3) if self.rows > 3 else (1, 2) if self.rows > 1 else ()

    def _cut(self, batch: Any) -> None:
        """Give each step rows of the first batch: batches differ in the length of their texts."""
        if not isinstance(batch, MutableMapping):
            return
        if not self._batch:
            self._batch, self.rows = dict(batch), _rows(batch)
        few = self._few()
        if not few:
            return
        kept = self.rows if self._step == STEPS - 1 else few[max(self._step - 1, 0)]
        for name in list(batch):
            del batch[name]
        for name, value in self._batch.items():
            cut = isinstance(value, (Tensor, list)) and not (isinstance(value, Tensor) and not value.ndim)
            batch[name] = value[:kept] if cut else value

    def _looked_up(self, path: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim:
                self.longest[path] = max(self.longest.get(path, 0), args[0].shape[-1])

        return before


def _steps(trainer: L.Trainer, batch_idx: int) -> bool:
    """Tell whether the optimizer steps after this batch."""
    last = batch_idx + 1 == trainer.num_training_batches
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _rows(batch: Any) -> int:
    """Return the number of rows that all entries of a batch have; 0: they differ, or it is no mapping."""
    if not isinstance(batch, MutableMapping):
        return 0
    values = [value for value in batch.values() if isinstance(value, (Tensor, list))]
    lengths = {len(value) for value in values if not (isinstance(value, Tensor) and not value.ndim)}
    nested = any(isinstance(value, (MutableMapping, tuple)) for value in batch.values())
    return lengths.pop() if len(lengths) == 1 and not nested else 0


def _first(names: Any, otherwise: str) -> str:
    names = sorted(names)
    return f"{len(names)}, e.g. {names[0]}" if names else otherwise
