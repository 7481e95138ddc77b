"""``fit --lr_find true`` changes the learning rates, and nothing else to the bit."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import TuningError
from lightning_peft.cli import main
from lightning_peft.commands import rate_finding
from lightning_peft.core.delta_file import read_checkpoint
from lightning_peft.training import requeue, signals, slurm
from lightning_peft.training.rate_sweep import RateSweep
from tests import text
from tests.contract import assert_same
from tests.training.test_requeue import job

__all__ = ["job"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of LightningCLI, which runs in this process

CONFIG = """
model: {class_path: TextClassification, init_args: {model: model}}
data:
  class_path: TextClassificationData
  init_args: {train: train.csv, max_length: 16, batch_size: 8, validation_share: 0.25}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {dirpath: kept, filename: last, enable_version_counter: false}}
"""
STOPPED = f"""
trainer:
  callbacks:
    - {{class_path: ModelCheckpoint, init_args: {{dirpath: kept, filename: last, enable_version_counter: false}}}}
    - class_path: tests.training.test_requeue.SignalAt
      init_args: {{hook: train, number: 3, sent: {signal.SIGUSR1:d}}}
"""


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.save_model(tmp_path / "model")
    text.write(tmp_path / "train.csv", text.sentences(60))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "stopped.yaml").write_text(STOPPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rate_finding, "RateSweep", partial(RateSweep, steps=24))


def fitted(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """Fit, and return what its checkpoint says of weights, optimizer, schedule, loops and random states."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "fit", "--config", "tiny.yaml", *words])
    main()
    kept = read_checkpoint("kept/last.ckpt")
    (optimizer,) = kept["optimizer_states"]
    whole = {name: kept[name] for name in ("state_dict", "lr_schedulers", "loops", "epoch", "rate_scale")}
    return whole | {"optimizer": optimizer, "random": torch.get_rng_state()}


@pytest.mark.parametrize("method", ["LoRA", "PromptTuning"])
def test_all_but_the_rates_is_as_without(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = ["--method.dropout", "0.1"] if method == "LoRA" else []
    alone = fitted(monkeypatch, "--method", method, *dropout)
    with monkeypatch.context() as fixed:
        fixed.setattr(RateSweep, "best", lambda sweep: 1.0 if len(sweep.losses) > 10 else 0.0)
        assert_same(alone, fitted(fixed, "--method", method, *dropout, "--lr_find", "true"))


def test_the_rates_are_multiplied_by_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    best = RateSweep.best
    monkeypatch.setattr(RateSweep, "best", lambda sweep: found.append(best(sweep)) or found[-1])
    kept = fitted(monkeypatch, "--method", "BitFit", "--lr_find", "true", "--model.lr", "1e-3")
    rates = {group["name"]: group["initial_lr"] for group in kept["optimizer"]["param_groups"]}
    assert found[0] != 1
    assert rates["delta without decay"] == pytest.approx(1e-3 * found[0])
    assert rates["head"] == pytest.approx(1e-2 * found[0])
    Path("kept/last.ckpt").rename("begun.ckpt")
    more = ["--ckpt_path", "begun.ckpt", "--trainer.max_epochs", "2", "--lr_find", "true"]
    again = fitted(monkeypatch, "--method", "BitFit", "--model.lr", "1e-3", *more)["optimizer"]["param_groups"]
    assert {group["name"]: group["initial_lr"] for group in again} == rates
    assert len(found) == 2  # asked twice by the first fit alone


@pytest.mark.parametrize("early", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_requeued_job_keeps_what_was_found(early: bool, job: pytest.MonkeyPatch) -> None:
    """Stopped in the search it searches again; stopped in the fit it does not, and ends as one that nobody stopped."""
    found: list[float] = []
    best, seen = RateSweep.best, RateSweep.on_train_batch_end
    words = ("--method", "LoRA", "--method.dropout", "0.1", "--lr_find", "true")
    job.setattr(RateSweep, "best", lambda sweep: found.append(best(sweep)) or found[-1])
    job.setattr(slurm, "_ask", lambda *command: "")
    whole = fitted(job, *words)
    searches = len(found)

    def stopped(sweep: RateSweep, *given: Any) -> None:
        seen(sweep, *given)
        if len(sweep.losses) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    def started(restart: int, *more: str) -> dict[str, Any]:
        signals.uninstall()
        job.setitem(requeue._fits, "begun", 0)
        job.setenv("SLURM_RESTART_COUNT", str(restart))
        return fitted(job, *words, *more)

    if early:
        job.setattr(RateSweep, "on_train_batch_end", stopped)
        with pytest.raises(SystemExit, match=f"^{requeue.EXIT}$"):
            started(0)
        job.setattr(RateSweep, "on_train_batch_end", seen)
        assert len(found) == searches
        assert not list(Path.cwd().glob("**/requeue-*"))
    with pytest.raises(SystemExit, match=f"^{requeue.EXIT}$"):
        started(int(early), "--config", "stopped.yaml")
    assert len(found) == 2 * searches
    assert_same(whole, started(2))
    assert len(found) == 2 * searches


def test_what_it_cannot_scale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fitted(monkeypatch, "--method", "BitFit", "--lr_find", "true", "--optimizer", "SGD", "--optimizer.lr", "1")
    assert "leave it out beside a model of yours or --optimizer." in " ".join(capsys.readouterr().err.split())


def test_a_third_of_the_lowest_point() -> None:
    sweep = RateSweep(steps=5, lowest=0.01, highest=100.0)
    assert [round(sweep.factor(step), 6) for step in range(5)] == [0.01, 0.1, 1.0, 10.0, 100.0]
    sweep.losses = [2.0, 1.0, 0.5, 0.1, 9.0]
    assert sweep.best() == pytest.approx(10 / 3)
    for losses in ([], [1.0, 2.0, 3.0]):
        sweep.losses = losses
        with pytest.raises(
            TuningError, match=r"no loss fall .* leave it out, or give other rates, --model\.lr 1e-3\.$"
        ):
            sweep.best()
