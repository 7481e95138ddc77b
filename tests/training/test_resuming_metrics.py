"""Metric objects and clocks across a resume: what goes on does so exactly, and what cannot is said in one sentence."""

import re
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft import LoRA
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:Be aware that when using `ckpt_path`"
)


class Measured(Tuned):
    """Sums its losses in a metric object."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.means, self.validated = how, [], []
        self.scores: nn.Module = MetricCollection({"mean": MeanMetric()}) if how == "collection" else MeanMetric()
        self.val_mean = MeanMetric()

    @property
    def mean(self) -> Any:
        return self.scores["mean"] if self.how == "collection" else self.scores  # type: ignore[index]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.how != "validation alone":
            self.mean.update(loss.detach())
        if self.how == "logged":
            self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_mean.update(self.model(**batch).loss)

    def on_validation_epoch_start(self) -> None:
        self.val_mean.reset()

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", self.val_mean.compute())
        self.validated.append(self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        if self.how in ("by hand", "collection"):
            self.means.append(float(self.mean.compute()))
            self.mean.reset()


def fit(module: Measured, folder: Path, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> list[str]:
    """Train two epochs of three batches, validated after the second; return what was said of a resume."""
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(folder, LoRA(r=2), *callbacks, **{"max_epochs": 2, "val_check_interval": 2} | options)
        run.fit(module, loader("bert"), loader("bert"), ckpt_path=ckpt_path)
    return [str(w.message) for w in caught if "does not resume exactly" in str(w.message)]


@pytest.mark.parametrize("how", ["logged", "by hand", "collection", "validation alone"])
def test_sums_of_metric_objects(how: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    whole = Measured(how)
    assert fit(whole, tmp_path, saving) == []
    inside, again = Measured(how), Measured(how)
    said = fit(inside, tmp_path, ckpt_path=tmp_path / "step=5.ckpt")
    if how == "validation alone":
        assert said == []
    else:
        name = {"logged": "mean", "by hand": "scores", "collection": r"scores\.mean"}[how]
        assert re.search(rf"what {name} has summed in the epoch is in no file: log its value", said[0])
    end = ModelCheckpoint(tmp_path / "end", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Measured(how), tmp_path, end)
    assert fit(again, tmp_path, ckpt_path=tmp_path / "end" / "epoch=0.ckpt") == []
    assert again.means == whole.means[1:]
    for one in (inside, again):  # what is trained is the same, whatever was summed
        for (name, tensor), other in zip(whole.named_parameters(), one.parameters(), strict=True):
            assert torch.equal(tensor, other), name


def test_a_value_that_is_logged_as_the_sentence_says_goes_on(tmp_path: Path) -> None:
    class Valued(Tuned):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("mean", loss.detach(), on_step=False, on_epoch=True, batch_size=4)
            return loss

    torch.manual_seed(3)
    whole = trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2))
    whole.fit(Valued(), loader("bert"))
    resumed = trainer(tmp_path, LoRA(r=2))
    resumed.fit(Valued(), loader("bert"), ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(whole.callback_metrics["mean"], resumed.callback_metrics["mean"])


def test_validation_by_the_clock_goes_on_counting_and_says_that_it_is_no_other_run(tmp_path: Path) -> None:
    hours = {"val_check_interval": timedelta(hours=1), "num_sanity_val_steps": 0}
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    first = Measured("validation alone")
    with pytest.MonkeyPatch.context() as patch:
        began = time.monotonic()
        patch.setattr(time, "monotonic", lambda: began + 3599 * (first.global_step > 0))
        assert fit(first, tmp_path, saving, max_steps=2, **hours) == []
    assert first.validated == []
    second = Measured("validation alone")
    (said,) = fit(second, tmp_path, ckpt_path=tmp_path / "step=2.ckpt", **hours)
    assert "validation comes by the clock, so at other batches than there: give batches as val_check_interval." in said
    assert second.validated == []
    third = Measured("validation alone")
    with pytest.MonkeyPatch.context() as patch:  # two seconds more, and the hour is over
        begun = time.monotonic()
        patch.setattr(time, "monotonic", lambda: begun + 2 * (third.global_step > 3))
        fit(third, tmp_path, ckpt_path=tmp_path / "step=2.ckpt", **hours)
    assert third.validated == [4]


def test_a_validation_by_the_clock_validates(tmp_path: Path) -> None:
    module = Measured("by hand")
    fit(module, tmp_path, val_check_interval=timedelta(microseconds=1), num_sanity_val_steps=0)
    assert module.validated == [1, 2, 3, 4, 5, 6]


def test_max_time_counts_what_was_used_before(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    first = Measured("validation alone")
    with pytest.MonkeyPatch.context() as patch:
        began = time.monotonic()
        patch.setattr(time, "monotonic", lambda: began + 3590 * (first.global_step > 0))
        fit(first, tmp_path, saving, max_steps=2, max_time="00:01:00:00")
    held = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
    assert held["Timer"]["time_elapsed"]["train"] == pytest.approx(3590, abs=5)
    second, timer = Measured("validation alone"), Timer("00:01:00:00")
    with pytest.MonkeyPatch.context() as patch:
        begun = time.monotonic()
        patch.setattr(time, "monotonic", lambda: begun + 15 * (second.global_step > 3))
        assert fit(second, tmp_path, timer, ckpt_path=tmp_path / "step=2.ckpt", max_epochs=9) == []
    assert second.global_step == 4
    assert timer.time_elapsed() > 3600
