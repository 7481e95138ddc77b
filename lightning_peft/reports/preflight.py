"""What can be known before GPU hours are spent: three small steps of a fit, and what they say of the whole."""

import tempfile
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from lightning_peft import select
from lightning_peft.delta import canonical, collect, delta_names, read_delta
from lightning_peft.errors import TuningError
from lightning_peft.method import Method
from lightning_peft.reports.parameters import count, dtypes, size
from lightning_peft.training import strategy
from lightning_peft.tuning import tunings

TOLERANCE = 0.15
"""How far a prediction of bytes may be from what is measured."""


class Finding(NamedTuple):
    """One line of the table: what was looked at, whether it passes, what was seen, and what to do if it does not."""

    what: str
    passes: bool
    seen: str
    remedy: str = ""


class Preflight(L.Trainer):
    """A Trainer that looks instead of training; `Preflight.of` makes it from the arguments of the one to be checked."""

    asked: dict[str, Any]
    probe: "Probe"
    folder: "tempfile.TemporaryDirectory[str]"

    @classmethod
    def of(cls, **asked: Any) -> "Preflight":
        """Return a Trainer on one device that takes three steps, logs nothing and keeps nothing.

        Args:
            asked: the arguments of the Trainer that is to be checked.
        """
        probe, folder = Probe(), tempfile.TemporaryDirectory(prefix="preflight-")
        kept = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        given = {name: asked[name] for name in kept if asked.get(name) is not None}
        gpu = torch.cuda.is_available() and (asked.get("accelerator") or "auto") in ("auto", "gpu", "cuda")
        if given.get("precision") in ("16-mixed", "16", 16) and not gpu:
            given["precision"] = "bf16-mixed"  # a CPU has no scaled half precision
        trainer = cls(
            **given,
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_train_batches=3 * int(given.get("accumulate_grad_batches", 1)),
            limit_val_batches=1,
            max_epochs=1,
            default_root_dir=folder.name,
            callbacks=[probe, *(c for c in _listed(asked.get("callbacks")) if isinstance(c, Method))],
        )
        trainer.asked, trainer.probe, trainer.folder = asked, probe, folder
        return trainer

    def check(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Take three steps, print what passes and what does not, and end with exit code 1 if anything fails.

        Args:
            model: what is to be trained.
            datamodule: its data.
            ckpt_path: accepted so that a configuration of fit can be given as it is; not read.
        """
        del ckpt_path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.findings(model, datamodule)
        Console().print(table(found))
        if not all(finding.passes for finding in found):
            raise SystemExit(1)

    def findings(self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None) -> list[Finding]:
        """Return what three steps show."""
        with self.folder:
            return self._look(model, datamodule)

    def _look(self, model: L.LightningModule, datamodule: L.LightningDataModule | None) -> list[Finding]:
        try:
            self.fit(model, datamodule)
        except Exception as error:  # whatever it is, it is what the table is for
            said = str(error) if isinstance(error, TuningError) else f"{type(error).__name__}: {error}"
            first = (said.strip().splitlines() or [type(error).__name__])[0]
            return [*self._devices(), Finding("three steps of training", False, first, "mend this, then check again")]
        probe = self.probe
        return [
            *self._devices(),
            *probe.findings(model),
            *self._half_precision(model),
            *self._units(model),
            *self._tied(model),
            *self._positions(model),
            *probe.memory(model, self._world()),
            *self._files(model),
        ]

    def _world(self) -> int:
        devices, nodes = self.asked.get("devices") or "auto", int(self.asked.get("num_nodes") or 1)
        here = max(torch.cuda.device_count(), 1)
        chosen = len(devices) if isinstance(devices, list) else here if devices in ("auto", "-1", -1) else int(devices)
        return chosen * nodes

    def _devices(self) -> list[Finding]:
        devices, accelerator = self.asked.get("devices") or "auto", self.asked.get("accelerator") or "auto"
        there = torch.cuda.device_count()
        if accelerator == "cpu" or not there:
            place = "the CPU" if accelerator == "cpu" else "a machine without GPU: sizes are checked, speed is not"
            remedy = "run it where the GPUs are, or give --trainer.accelerator auto"
            return [Finding("devices", accelerator in ("cpu", "auto"), f"{devices} asked for, on {place}", remedy)]
        wanted = int(devices) if str(devices).isdigit() else there
        return [Finding("devices", wanted <= there, f"{wanted} of {there} GPUs", f"give --trainer.devices {there}")]

    def _half_precision(self, model: L.LightningModule) -> list[Finding]:
        trained = [p for p in model.parameters() if p.requires_grad]
        half = self.asked.get("precision") in ("16-mixed", "16", 16) and any(p.dtype is torch.float16 for p in trained)
        seen = f"trained in {dtypes(trained)}, precision {self.asked.get('precision') or '32-true'}"
        return [Finding("the gradient scaler meets no fp16 gradient", not half, seen, "give the method keep_fp32=True")]

    def _units(self, model: L.LightningModule) -> list[Finding]:
        chosen = self.asked.get("strategy") or "auto"
        name = type(chosen).__name__ if isinstance(chosen, Strategy) else str(chosen)
        world = self._world()
        if isinstance(chosen, FSDPStrategy) or name.startswith("fsdp"):
            mixed = [n for n, m in model.named_modules() if strategy.wrap_policy(m, False, 1) and _mixed(m)]
            return [Finding("FSDP units are uniform", not mixed, f"{name} over {world}", f"put {mixed[:1]} apart")]
        if isinstance(chosen, ModelParallelStrategy):
            rows = strategy.plan(model, world)
            kept, most = sum(row[2] for row in rows), max((row[1] for row in rows), default=0)
            kinds = {p.dtype for p in model.parameters() if p.requires_grad}
            seen = f"{len(rows)} units over {world} processes: {size(kept)} a process, {size(most)} gathered at most"
            return [Finding("FSDP2 units are uniform", len(kinds) <= 1, seen, "train in one dtype: keep_fp32=True")]
        return [Finding("strategy", True, f"{name} over {world}: every process holds the whole model")]

    def _tied(self, model: L.LightningModule) -> list[Finding]:
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(canonical(name))
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        tied = [group for key, group in names.items() if len(group) > 1 and key in trained]
        seen = f"{' = '.join(tied[0])} is trained" if tied else "no trained tensor is tied to another"
        return [Finding("tied weights", True, seen)]

    def _positions(self, model: L.LightningModule) -> list[Finding]:
        found = []
        for path, backbone, _ in tunings(model):
            most, longest = select.max_positions(backbone), self.probe.longest.get(canonical(path), 0)
            if most is not None and longest:
                limit = getattr(self.datamodule, "max_length", None) if hasattr(self, "datamodule") else None
                needs = max(longest, limit) if isinstance(limit, int) else longest
                seen = f"{needs} of {most} positions, virtual tokens included"
                found.append(Finding("positions fit", needs <= most, seen, f"cut the texts: max_length={most}"))
        return found

    def _files(self, model: L.LightningModule) -> list[Finding]:
        """Write a checkpoint, read it back, and compare its bytes with the tensors that it should hold."""
        file = Path(self.folder.name) / "preflight.ckpt"
        self.save_checkpoint(file)
        tensors, _ = read_delta(file)
        live = {name: tensor.detach().cpu() for name, tensor in collect(model).items()}
        same = tensors.keys() == live.keys() and all(torch.equal(tensors[name], t) for name, t in live.items())
        predicted, written = self.probe.file_bytes(model), file.stat().st_size
        seen = f"{len(tensors)} tensors, {size(written)} written, {size(predicted)} predicted"
        near = abs(written - predicted) <= TOLERANCE * written + 65536
        found = [
            Finding("the checkpoint reads back as it was written", same, seen, "report this with the configuration")
        ]
        found.append(Finding("bytes of a checkpoint are as predicted", near, seen, "see what on_save_checkpoint adds"))
        for callback in _listed(self.asked.get("callbacks")):
            folder = getattr(callback, "dirpath", None) if isinstance(callback, ModelCheckpoint) else None
            if folder:
                found.append(_writable(Path(folder), written))
        return found


class Probe(L.Callback):
    """Watches three steps: of one row, of two rows, and of the whole batch."""

    def __init__(self) -> None:
        self.activations: list[tuple[int, int]] = []
        self.longest: dict[str, int] = {}
        self._start: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._without: set[str] = set()
        self._optimizer_bytes = 0
        self._saved: dict[int, int] = {}
        self._hooks: AbstractContextManager[Any] | None = None
        self._handles: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what the first step must change, and what no step may."""
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                self._start[name] = p.detach().clone()
            else:
                self._versions[name] = p._version
        for path, backbone, _ in tunings(pl_module):
            for table_ in select.position_tables(backbone).values():
                self._handles.append(table_.register_forward_pre_hook(self._looked_up(canonical(path))))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Cut the batch to one row, to two, or not, and count what the forward pass keeps for the backward pass."""
        rows = _rows(batch)
        if batch_idx < 2 and rows > batch_idx + 1 and isinstance(batch, dict):
            for name, value in batch.items():
                if isinstance(value, (Tensor, list)) and len(value) == rows:
                    batch[name] = value[: batch_idx + 1]
        own = {t.untyped_storage().data_ptr() for t in (*pl_module.parameters(), *pl_module.buffers())}
        self._saved = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Stop counting."""
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Note who got no gradient."""
        self._without = {name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the count of this batch."""
        self.activations.append((_rows(batch), sum(self._saved.values())))
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self._optimizer_bytes = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()

    def findings(self, module: nn.Module) -> list[Finding]:
        """Return what the steps did to the parameters."""
        now = dict(module.named_parameters())
        still = [name for name, p in self._start.items() if torch.equal(p, now[name])]
        written = [name for name, number in self._versions.items() if now[name]._version != number]
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

    def memory(self, module: nn.Module, ranks: int) -> list[Finding]:
        """Return the bytes of weights, gradients, optimizer and activations, these predicted from one and two rows."""
        frozen = sum(p.nbytes for p in module.parameters() if not p.requires_grad)
        trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        buffers = sum(b.nbytes for b in module.buffers())
        fixed = f"weights {size(frozen + trained + buffers)}, gradients {size(trained)}"
        fixed += f", optimizer {size(self._optimizer_bytes)}"
        distinct = dict(self.activations)
        if len(distinct) < 3:
            return [
                Finding("memory of a process", True, f"{fixed}; activations {size(max(distinct.values(), default=0))}")
            ]
        (one, two), (rows, measured) = (distinct[1], distinct[2]), max(distinct.items())
        predicted = one + (rows - 1) * (two - one)
        seen = f"{fixed}, activations of {rows} rows {size(measured)} measured, {size(predicted)} predicted"
        near = abs(predicted - measured) <= TOLERANCE * measured
        remedy = "rows differ in length: sort them, or count on the longest"
        del ranks
        return [Finding("memory of a process is as predicted", near, seen, remedy)]

    def file_bytes(self, module: nn.Module) -> int:
        """Return the predicted bytes of a checkpoint: the delta and its optimizer's state."""
        state = module.state_dict()
        return sum(state[name].nbytes for name in delta_names(module)) + self._optimizer_bytes

    def _looked_up(self, path: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim:
                self.longest[path] = max(self.longest.get(path, 0), args[0].shape[-1])

        return before


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table, with a remedy where one fails."""
    shown = Table("", "check", Column("seen", overflow="fold"), title="Before training", title_justify="left")
    for finding in findings:
        mark = "[green]pass[/]" if finding.passes else "[bold red]FAIL[/]"
        seen = finding.seen if finding.passes else f"{finding.seen}: {finding.remedy}"
        shown.add_row(mark, finding.what, seen.replace("[", r"\["))
    return shown


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _mixed(module: nn.Module) -> bool:
    return len({(p.dtype, p.requires_grad) for p in module.parameters()}) > 1


def _rows(batch: Any) -> int:
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim] if _maps(batch) else []
    return max((len(tensor) for tensor in tensors), default=0)


def _maps(batch: Any) -> bool:
    return isinstance(batch, Mapping)


def _first(names: Any, otherwise: str) -> str:
    names = sorted(names)
    return f"{len(names)}, e.g. {names[0]}" if names else otherwise


def _writable(folder: Path, needed: int) -> Finding:
    import os
    import shutil

    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    passes = os.access(there, os.W_OK) and free > 3 * needed
    return Finding("checkpoints can be written", passes, f"{folder}, {size(free)} free", "give another dirpath")
