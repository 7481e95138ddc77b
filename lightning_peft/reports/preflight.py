"""Checks a fit by four small steps before GPU hours are spent on it."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from rich.console import Console
from torch import nn

from lightning_peft.core import text_structure
from lightning_peft.core.delta import collect
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.run import canonical
from lightning_peft.core.tuning import tunings
from lightning_peft.reports import meta_check
from lightning_peft.reports.findings import Finding, fits, resumes, table, writable
from lightning_peft.reports.memory import file_bytes, of_rank
from lightning_peft.reports.parameters import count, dtypes, size
from lightning_peft.reports.probe import STEPS, TOLERANCE, Probe
from lightning_peft.training import strategy
from lightning_peft.training.method import Method
from lightning_peft.training.shard_units import plan, wrap_policy
from lightning_peft.training.strategy import FullyShard


class Preflight(L.Trainer):
    """A Trainer that checks a fit; `Preflight.of` makes it from the arguments of the Trainer to be checked."""

    datamodule: L.LightningDataModule | None
    asked: dict[str, Any]
    probe: Probe
    folder: "tempfile.TemporaryDirectory[str]"

    @classmethod
    def of(cls, **asked: Any) -> "Preflight":
        """Return a Trainer on one device that takes four steps, logs nothing and keeps nothing.

        Args:
            asked: the arguments of the Trainer that is to be checked.
        """
        strategy = asked.get("strategy")
        recompute = isinstance(strategy, FullyShard) and strategy.activation_checkpointing
        probe, folder = Probe(recompute), tempfile.TemporaryDirectory(prefix="preflight-")
        kept = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        given = {name: asked[name] for name in kept if asked.get(name) is not None}
        gpu = torch.cuda.is_available() and (asked.get("accelerator") or "auto") in ("auto", "gpu", "cuda")
        if given.get("precision") in ("16-mixed", "16", 16) and not gpu:
            given["precision"] = "bf16-mixed"  # a CPU has no scaled half precision
        plugins: Any = [plugin for plugin in _listed(asked.get("plugins")) if isinstance(plugin, Precision)]
        if not gpu:  # Lightning refuses bitsandbytes there
            plugins = [plugin for plugin in plugins if not isinstance(plugin, BitsandbytesPrecision)]
        trainer = cls(
            **given,
            plugins=plugins,
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_train_batches=STEPS * int(given.get("accumulate_grad_batches", 1)),
            limit_val_batches=1,
            max_epochs=STEPS,
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
        meta: bool = False,
    ) -> None:
        """Take four steps, print what passes and what does not, and end with exit code 1 if anything fails.

        Args:
            model: what is to be trained.
            datamodule: its data.
            ckpt_path: accepted so that a configuration of fit can be given as it is; not read.
            meta: read no weights and no data: shapes and bytes alone, for a model that does not fit here.
        """
        del ckpt_path
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.findings_on_meta(model, datamodule) if meta else self.findings(model, datamodule)
        Console().print(table(found))
        if not all(finding.passes for finding in found):
            raise SystemExit(1)

    def findings(self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None) -> list[Finding]:
        """Return the findings of four steps."""
        with self.folder:
            return self._look(model, datamodule)

    def findings_on_meta(
        self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None
    ) -> list[Finding]:
        """Return the findings for a model that was made on the meta device."""
        batch_size, max_length = getattr(datamodule, "batch_size", None), getattr(datamodule, "max_length", None)
        try:
            optimizers = meta_check.build_module(model, self)
            for path, backbone, _ in tunings(model):
                self.probe.watch_positions(path, backbone)
            if self.probe.recompute:
                strategy.checkpoint_activations(model, on=True)
            dry = meta_check.two_steps(model, optimizers, batch_size or 1, max_length)
        except Exception as error:  # whatever it is, it is what the table is for
            return [*self._devices(), Finding("built on the meta device", False, _said(error), "mend this first")]
        finally:
            self.folder.cleanup()
        self.probe.memory = dry.memory
        one = Finding("memory of a process that holds it all", True, f"{size(dry.memory.total)}: {dry.memory}")
        return [
            *self._devices(),
            *self._trained_on_meta(model, dry),
            *self._half_precision(model),
            *self._units(model),
            self._resumes(),
            *self._tied(model),
            *self._positions(model, max_length),
            one,
            *fits(of_rank(model, dry.memory, self.asked.get("strategy") or "auto", self._world()), self._world()),
            Finding("bytes of a checkpoint", True, f"{size(file_bytes(model, optimizers))} predicted"),
            Finding("left out on the meta device", True, self._left_out(dry)),
        ]

    def _trained_on_meta(self, model: L.LightningModule, dry: meta_check.Dry) -> list[Finding]:
        trained = [p for p in model.parameters() if p.requires_grad]
        total = f"{len(trained)} tensors, {count(trained):,} of {count(model.parameters()):,} values"
        found = [Finding("every trained tensor is in one optimizer group", True, total)]
        if not dry.left_out:
            remedy = "leave them out with exclude=, or DDP waits for them"
            seen = f"{len(dry.without)} without, {dry.fed}"
            found.append(Finding("every trained tensor gets a gradient", not dry.without, seen, remedy))
        return found

    def _left_out(self, dry: meta_check.Dry) -> str:
        left_out = "no value: whether trained tensors move, and a checkpoint reads back, is checked without --meta"
        if dry.left_out:
            left_out += f"; no activations and gradients ({dry.left_out})"
        if str(self.asked.get("precision") or "").endswith("-mixed"):
            left_out += "; activations are those without autocast"
        return left_out

    def _look(self, model: L.LightningModule, datamodule: L.LightningDataModule | None) -> list[Finding]:
        try:
            self.fit(model, datamodule)
        except Exception as error:  # whatever it is, it is what the table is for
            failed = Finding("four steps of training", False, _said(error), "mend this, then check again")
            return [*self._devices(), failed, *self._memory(model)]
        finally:
            self.probe.close()
        return [
            *self._devices(),
            *self.probe.findings(model),
            *self._half_precision(model),
            *self._units(model),
            self._resumes(),
            *self._tied(model),
            *self._positions(model),
            *self._memory(model),
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

    def _resumes(self) -> Finding:
        gpu = torch.cuda.is_available() and self.asked.get("accelerator") != "cpu"
        return resumes(gpu, bool(self.asked.get("deterministic")), self._world())

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
            mixed = [n for n, m in model.named_modules() if wrap_policy(m, False, 1) and _mixed(m)]
            return [Finding("FSDP units are uniform", not mixed, f"{name} over {world}", f"put {mixed[:1]} apart")]
        if isinstance(chosen, ModelParallelStrategy):
            rows = plan(model, world)
            kept, most = sum(row[2] for row in rows), max((row[1] for row in rows), default=0)
            kinds = {p.dtype for p in model.parameters() if p.requires_grad}
            seen = f"{len(rows)} units over {world} processes: {size(kept)} a process, {size(most)} gathered at most"
            return [Finding("FSDP2 units are uniform", len(kinds) <= 1, seen, "train in one dtype: keep_fp32=True")]
        if isinstance(chosen, str) and chosen not in ("auto", *StrategyRegistry.available_strategies()):
            remedy = "give a name of Lightning's, or class_path: in a configuration, as in configs/trainers/fsdp2.yaml"
            return [Finding("strategy", False, f"{chosen!r} is the name of none", remedy)]
        return [Finding("strategy", True, f"{name} over {world}: every process holds the whole model")]

    def _tied(self, model: L.LightningModule) -> list[Finding]:
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(canonical(name))
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        tied = [group for key, group in names.items() if len(group) > 1 and key in trained]
        seen = f"{' = '.join(tied[0])} is trained" if tied else "no trained tensor is tied to another"
        return [Finding("tied weights", True, seen)]

    def _positions(self, model: L.LightningModule, limit: int | None = None) -> list[Finding]:
        found = []
        for path, backbone, _ in tunings(model):
            most, longest = text_structure.max_positions(backbone), self.probe.longest.get(canonical(path), 0)
            if most is not None and longest:
                if limit is None:
                    limit = getattr(self.datamodule, "max_length", None)
                needs = max(longest, limit) if isinstance(limit, int) else longest
                seen = f"{needs} of {most} positions, virtual tokens included"
                found.append(Finding("positions fit", needs <= most, seen, f"cut the texts: max_length={most}"))
        return found

    def _memory(self, model: L.LightningModule) -> list[Finding]:
        found, ranks = self.probe.in_step(model), self._world()
        chosen = self.asked.get("strategy") or "auto"
        if not found:
            return []
        rank = of_rank(model, self.probe.memory, chosen, ranks)
        return [*found, *fits(rank, ranks)]

    def _files(self, model: L.LightningModule) -> list[Finding]:
        """Write a checkpoint, read it back, and compare its bytes with the tensors that it should hold."""
        file = Path(self.folder.name) / "preflight.ckpt"
        self.save_checkpoint(file)
        tensors, _ = read_delta(file)
        live = {name: tensor.detach().cpu() for name, tensor in collect(model).items()}
        same = tensors.keys() == live.keys() and all(torch.equal(tensors[name], t) for name, t in live.items())
        predicted, written = file_bytes(model, self.optimizers), file.stat().st_size
        seen = f"{len(tensors)} tensors, {size(written)} written, {size(predicted)} predicted"
        near = abs(written - predicted) <= TOLERANCE * written
        found = [
            Finding("the checkpoint reads back as it was written", same, seen, "report this with the configuration")
        ]
        found.append(Finding("bytes of a checkpoint are as predicted", near, seen, "see what on_save_checkpoint adds"))
        for callback in _listed(self.asked.get("callbacks")):
            folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
            if folder:
                found.append(writable(Path(folder), written))
        return found


def _said(error: Exception) -> str:
    said = str(error) if isinstance(error, TuningError) else f"{type(error).__name__}: {error}"
    return (said.strip().splitlines() or [type(error).__name__])[0]


def _listed(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]


def _mixed(module: nn.Module) -> bool:
    return len({(p.dtype, p.requires_grad) for p in module.parameters()}) > 1
