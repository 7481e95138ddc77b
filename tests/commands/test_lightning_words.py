"""What Lightning objects to is said with the argument, its value and a remedy, and the remedy works."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.commands import lightning_words, sentence
from tests.modules import trainer


class Line(L.LightningModule):
    """One weight, which logs its loss; its optimizer is what it is given."""

    def __init__(self, optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1)) -> None:
        super().__init__()
        self.layer, self.optimizer = torch.nn.Linear(2, 1), optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Stream(IterableDataset[Tensor]):
    """Rows of which nobody knows the number."""

    def __iter__(self) -> Any:
        return iter(torch.ones(4, 2))


def loader() -> DataLoader[Any]:
    return DataLoader(torch.ones(8, 2), 4)  # type: ignore[arg-type]


def fit(folder: Path, *callbacks: L.Callback, module: Any = Line, data: Any = loader, **options: Any) -> None:
    ckpt_path = options.pop("ckpt_path", None)
    trainer(folder, *callbacks, **options).fit(module(), data(), loader(), ckpt_path=ckpt_path)


def plateau(monitor: str) -> Callable[[], Line]:
    def optimizers(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor}}

    return lambda: Line(optimizers)


def written(folder: Path, weights_only: bool = False) -> Path:
    file = folder / "three.ckpt"
    run = trainer(folder, max_epochs=3)
    run.fit(Line(), loader(), loader())
    run.save_checkpoint(file, weights_only)
    return file


def after(folder: Path, epochs: int) -> None:
    fit(folder, max_epochs=epochs, ckpt_path=written(folder))


def only_sparse(kind: Any) -> Callable[[], Line]:
    return lambda: Line(lambda parameters: kind([*parameters]))


Run = Callable[[Path], object]
OBJECTIONS: dict[str, tuple[Run, Run]] = {
    "EarlyStopping's monitor='acc' is no metric of this run: take one of loss, val_loss.": (
        lambda d: fit(d, EarlyStopping("acc")), lambda d: fit(d, EarlyStopping("val_loss"))
    ),
    "ModelCheckpoint's monitor='acc' is no metric of this run: take one of loss, val_loss, epoch, step.": (
        lambda d: fit(d, ModelCheckpoint(d, monitor="acc")), lambda d: fit(d, ModelCheckpoint(d, monitor="val_loss"))
    ),
    "lr_scheduler's monitor='acc' is no metric of this run: take one of loss, val_loss.": (
        lambda d: fit(d, module=plateau("acc")), lambda d: fit(d, module=plateau("loss"))
    ),
    "trainer.val_check_interval=9 is more than the 2 training batches of an epoch: take 2 at most, or "
    "trainer.check_val_every_n_epoch=null, with which batches are counted across epochs.": (
        lambda d: fit(d, val_check_interval=9),
        lambda d: fit(d, val_check_interval=9, check_val_every_n_epoch=None, max_epochs=6),
    ),
    "trainer.limit_train_batches (or overfit_batches) is 0.1, which of 2 batches is less than one: take a larger "
    "share, or a number of batches such as 1.": (
        lambda d: fit(d, limit_train_batches=0.1), lambda d: fit(d, limit_train_batches=1)
    ),
    "trainer.limit_train_batches is a share of data whose length is not known: give a number of batches, or 1.0 for "
    "all.": (
        lambda d: fit(d, data=lambda: DataLoader(Stream(), 2), limit_train_batches=0.5),
        lambda d: fit(d, data=lambda: DataLoader(Stream(), 2), limit_train_batches=1),
    ),
    "LearningRateMonitor has nothing to write to, since trainer.logger is false: give trainer.logger=true, or leave "
    "LearningRateMonitor out.": (
        lambda d: fit(d, LearningRateMonitor()),
        lambda d: fit(d, LearningRateMonitor(), logger=CSVLogger(d), log_every_n_steps=1),
    ),
    "DeviceStatsMonitor has nothing to write to, since trainer.logger is false: give trainer.logger=true, or leave "
    "DeviceStatsMonitor out.": (lambda d: fit(d, DeviceStatsMonitor()), fit),
    "ModelCheckpoint is among trainer.callbacks, but trainer.enable_checkpointing is false: make that true, or leave "
    "out ModelCheckpoint.": (
        lambda d: fit(d, ModelCheckpoint(d), enable_checkpointing=False), lambda d: fit(d, ModelCheckpoint(d))
    ),
    "RichProgressBar is among trainer.callbacks, but trainer.enable_progress_bar is false: make that true, or leave "
    "out RichProgressBar.": (lambda d: fit(d, RichProgressBar()), fit),
    "the checkpoint was written with save_weights_only=true, and a run cannot go on from weights alone: test, validate "
    "and predict take it, --ckpt_path of fit a checkpoint that was written without.": (
        lambda d: fit(d, max_epochs=4, ckpt_path=written(d, weights_only=True)),
        lambda d: trainer(d).validate(Line(), loader(), ckpt_path=written(d, weights_only=True)),
    ),
    "trainer.callbacks has more than one progress bar: leave all but one out.": (
        lambda d: fit(d, RichProgressBar(), TQDMProgressBar(), enable_progress_bar=True),
        lambda d: fit(d, TQDMProgressBar(), enable_progress_bar=True),
    ),
    "trainer.accumulate_grad_batches is given beside GradientAccumulationScheduler, which sets it: leave out one of "
    "them.": (
        lambda d: fit(d, GradientAccumulationScheduler({0: 2}), accumulate_grad_batches=2),
        lambda d: fit(d, GradientAccumulationScheduler({0: 2})),
    ),
    "--ckpt_path hpc finds no file hpc_ckpt_*.ckpt in trainer.default_root_dir: give the path of a checkpoint.": (
        lambda d: fit(d, ckpt_path="hpc"), lambda d: after(d, 4)
    ),
    "the checkpoint comes after 3 epochs, and trainer.max_epochs=2 is less: take more, or no --ckpt_path.": (
        lambda d: after(d, 2), lambda d: after(d, 4)
    ),
    "'1h' is no time for trainer.max_time or a Timer: give days, hours, minutes and seconds as DD:HH:MM:SS, such as "
    "00:01:30:00.": (lambda d: fit(d, max_time="1h"), lambda d: fit(d, max_time="00:01:30:00")),
    "'lightyears' is no unit of time: take days, hours, minutes or seconds.": (
        lambda d: fit(d, Timer({"lightyears": 1})), lambda d: fit(d, Timer({"hours": 1}))
    ),
    "trainer.val_check_interval='00:00:01' is no time: give days, hours, minutes and seconds as DD:HH:MM:SS, such as "
    "00:00:30:00, a number of batches, or a share of an epoch.": (
        lambda d: fit(d, val_check_interval="00:00:01"), lambda d: fit(d, val_check_interval="00:00:30:00")
    ),
    "trainer.val_check_interval is a share of an epoch, but trainer.check_val_every_n_epoch=null counts batches across "
    "epochs: give a number of batches or a time.": (
        lambda d: fit(d, val_check_interval=0.5, check_val_every_n_epoch=None),
        lambda d: fit(d, val_check_interval=timedelta(seconds=1), check_val_every_n_epoch=None),
    ),
    "trainer.limit_val_batches=1.5 is neither a share nor a number of batches: take 0.0 to 1.0, or an integer.": (
        lambda d: fit(d, limit_val_batches=1.5), lambda d: fit(d, limit_val_batches=1)
    ),
    "trainer.callbacks has ModelCheckpoint twice with the same arguments, so that a checkpoint cannot tell them apart: "
    "leave out one, or give it other arguments.": (
        lambda d: fit(d, ModelCheckpoint(d), ModelCheckpoint(d)),
        lambda d: fit(d, ModelCheckpoint(d), ModelCheckpoint(d, every_n_train_steps=1)),
    ),
    "ModelCheckpoint has every_n_train_steps=1, every_n_epochs=1 and train_time_interval=None: give one of them.": (
        lambda d: ModelCheckpoint(d, every_n_train_steps=1, every_n_epochs=1), lambda d: ModelCheckpoint(d)
    ),
    "SparseAdam is for gradients of sparse embeddings, and those here are dense: take Adam or AdamW.": (
        lambda d: fit(d, module=only_sparse(torch.optim.SparseAdam)),
        lambda d: fit(d, module=only_sparse(torch.optim.AdamW)),
    ),
    "trainer.devices=0 is nothing that accelerator cpu takes: give a number of devices, or auto.": (
        lambda d: trainer(d, devices=0), lambda d: trainer(d, devices="auto")
    ),
}  # fmt: skip
if not torch.cuda.is_available():
    OBJECTIONS["trainer.accelerator asks for CUDA, which this machine has not: take one of cpu, or auto."] = (
        lambda d: trainer(d, accelerator="cuda"),
        lambda d: trainer(d, accelerator="auto"),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", OBJECTIONS)
def test_an_objection_names_value_rule_and_remedy(words: str, tmp_path: Path) -> None:
    wrong, right = OBJECTIONS[words]
    with pytest.raises(Exception) as raised:
        wrong(tmp_path)
    assert lightning_words.said(raised.value) == words
    assert sentence(raised.value) == words
    right(tmp_path / "again")


def test_an_objection_that_has_no_words_here_is_quoted() -> None:
    error = MisconfigurationException("`x` is\n nothing at all.")
    assert (
        sentence(error) == "the run cannot go on as it is set up (`x` is nothing at all): change what is named there."
    )
    assert lightning_words.said(ValueError("others")) is None
    assert sentence(ValueError("others")) == "ValueError: others (--debug shows where)"


def test_a_default_that_no_file_can_hold() -> None:
    """Timer's interval is an enumeration by default, which YAML does not write."""
    error = ValueError("('cannot represent an object', <Interval.step: 'step'>)")
    assert str(lightning_words.said(error)).startswith("Timer's interval has a default that no file of arguments can")
    assert lightning_words.said(ImportError("Install s3fs to access S3")) == (
        "S3 is read by the package s3fs, which is not installed: pip install s3fs, or give a path of this machine."
    )
