"""`lightning-peft check`, the folders of checkpoints, a full disk, the moving average and the throughput."""

import contextlib
import errno
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_peft import BitFit, DeltaEMA, FullFineTuning, LoRA, Method, Throughput, TuningError, collect
from lightning_peft.cli import main
from lightning_peft.reports.findings import table
from lightning_peft.reports.preflight import Finding, Preflight
from lightning_peft.training.checkpoint_io import AtomicCheckpointIO
from tests.contract import assert_near, assert_same
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",
    "ignore:The number of training batches",
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
)


class Rows(L.LightningDataModule):
    """Batches of eight rows."""

    def train_dataloader(self) -> Any:
        return loader("bert", rows=40, size=8)

    def val_dataloader(self) -> Any:
        return loader("bert", rows=8)


def found(module: L.LightningModule, method: Method, **asked: Any) -> dict[str, Finding]:
    run = Preflight.of(accelerator="cpu", callbacks=[method], **asked)
    return {finding.what: finding for finding in run.findings(module, Rows())}


@pytest.mark.parametrize("method", [LoRA(r=2, target_modules="all-linear"), BitFit(), FullFineTuning()])
def test_all_is_well(method: Method) -> None:
    """Predictions of memory and file are within 15 % of what is measured, or the check would fail."""
    findings = found(Tuned("bert"), method)
    assert all(finding.passes for finding in findings.values()), findings
    assert len(findings) >= 11
    assert "predicted" in findings["memory of a process is as predicted"].seen
    assert "Before training" in str(table(list(findings.values())).title)


def test_what_does_not_move() -> None:
    class Stuck(Tuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    finding = found(Stuck("bert"), LoRA(r=2))["every trained tensor moves"]
    assert not finding.passes
    assert "learning rate" in finding.remedy


def test_what_gets_no_gradient() -> None:
    finding = found(Tuned("bert"), LoRA(r=2, also_train=r".*pooler.*", exclude=None))
    assert finding["every trained tensor gets a gradient"].passes

    class Unused(Tuned):
        def __init__(self) -> None:
            super().__init__("bert")
            self.extra = torch.nn.Linear(2, 2)

    finding = found(Unused(), LoRA(r=2))["four steps of training"]
    assert not finding.passes
    assert "got no gradient" in finding.seen


def test_what_is_written_to() -> None:
    class Writes(Tuned):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.model.bert.embeddings.word_embeddings.weight.add_(1e-9)
            return super().training_step(batch, batch_idx)

    finding = found(Writes("bert"), LoRA(r=2))["no frozen tensor is written to"]
    assert not finding.passes
    assert "word_embeddings" in finding.seen


def test_units_and_devices() -> None:
    from lightning_peft import FullyShard

    findings = found(Tuned("bert"), LoRA(r=2), strategy=FullyShard(), devices=4)
    assert "over 4 processes" in findings["FSDP2 units are uniform"].seen
    assert "every process holds the whole model" in found(Tuned("bert"), LoRA(r=2), devices=2)["strategy"].seen


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(("more", "code"), [([], 0), (["--model.lr", "0"], 1)])
def test_the_command_and_its_exit_code(
    more: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "tests.modules.Tuned", "--data", "tests.slurm.job.Rows", "--method", "LoRA"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "check", *words, "--trainer.accelerator", "cpu", *more])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended:
        main()
    printed = capsys.readouterr().out
    assert ("FAIL" in printed) is bool(code), printed
    assert "pass" in printed
    assert not code or ended.value.code == code


# Folders and disks.


def fit(folder: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    run = trainer(folder, LoRA(r=2), *callbacks, **options)
    run.fit(Tuned("bert"), loader("bert"), loader("bert"))
    return run


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match=r"checkpoints cannot be written to .*file/best"):
        fit(tmp_path, ModelCheckpoint(tmp_path / "file" / "best"))


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "f.write('process 1 on node9'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "best").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "best" / ".in-use"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(
            TuningError, match=r"process 1 on node9 writes checkpoints to .*best: give this run its own"
        ):
            fit(tmp_path, ModelCheckpoint(tmp_path / "best"))
    finally:
        other.kill()
        other.communicate()
    fit(tmp_path, ModelCheckpoint(tmp_path / "best"))  # its claim has ended with it
    assert not (tmp_path / "best" / ".in-use").exists()


def full_disk(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let the disk be full after some saves, in the middle of a file."""
    left = [saves]

    def save(checkpoint: Any, path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(checkpoint, path)

    real = torch.save
    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_ends_training_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    full_disk(monkeypatch, 1)
    with pytest.raises(TuningError, match=r"last.ckpt could not be written \(ENOSPC.*what was there before is whole"):
        fit(tmp_path, saving)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_that_training_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1)
    full_disk(monkeypatch, 1)
    with pytest.warns(UserWarning, match="could not be written"):
        run = fit(tmp_path, saving, plugins=[AtomicCheckpointIO(on_error="warn")])
    assert run.global_step == 3
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=1.ckpt"]


# The moving average.


def test_the_average_is_the_recursion(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.on_train_batch_end(trainer, module)

        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            seen.append({name: tensor.clone() for name, tensor in collect(module).items()})

    module, average = Tuned("bert"), DeltaEMA(decay=0.7)
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer(tmp_path, LoRA(r=2), average, Watch(), max_epochs=2).fit(module, loader("bert"), loader("bert"))
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.7 * tensor + 0.3 * now[name] for name, tensor in expected.items()}
    assert_near(expected, dict(collect(module)), 1e-6)
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert_same({name: before[name] for name in frozen}, {name: p.clone() for name, p in frozen.items()})


def test_checkpoints_hold_the_average_and_resume(tmp_path: Path) -> None:
    def run(folder: str, resume: Path | None = None, seed: int = 1) -> tuple[Tuned, L.Trainer]:
        torch.manual_seed(seed)
        module = Tuned("bert", dropout=0.1)
        saving = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, LoRA(r=2, dropout=0.1), DeltaEMA(decay=0.5), saving, max_epochs=3)
        fit.fit(module, loader("bert", shuffle=True), loader("bert"), ckpt_path=resume)
        return module, fit

    whole, straight = run("whole")
    resumed, _ = run("resumed", tmp_path / "whole" / "epoch=0.ckpt", seed=5)
    assert_same(dict(collect(whole)), dict(collect(resumed)))
    file = torch.load(tmp_path / "whole" / "epoch=2.ckpt", weights_only=True)
    assert_near({n: t.detach() for n, t in collect(whole).items()}, file["state_dict"], 0.0)
    assert set(file["state_dict"]) == set(file["current_model_state"]) == set(collect(whole))
    scored = trainer(tmp_path, LoRA(r=2, dropout=0.1))
    scored.validate(
        Tuned("bert", dropout=0.1), loader("bert"), ckpt_path=tmp_path / "whole" / "epoch=2.ckpt", verbose=False
    )
    assert float(scored.callback_metrics["val_loss"]) == float(straight.callback_metrics["val_loss"])


def test_what_the_average_refuses(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"decay=1.0 is no share"):
        DeltaEMA(decay=1.0)
    with pytest.raises(TuningError, match="save_weights_only=True"):
        fit(tmp_path, DeltaEMA(), ModelCheckpoint(tmp_path, save_weights_only=True))


# The throughput.


def test_rows_tokens_and_operations_a_second(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []

    class Log(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append(metrics)

    module = Tuned("bert")
    run = trainer(
        tmp_path, LoRA(r=2), Throughput(window_size=3), logger=Log(tmp_path), log_every_n_steps=1, max_epochs=3
    )
    run.fit(module, loader("bert"))
    last = logged[-1]
    assert last["train/device/items_per_sec"] > last["train/device/samples_per_sec"] > 0
    ratio = last["train/device/items_per_sec"] / last["train/device/samples_per_sec"]
    assert math.isclose(ratio, 10, rel_tol=1e-6)
    frozen, trained = (sum(p.numel() for p in module.parameters() if p.requires_grad is yes) for yes in (False, True))
    flops = last["train/device/flops_per_sec"] / last["train/device/items_per_sec"]
    assert math.isclose(flops, 4 * frozen + 6 * trained, rel_tol=1e-6)
    assert not hasattr(module, "flops_per_batch")
