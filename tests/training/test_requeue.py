"""Pre-emption: a run that is stopped by a signal anywhere and started again is the uninterrupted run, bit for bit."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from lightning_peft import LoRA, TuningError, collect
from lightning_peft.data.batches import Batches, BatchesLoader
from lightning_peft.training import requeue, signals, slurm
from lightning_peft.training.loaders import ResumableLoader
from lightning_peft.training.requeue import SafeRequeue
from tests.contract import assert_same, moments
from tests.fresh import ROOT
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:The dirpath has changed from",
    "ignore:Your `val_dataloader`'s sampler has shuffling",
)
JOB = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
JOB |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
JOB |= {"SLURM_NODELIST": "localhost"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Be a process that srun started, in a cluster that requeues."""
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "requeue", lambda: "")
    monkeypatch.setitem(requeue._fits, "begun", 0)
    yield monkeypatch
    signals.uninstall()
    signals._state["pid"] = 0


class Scheduled(Tuned):
    """Logs its losses, draws a random number in each step, and has a scheduler."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("bert", dropout=0.2, **kwargs)
        self.losses: list[tuple[int, float]] = []
        self.scores: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) + 0.01 * torch.rand(())
        self.losses.append((self.trainer.global_step, float(loss.detach())))
        return loss

    def on_validation_epoch_end(self) -> None:
        self.scores.append(float(self.trainer.callback_metrics.get("val_loss", 0.0)))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)]
        return [optimizer], [{"scheduler": s, "interval": "step"} for s in schedulers]


class SignalAt(L.Callback):
    """Sends a signal to its own process at one moment: in the n-th training step, or the n-th validation step."""

    def __init__(self, hook: str, number: int, sent: int = signal.SIGUSR1) -> None:
        self.hook, self.left, self.sent = hook, number, sent

    def _count(self, hook: str) -> None:
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.sent)

    def on_train_batch_start(self, *args: Any) -> None:
        self._count("train")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._count("validation")


def run(folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[Scheduled, L.Trainer]:
    """Fit three epochs of three batches with dropout and shuffling."""
    torch.manual_seed(3)
    module = Scheduled()
    data = options.pop("data", loader("bert", rows=12, shuffle=True))
    saving = ModelCheckpoint(folder / "best", monitor=None, every_n_epochs=1)
    validation = loader("bert", rows=8) if options.pop("validated", True) else None
    method = LoRA(r=2, dropout=0.2, backbone_mode="train")
    fit = trainer(folder, method, saving, *callbacks, **{"max_epochs": 3, "num_sanity_val_steps": 0} | options)
    with contextlib.suppress(SystemExit):
        fit.fit(module, data, validation)
    return module, fit


def interrupted(job: pytest.MonkeyPatch, folder: Path, where: L.Callback, **options: Any) -> None:
    """Compare a run that is stopped once and resumes with one that is not."""
    whole, straight = run(folder / "whole", **options)
    assert len(whole.losses) >= 9
    job.setitem(requeue._fits, "begun", 0)
    first, _ = run(folder / "parts", where, **options)
    own = folder / "parts" / "requeue-7.0-1.ckpt"
    assert own.is_file()
    assert 0 < len(first.losses) <= len(whole.losses)
    signals.uninstall()
    job.setenv("SLURM_RESTART_COUNT", "1")
    job.setitem(requeue._fits, "begun", 0)
    torch.manual_seed(99)
    second, resumed = run(folder / "parts", **options)
    assert not own.exists()
    assert first.losses + second.losses == whole.losses
    assert first.scores + second.scores == whole.scores
    assert_same({n: t.detach() for n, t in collect(whole).items()}, {n: t.detach() for n, t in collect(second).items()})
    assert_same(moments(straight), moments(resumed))
    assert straight.global_step == resumed.global_step
    assert straight.fit_loop.epoch_loop._batches_that_stepped == resumed.fit_loop.epoch_loop._batches_that_stepped


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("batch", range(1, 8))
def test_stopped_in_training(job: pytest.MonkeyPatch, tmp_path: Path, batch: int, validated: bool) -> None:
    interrupted(job, tmp_path, SignalAt("train", batch), validated=validated)


@pytest.mark.parametrize("batch", range(1, 6))
def test_stopped_in_validation(job: pytest.MonkeyPatch, tmp_path: Path, batch: int) -> None:
    interrupted(job, tmp_path, SignalAt("validation", batch))


@pytest.mark.parametrize("where", [("train", 2), ("train", 4), ("validation", 3), ("validation", 8)])
def test_stopped_where_validation_comes_inside_the_epoch(
    job: pytest.MonkeyPatch, tmp_path: Path, where: tuple[str, int]
) -> None:
    interrupted(job, tmp_path, SignalAt(*where), val_check_interval=1)


def test_gradients_that_are_being_accumulated_are_finished(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for batch in (1, 2, 4):
        job.delenv("SLURM_RESTART_COUNT", raising=False)
        interrupted(job, tmp_path / str(batch), SignalAt("train", batch), accumulate_grad_batches=2)


def test_term_is_a_signal_like_the_other(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupted(job, tmp_path, SignalAt("train", 2, signal.SIGTERM))


class ByEpoch(Sampler):
    """Another order in each epoch, known from its number alone, as distributed samplers have it."""

    epoch = 0

    def __len__(self) -> int:
        return 12

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch", [2, 5, 7])
def test_samplers_that_know_the_epoch(job: pytest.MonkeyPatch, tmp_path: Path, batch: int, workers: int) -> None:
    data = DataLoader(loader("bert", rows=12).dataset, 4, sampler=ByEpoch(), num_workers=workers)
    interrupted(job, tmp_path, SignalAt("train", batch), data=data, validated=False)


class Grouped(Dataset):
    """Rows that are asked for by the batch."""

    def __init__(self) -> None:
        self.rows = loader("bert", rows=12).dataset

    def __getitem__(self, key: list[int]) -> Any:
        return default_collate([self.rows[row] for row in key])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_our_loaders_go_on_with_the_batch_that_is_next(
    job: pytest.MonkeyPatch, tmp_path: Path, batch: int, workers: int
) -> None:
    """One that has been read when the run is stopped, but not begun, is not lost."""

    def data() -> DataLoader:
        rows = Batches([1] * 12, 4, shuffle=True, bucket=False)
        options = {"num_workers": workers, "generator": torch.Generator()}
        return BatchesLoader(Grouped(), sampler=rows, batch_size=None, **options)

    interrupted(job, tmp_path, SignalAt("train", batch), data=data(), validated=False)


def test_stopped_twice_in_one_validation(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", val_check_interval=1)
    losses = []
    for restart in range(3):
        job.setitem(requeue._fits, "begun", 0)
        job.setenv("SLURM_RESTART_COUNT", str(restart))
        torch.manual_seed(99 if restart else 3)
        where = [SignalAt("validation", (3, 1, 0)[restart])]
        losses += run(tmp_path / "parts", *where, val_check_interval=1)[0].losses
        signals.uninstall()
    assert losses == whole.losses


class Drawn(IterableDataset):
    """Rows that are drawn while they are read, so they depend on the random state."""

    def __iter__(self) -> Iterator[Any]:
        rows = loader("bert", rows=12).dataset
        for _ in range(12):
            yield rows[int(torch.randint(12, ()))]


def test_data_without_length_that_is_drawn_while_it_is_read(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupted(job, tmp_path, SignalAt("train", 4), data=DataLoader(Drawn(), 4), validated=False)


def test_worker_processes_survive_the_signals_of_their_step(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class SignalToAll(SignalAt):
        def _count(self, hook: str) -> None:
            super()._count(hook)
            if hook == self.hook and self.left == 0:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                mine = Path("/proc/self/cmdline").read_text()
                workers = [int(c) for c in children if Path(f"/proc/{c}/cmdline").read_text() == mine]
                assert workers
                for worker in workers:
                    os.kill(worker, signal.SIGTERM)
                    os.kill(worker, signal.SIGUSR1)

    data = DataLoader(loader("bert", rows=12).dataset, 4, shuffle=True, num_workers=1)
    interrupted(job, tmp_path, SignalToAll("train", 2), data=data, validated=False)


class Counting(Scheduled):
    """Asks for the number of steps before Lightning has read how far the data were."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 6
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", [Scheduled, Counting])
def test_a_checkpoint_inside_an_epoch_resumes_with_the_next_batch(kind: type[Scheduled], tmp_path: Path) -> None:
    """Outside of SLURM, too."""

    def fit(folder: str, **options: Any) -> Scheduled:
        torch.manual_seed(3)
        module = kind()
        saving = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(tmp_path, LoRA(r=2, dropout=0.1), saving, max_epochs=2)
        fit.fit(module, loader("bert", shuffle=True), loader("bert"), **options)
        return module

    whole = fit("whole")
    for step in (1, 2, 4, 5):
        torch.manual_seed(50)
        resumed = fit(f"resumed{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.losses == whole.losses[step:]
        assert_same(collect(whole), collect(resumed))


def test_a_save_now_and_then_for_crashes(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                raise ZeroDivisionError

    whole, _ = run(tmp_path / "whole")
    job.setitem(requeue._fits, "begun", 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "parts", SafeRequeue(every_minutes=0), Crash())
    job.setenv("SLURM_RESTART_COUNT", "1")
    job.setitem(requeue._fits, "begun", 0)
    resumed, _ = run(tmp_path / "parts")
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    assert len(resumed.losses) in (5, 6)
    assert_same(dict(collect(whole)), dict(collect(resumed)))


def test_only_the_own_file_is_picked_up(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(tmp_path, SignalAt("train", 2))
    own = tmp_path / "requeue-7.0-1.ckpt"
    assert own.is_file()
    signals.uninstall()
    job.setenv("SLURM_RESTART_COUNT", "1")
    for name, value in {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_STEP_ID": "1"}.items():
        with pytest.MonkeyPatch.context() as other:
            other.setenv(name, value)
            other.setenv("SLURM_ARRAY_TASK_ID", "1")
            other.setitem(requeue._fits, "begun", 0)
            assert len(run(tmp_path)[0].losses) == 9
    with pytest.MonkeyPatch.context() as second:  # another fit of the same process
        second.setitem(requeue._fits, "begun", 1)
        assert len(run(tmp_path)[0].losses) == 9
    module = Scheduled()
    before = {n: p.clone() for n, p in module.named_parameters()}
    for stage in ("validate", "test"):
        getattr(trainer(tmp_path, LoRA(r=2)), stage)(module, loader("bert"), verbose=False)
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters() if n in before)
    assert own.is_file()
    job.delenv("SLURM_RESTART_COUNT")
    job.setitem(requeue._fits, "begun", 0)
    with pytest.raises(TuningError, match="this job has not been restarted"):
        run(tmp_path)


def test_lightnings_own_file_is_refused(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"")
    with pytest.raises(TuningError, match="left by Lightning's own requeueing"):
        run(tmp_path)


def test_signals_before_fit_and_after_it(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class After(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    assert len(run(tmp_path, After())[0].losses) == 9
    os.kill(os.getpid(), signal.SIGUSR1)
    job.setitem(requeue._fits, "begun", 0)
    assert len(run(tmp_path)[0].losses) == 1


def test_the_sanity_check_of_validation_is_left_at_once(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, _ = run(tmp_path, SignalAt("validation", 1), num_sanity_val_steps=2)
    assert not module.losses
    assert not list(tmp_path.glob("requeue*"))


def test_outside_of_slurm_nothing_is_installed(tmp_path: Path) -> None:
    fit = trainer(tmp_path, LoRA(r=2))
    before = signal.getsignal(signal.SIGUSR1)
    fit.fit(Tuned(), loader("bert"))
    assert not any(isinstance(callback, SafeRequeue) for callback in fit.callbacks)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_torchrun_that_restarts_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.warns(UserWarning, match="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        requeue.add_requeue(trainer(tmp_path))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for restarts, has in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        fit = trainer(tmp_path, LoRA(r=2))
        try:
            fit.fit(Tuned(), loader("bert"))
        finally:
            signals.uninstall()
        assert any(isinstance(callback, SafeRequeue) for callback in fit.callbacks) is has


def test_lightning_has_the_parts_that_are_replaced(tmp_path: Path) -> None:
    fit = trainer(tmp_path)
    assert callable(fit._signal_connector.register_signal_handlers)
    assert callable(fit._checkpoint_connector.resume_start)
    assert callable(fit.fit_loop._load_combined_loader_states)
    loops = fit.fit_loop.state_dict()
    for name in ("epoch_loop.val_loop.batch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict"):
        assert name in loops
    assert "_batches_that_stepped" in loops["epoch_loop.state_dict"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": None}, "srun did not start it"),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": None}, "--ntasks=2 but no --ntasks-per-node"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"}, "named 'bash'"),
        ({"SLURM_NNODES": "2", "SLURM_JOB_NAME": "interactive"}, "named 'interactive'"),
    ],
)
def test_a_job_started_wrongly(environment: dict[str, str | None], words: str) -> None:
    whole = {n: v for n, v in (JOB | environment).items() if v is not None}
    with pytest.raises(TuningError, match=words):
        slurm.check_environment(whole)
    slurm.check_environment(JOB)
    slurm.check_environment({})


def test_sizes_that_differ() -> None:
    slurm.check_sizes(1, 1, JOB)
    with pytest.raises(TuningError, match=r"num_nodes=2 but the job --nodes=1.*give trainer.num_nodes=1"):
        slurm.check_sizes(2, 1, JOB)
    with pytest.raises(TuningError, match=r"devices=8 but the job --ntasks-per-node=1"):
        slurm.check_sizes(1, 8, JOB)


def test_a_signal_that_only_the_shell_gets() -> None:
    with pytest.raises(TuningError, match="--signal=B:USR1@60 goes to the batch shell alone"):
        slurm._check_signal("#!/bin/bash\n#SBATCH --signal=B:USR1@60\nsrun x\n")
    slurm._check_signal("#!/bin/bash\n#SBATCH --signal=B:USR1@60\ntrap 'true' USR1\nsrun x\n")
    slurm._check_signal("#!/bin/bash\n#SBATCH --signal=SIGUSR1@60\nsrun x\n")


def test_a_cancelled_job_is_not_brought_back(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job.undo()
    job.setenv("SLURM_JOB_ID", "7")
    for name, prints in (("squeue", "CANCELLED"), ("scontrol", "")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\necho {prints} | tee -a {tmp_path}/{name}.called\n")
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    job.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.requeue() == "it is CANCELLED"
    assert not (tmp_path / "scontrol.called").exists()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    assert slurm.requeue() == ""
    assert (tmp_path / "scontrol.called").exists()


def test_the_handler_needs_the_standard_library_alone() -> None:
    code = "import sys, lightning_peft.training.signals, lightning_peft.training.slurm; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "lightning", "numpy", "jsonargparse"} & set(loaded.split())


def test_a_loader_is_still_the_loader_that_it_is_made_of() -> None:
    inner = loader("bert")
    outer = ResumableLoader(inner)
    assert outer.dataset is inner.dataset
    assert len(outer) == len(inner)
    assert outer.batch_size == 4
    with pytest.raises(AttributeError):
        outer.nothing  # noqa: B018


def test_lightning_seeds_the_workers_of_the_loader_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    data = loader("bert")
    trainer(tmp_path, LoRA(r=2)).fit(Tuned(), data)
    assert data.worker_init_fn is not None


@pytest.mark.slow
def test_a_signal_between_two_ranks_that_are_apart(tmp_path: Path) -> None:
    """Each of two ranks gets the signal at another time, one may not get it at all; none hangs."""
    for delays in ((0.0, 0.3), (0.0, None)):
        folder = tmp_path / str(delays[1])
        common = os.environ | JOB | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "SLURM_NTASKS": "2"}
        common |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "SLURM_NTASKS_PER_NODE": "2"}
        common["PATH"] = f"{ROOT}/tests/slurm/fake:{os.environ['PATH']}"
        command = [Path(sys.executable).parent / "lightning-peft", "fit", "--model", "tests.modules.Tuned"]
        command += ["--data", "tests.slurm.job.Rows", "--method", "LoRA", "--trainer.accelerator", "cpu"]
        command += ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.max_epochs", "900"]
        command += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder]
        command += ["--trainer.callbacks+", "tests.slurm.job.Reports", "--trainer.callbacks.folder", folder]
        ranks = []
        for rank in ("0", "1"):
            environment = common | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            with (tmp_path / f"{rank}.txt").open("a") as said:
                ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=environment))
        until = time.monotonic() + 120
        while not (folder / "losses.0.txt").exists():
            assert time.monotonic() < until
            assert ranks[0].poll() is None, (tmp_path / "0.txt").read_text()
            time.sleep(0.05)
        for process, delay in zip(ranks, delays, strict=True):
            if delay is not None:
                time.sleep(delay)
                process.send_signal(signal.SIGUSR1)
        ended = [process.wait(timeout=60) for process in ranks]
        assert ended == [requeue.EXIT] * 2, (tmp_path / "0.txt").read_text()
        assert (folder / "requeue-7.0-1.ckpt").is_file()
