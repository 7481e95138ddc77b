"""Settings of a Trainer, in each of which `FullFineTuning` must change nothing of what Lightning does alone."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning as L
import numpy
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_peft import Method

AVERAGING = (StochasticWeightAveraging, WeightAveraging)


class Net(BoringModel):
    """Draws its data anew for each loader, drops out and normalises, so that whatever is drawn or run in vain shows."""

    def __init__(self, lr: float = 0.1, batch_size: int = 2, optimizer: str = "sgd") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size, self.optimizer = lr, batch_size, optimizer
        self.drop, self.norm = torch.nn.Dropout(0.2), torch.nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.layer(x)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(self(batch))
        self.log("train", loss)
        return {"loss": loss}

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(self(batch)))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=3)
        if self.optimizer == "groups":
            norm = {"params": [self.layer.bias, *self.norm.parameters()], "weight_decay": 0.0}
            adam = torch.optim.AdamW([{"params": [self.layer.weight], "lr": 0.01}, norm], lr=self.lr)
            return {"optimizer": adam, "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(adam, [0.1, 0.2], 50)}
        sgd = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if self.optimizer == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, patience=0)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "monitor": "val"}}
        if self.optimizer == "steps":
            steps = int(self.trainer.estimated_stepping_batches)
            return [sgd], [torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)]
        return [sgd], [torch.optim.lr_scheduler.StepLR(sgd, 1)]

    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 16), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 16), batch_size=self.batch_size)


class ByHand(Net):
    """Optimizes by hand, every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        optimizer, loss = self.optimizers(), self.loss(self(batch))
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class TwoOptimizers(ByHand):
    """Two optimizers share the weights and take turns."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(self(batch)))
        optimizer.step()


class WithBackbone(Net):
    """Has what ``BackboneFinetuning`` asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.backbone(x)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class InEval(Net):
    """The user has put a part into eval mode, and another one when the fit has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.eval()

    def on_train_start(self) -> None:
        self.drop.eval()


class Draws(Dataset[Tensor]):
    """Draws from every random generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(32) + random.random() + numpy.random.rand()


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(10, 32)


class Counted(RandomSampler):
    """Notes which epochs it is told."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def reading(train: Callable[[], Any], val: Callable[[], Any] | None = None) -> type[Net]:
    """Return a module with these loaders."""

    class Reads(Net):
        def train_dataloader(self) -> Any:
            return train()

        def val_dataloader(self) -> Any:
            return super().val_dataloader() if val is None else val()

    return Reads


def workers(data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True)


def sampled() -> DataLoader[Any]:
    data = RandomDataset(32, 16)
    return DataLoader(data, batch_size=4, sampler=Counted(data))


class Setting(NamedTuple):
    """A module, arguments of the Trainer, and callbacks, given a folder."""

    module: Callable[[], L.LightningModule] = Net
    arguments: Mapping[str, Any] = MappingProxyType({})
    callbacks: Callable[[Path], Sequence[Callback]] = lambda folder: []


def with_callbacks(*names: Callable[[Path], Callback], module: Any = Net, **arguments: Any) -> Setting:
    return Setting(module, arguments, lambda folder: [make(folder) for make in names])


def pruning(**kwargs: Any) -> Callable[[Path], Callback]:
    return lambda _: ModelPruning(parameter_names=["weight"], amount=0.3, **kwargs)


SETTINGS: dict[str, Setting] = {
    "plain": Setting(),
    "groups": Setting(lambda: Net(optimizer="groups")),
    "lbfgs": Setting(lambda: Net(optimizer="lbfgs")),
    "plateau": Setting(lambda: Net(optimizer="plateau")),
    "asks for steps": Setting(lambda: Net(optimizer="steps")),
    "by hand": Setting(ByHand),
    "two optimizers": Setting(TwoOptimizers),
    "parts in eval": Setting(InEval),
    "fast_dev_run": Setting(Net, {"fast_dev_run": 2}),
    "barebones": Setting(Net, {"barebones": True, "max_epochs": 2}),
    "overfit": Setting(Net, {"overfit_batches": 3}),
    "overfit a part": Setting(Net, {"overfit_batches": 0.5}),
    "limits": Setting(Net, {"limit_train_batches": 0.6, "limit_val_batches": 1, "num_sanity_val_steps": 0}),
    "no validation": Setting(Net, {"limit_val_batches": 0}),
    "reloaded": Setting(Net, {"reload_dataloaders_every_n_epochs": 1}),
    "validated within": Setting(Net, {"val_check_interval": 3}),
    "validated at half": Setting(Net, {"val_check_interval": 0.5, "accumulate_grad_batches": 3}),
    "validated rarely": Setting(Net, {"check_val_every_n_epoch": 2}),
    "max_steps": Setting(Net, {"max_epochs": -1, "max_steps": 11}),
    "clipped": Setting(Net, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
    "clipped by value": Setting(Net, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "no inference mode": Setting(Net, {"inference_mode": False}),
    "anomalies": Setting(Net, {"detect_anomaly": True}),
    "simple profiler": Setting(Net, {"profiler": "simple"}),
    "advanced profiler": Setting(Net, {"profiler": "advanced", "max_epochs": 1}),
    "bf16-mixed": Setting(Net, {"precision": "bf16-mixed"}),
    "bf16-true": Setting(Net, {"precision": "bf16-true"}),
    "64-true": Setting(Net, {"precision": "64-true"}),
    "draws in the data": Setting(reading(lambda: DataLoader(Draws(), 4), lambda: DataLoader(Draws(), 4))),
    "no length": Setting(reading(lambda: DataLoader(Stream(), 2))),
    "two loaders": Setting(reading(sampled, lambda: [DataLoader(Draws(), 4), DataLoader(RandomDataset(32, 8), 4)][:1])),
    "workers": Setting(reading(lambda: workers(Draws()), lambda: workers(Draws())), {"max_epochs": 2}),
    "sampler": Setting(reading(sampled)),
    "accumulation schedule": with_callbacks(lambda _: GradientAccumulationScheduler({0: 1, 1: 3})),
    "SWA": with_callbacks(lambda _: StochasticWeightAveraging(0.05, swa_epoch_start=2), max_epochs=5),
    "EMA": with_callbacks(lambda _: EMAWeightAveraging(decay=0.9)),
    "averages": with_callbacks(lambda _: WeightAveraging()),
    "batch size": with_callbacks(lambda _: BatchSizeFinder(steps_per_trial=1, max_trials=2)),
    "batch size by bisection": with_callbacks(
        lambda _: BatchSizeFinder(mode="binsearch", steps_per_trial=1, max_trials=2, margin=0.0)
    ),
    "learning rate": with_callbacks(lambda _: LearningRateFinder(num_training_steps=10)),
    "early stopping": with_callbacks(lambda _: EarlyStopping("val", patience=0), max_epochs=8),
    "timer": with_callbacks(lambda _: Timer(duration="00:00:10:00")),
    "on exceptions": with_callbacks(lambda folder: OnExceptionCheckpoint(folder)),
    "pruned": with_callbacks(pruning(pruning_fn="l1_unstructured")),
    "pruned for a while": with_callbacks(
        pruning(pruning_fn="random_unstructured", use_lottery_ticket_hypothesis=False, make_pruning_permanent=False)
    ),
    "backbone later": with_callbacks(lambda _: BackboneFinetuning(unfreeze_backbone_at_epoch=1), module=WithBackbone),
    "monitors": with_callbacks(lambda _: LearningRateMonitor(), lambda _: DeviceStatsMonitor(), logger=True),
    "summary": with_callbacks(lambda _: ModelSummary(2), enable_model_summary=True),
    "many checkpoints": with_callbacks(
        lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, save_last=True)
    ),
    "best checkpoints": with_callbacks(
        lambda folder: ModelCheckpoint(folder / "best", monitor="val", save_top_k=2),
        lambda folder: ModelCheckpoint(folder / "late", save_on_train_epoch_end=True, save_weights_only=True),
    ),
    "lambda": with_callbacks(lambda _: LambdaCallback(on_train_start=lambda trainer, module: None)),
}


def run(setting: Setting, folder: Path, method: Method | None) -> dict[str, Any]:
    """Fit, and return all that can be seen of it afterwards."""
    folder.mkdir(parents=True)
    L.seed_everything(7, verbose=False)
    module, callbacks = setting.module(), list(setting.callbacks(folder))
    added = [method] if method is not None else []
    early = any(isinstance(callback, AVERAGING) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments: dict[str, Any] = quiet | {"max_epochs": 3, "accelerator": "cpu"} | dict(setting.arguments)
    if arguments.get("barebones"):
        arguments = {name: value for name, value in arguments.items() if name not in quiet}
    elif arguments["logger"]:
        arguments["logger"] = CSVLogger(folder)
    callbacks = [*added, *callbacks] if early else [*callbacks, *added]
    trainer = L.Trainer(callbacks=callbacks, default_root_dir=folder, **arguments)
    trainer.fit(module)
    loader = trainer.train_dataloader
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "steps": (trainer.global_step, trainer.current_epoch),
        "random": {"torch": torch.rand(2), "numpy": numpy.random.rand(), "python": random.random()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "flags": {name: p.requires_grad for name, p in module.named_parameters()},
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "groups": [len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")),
        "loader": isinstance(loader, DataLoader),
        "epochs": loader.sampler.epochs if isinstance(loader.sampler, Counted) else [],
    }
