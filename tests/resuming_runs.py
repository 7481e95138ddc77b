"""What `tests.resuming` draws from: methods, optimizers, schedulers, precisions, loaders, validations and callbacks."""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from lightning_peft import IA3, Adapter, BitFit, DeltaEMA, DiffPruning, FullFineTuning, LoRA, PromptTuning
from lightning_peft.data.batches import Batches, BatchesLoader
from tests.models import batch, tiny

BATCHES, SIZE = 4, 2
METHODS: dict[str, Any] = {
    "LoRA": lambda: [LoRA(r=2, dropout=0.2, backbone_mode="train")],
    "DoRA": lambda: [LoRA(r=2, use_dora=True)],
    "BitFit": lambda: [BitFit()],
    "Adapter": lambda: [Adapter(bottleneck=4)],
    "IA3": lambda: [IA3()],
    "PromptTuning": lambda: [PromptTuning(num_virtual_tokens=2, init="random_uniform")],
    "DiffPruning": lambda: [DiffPruning()],
    "LoRA+BitFit": lambda: [LoRA(r=2), BitFit()],
    "DoRA+DiffPruning": lambda: [LoRA(r=2, use_dora=True), DiffPruning()],
    "FullFineTuning": lambda: [FullFineTuning()],
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "StepLR by step": lambda o: {"scheduler": lr_scheduler.StepLR(o, 2, 0.7), "interval": "step"},
    "cosine by epoch": lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 5), "interval": "epoch"},
    "OneCycle": lambda o: {
        "scheduler": _one_cycle(o),
        "interval": "step",
    },
    "plateau by epoch": lambda o: _plateau(o, "val_loss", "epoch"),
    "plateau by step": lambda o: _plateau(o, "val_loss", "step"),
    "plateau of training": lambda o: _plateau(o, "train_loss", "epoch"),
}
LOADERS = (
    "shuffled",
    "own generator",
    "random rows",
    "workers 1",
    "workers 2, random rows",
    "persistent workers",
    "two, the longer cycles the shorter",
    "two, the shorter ends",
    "without length",
    "without length, random rows",
    "Batches",
    "stateful",
    "order drawn late",
)
VALIDATIONS: dict[str, dict[str, Any]] = {
    "every epoch": {},
    "none": {"limit_val_batches": 0},
    "twice an epoch": {"val_check_interval": 2},
    "after each batch": {"val_check_interval": 1},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "every 3 batches": {"check_val_every_n_epoch": None, "val_check_interval": 3},
}
CALLBACKS: dict[str, Any] = {
    "none": list,
    "EarlyStopping": lambda: [EarlyStopping("train_loss", patience=1, check_on_train_epoch_end=True)],
    "DeltaEMA": lambda: [DeltaEMA(0.5)],
}


@dataclass(frozen=True)
class Drawn:
    """One configuration, by the names of its parts."""

    method: str = "LoRA"
    optimizer: str = "AdamW"
    scheduler: str = "none"
    precision: str = "32-true"
    loader: str = "shuffled"
    accumulate: int = 1
    validation: str = "every epoch"
    sanity: int = 0
    limit: str = "epochs"
    callbacks: str = "none"
    manual: bool = False


def draw(number: int) -> Drawn:
    """Return the configuration of this number; thirteen in a row have each loader once."""
    rng = random.Random(number)
    methods = [name for name in METHODS if name != "DoRA+DiffPruning"]
    drawn = Drawn(
        rng.choice(methods), rng.choice(list(OPTIMIZERS)), rng.choice(list(SCHEDULERS)),
        rng.choice(("32-true", "32-true", "bf16-mixed", "bf16-true")), LOADERS[number % len(LOADERS)],
        rng.choice((1, 1, 2, 3)), rng.choice(list(VALIDATIONS)), rng.choice((0, 2)),
        rng.choice(("epochs", "epochs", "steps")), rng.choice(list(CALLBACKS)), rng.random() < 0.15,
    )  # fmt: skip
    changes: dict[str, Any] = {}
    if drawn.loader.startswith("two") and drawn.method == "PromptTuning":
        changes["method"] = "LoRA"
    if drawn.manual:
        changes |= {"scheduler": "none", "accumulate": 1}
    if drawn.validation != "after each batch" and drawn.scheduler == "plateau by step":
        changes["scheduler"] = "StepLR by step"
    if drawn.validation != "every epoch" and drawn.scheduler == "plateau by epoch":
        changes["scheduler"] = "plateau of training"
    if drawn.loader.startswith("without length") and "val_check_interval" in VALIDATIONS[drawn.validation]:
        changes["validation"] = "every epoch"
        changes["scheduler"] = "none" if drawn.scheduler == "plateau by step" else drawn.scheduler
    return Drawn(**{**vars(drawn), **changes})


def _one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=40, cycle_momentum=False)


def _plateau(optimizer: Any, monitor: str, interval: str) -> dict[str, Any]:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.05)
    return {"scheduler": scheduler, "monitor": monitor, "interval": interval}


class Module(L.LightningModule):
    """Trains a tiny BERT by random numbers, too, and remembers its losses."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn, self.losses, self.reach = drawn, [], lambda place: None
        self.automatic_optimization = not drawn.manual
        self.model = tiny("bert", dropout=0.1).train()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.reach("training_step")
        rows = batch if isinstance(batch, (list, tuple)) else [batch]
        loss = sum(self.model(**part).loss for part in rows) + 0.01 * torch.rand(()) * float(numpy.random.rand())
        self.losses.append(float(loss.detach()))
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=SIZE)
        if not self.drawn.manual:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.reach("validation_step")
        self.log("val_loss", self.model(**batch).loss + 0.01 * torch.rand(()), batch_size=SIZE)

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.drawn.optimizer](self.parameters())
        make = SCHEDULERS[self.drawn.scheduler]
        return optimizer if make is None else {"optimizer": optimizer, "lr_scheduler": make(optimizer)}


class Rows(Dataset):
    """Rows that are changed at random when they are read, or not."""

    def __init__(self, count: int, changed: bool = False, reach: Any = lambda place: None) -> None:
        columns = batch("bert", size=count, seed=1)
        self.rows = [{name: c[i] for name, c in columns.items()} for i in range(count)]
        self.changed, self.reach = changed, reach

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.reach("data")
        row = dict(self.rows[i])
        if self.changed:
            row["input_ids"] = row["input_ids"].clone()
            row["input_ids"][1] = 5 + int(torch.randint(20, ())) + int(numpy.random.randint(20)) + random.randrange(20)
        return row


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[i] for i in range(len(self.rows)))


class Late(Sampler):
    """An order that is drawn while it is read, without replacement, which cannot be read again."""

    def __len__(self) -> int:
        return BATCHES * SIZE

    def __iter__(self) -> Iterator[int]:
        left = list(range(BATCHES * SIZE))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class Stateful(DataLoader):
    """A loader that keeps its own position, and shuffles by the number of its passes."""

    done = passes = 0

    def __iter__(self) -> Any:
        return self._rows(iter(range(self.done, BATCHES)))

    def _rows(self, left: Iterator[int]) -> Iterator[Any]:
        order = torch.randperm(BATCHES, generator=torch.Generator().manual_seed(self.passes)).tolist()
        for done in left:
            self.done = (done + 1) % BATCHES
            self.passes += self.done == 0
            yield self.collate_fn([self.dataset[SIZE * order[done] + k] for k in range(SIZE)])

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done, self.passes = state["done"], state["passes"]


class Grouped(Rows):
    """Rows that are asked for by the batch."""

    def __getitem__(self, key: Any) -> Any:
        return torch.utils.data.default_collate([super(Grouped, self).__getitem__(i) for i in key])


def module_of(drawn: Drawn) -> Module:
    """Return a module to train."""
    return Module(drawn)


def loaders_of(drawn: Drawn, module: Module) -> tuple[Any, Any]:
    """Return the loaders of training and of validation."""
    kind, count = drawn.loader, BATCHES * SIZE
    in_main = lambda place: module.reach(place)  # noqa: E731
    rows = Rows(count, "random rows" in kind, in_main if "workers" not in kind else _nothing)
    validation = DataLoader(Rows(2 * SIZE), SIZE, shuffle=True)
    if kind.startswith("two"):
        pair = [DataLoader(rows, SIZE, shuffle=True), DataLoader(Rows(3 * SIZE), SIZE, shuffle=True)]
        mode = "max_size_cycle" if "cycles" in kind else "min_size"
        return L.pytorch.utilities.CombinedLoader(pair, mode), validation
    if kind == "persistent workers":
        validation = DataLoader(Rows(2 * SIZE), SIZE, num_workers=1, persistent_workers=True)
    made = {
        "own generator": lambda: DataLoader(rows, SIZE, shuffle=True, generator=torch.Generator().manual_seed(5)),
        "workers 1": lambda: DataLoader(rows, SIZE, shuffle=True, num_workers=1),
        "workers 2, random rows": lambda: DataLoader(rows, SIZE, shuffle=True, num_workers=2),
        "persistent workers": lambda: DataLoader(rows, SIZE, shuffle=True, num_workers=1, persistent_workers=True),
        "without length": lambda: DataLoader(Stream(rows), SIZE),
        "without length, random rows": lambda: DataLoader(Stream(rows), SIZE),
        "Batches": lambda: BatchesLoader(
            Grouped(count, reach=in_main), sampler=Batches([1] * count, SIZE, True, False), batch_size=None,
            generator=torch.Generator(),
        ),
        "stateful": lambda: Stateful(rows, SIZE),
        "order drawn late": lambda: DataLoader(rows, SIZE, sampler=Late()),
    }  # fmt: skip
    return made.get(kind, lambda: DataLoader(rows, SIZE, sampler=RandomSampler(rows)))(), validation


def _nothing(place: str) -> None:
    """Stands in for what ends a run, in processes that cannot."""


def trainer_of(drawn: Drawn, folder: Path, *callbacks: L.Callback) -> L.Trainer:
    """Return a Trainer that says nothing."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    steps = -(-3 * BATCHES // drawn.accumulate) - 1
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    limit = {"max_epochs": 3} if drawn.limit == "epochs" else {"max_epochs": -1, "max_steps": max(steps, 2)}
    return L.Trainer(
        **limit, **VALIDATIONS[drawn.validation], accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saves,
        num_sanity_val_steps=drawn.sanity, accumulate_grad_batches=drawn.accumulate, precision=drawn.precision,
        callbacks=[*METHODS[drawn.method](), *CALLBACKS[drawn.callbacks](), *callbacks],
    )  # fmt: skip


def counters(trainer: L.Trainer) -> dict[str, Any]:
    """Return what a Trainer has counted and measured."""
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
    averages = next((c.average for c in trainer.callbacks if isinstance(c, DeltaEMA)), {})
    return {
        "global_step": trainer.global_step,
        "current_epoch": trainer.current_epoch,
        "batches that stepped": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "batches": trainer.fit_loop.epoch_loop.batch_progress.total.completed,
        "learning rates": [group["lr"] for o in trainer.optimizers for group in o.param_groups],
        "schedulers": [getattr(s, "last_epoch", None) for s in schedulers],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "average": sum(float(t.double().sum()) for t in averages.values()) if averages else 0.0,
    }
