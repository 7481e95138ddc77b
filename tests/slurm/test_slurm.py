"""Jobs of two nodes in a real SLURM: pre-empted, killed, cancelled and started wrongly.

`cluster.py` starts munged, slurmctld and two slurmd on this machine, each node with a network and processes of its own.
Every job is written and submitted by ``lightning-peft submit``.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests import text
from tests.contract import assert_same
from tests.fresh import ROOT

pytestmark = pytest.mark.slurm
CLUSTER = ROOT / "tests/slurm/cluster.py"
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """Two pretended nodes, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def control(self, *words: str) -> str:
        """Run a command of `cluster.py`."""
        done = subprocess.run([CLUSTER, words[0], str(self.folder), *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *command: str) -> str:
        """Run a command among the nodes."""
        return self.control("exec", "--", *command)

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Wait until a job is in one of the states; by default, until it has ended."""
        until = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in (states or DONE):
            assert time.monotonic() < until, f"{job}\n{output(job)}"
            time.sleep(0.3)
        return job


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    started = Cluster(folder)
    try:
        started.control("start", "--nodes", "2", "--cpus", "2")
        yield started
    finally:
        started.control("stop", "--wipe")


def config(folder: Path, strategy: str, pause: float) -> Path:
    """Write the configuration of a fit of 40 steps."""
    strategies = {
        "ddp": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": "0:00:20"}},
        "fsdp2": {
            "class_path": "lightning_peft.training.strategy.FullyShard",
            "init_args": {"timeout": "0:00:20", "process_group_backend": "gloo"},
        },
    }
    settings = {
        "seed_everything": 3,
        "model": {"class_path": "tests.modules.Tuned", "init_args": {"dropout": 0.1}},
        "data": {"class_path": "tests.slurm.job.Rows"},
        "method": {"class_path": "LoRA", "init_args": {"r": 2, "dropout": 0.1, "backbone_mode": "train"}},
        "trainer": {
            "accelerator": "cpu",
            "strategy": strategies[strategy],
            "max_epochs": -1,
            "max_steps": 40,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "tests.slurm.job.Reports", "init_args": {"folder": str(folder), "pause": pause}},
                {"class_path": "lightning_peft.training.requeue.SafeRequeue", "init_args": {"every_minutes": 0.02}},
            ],
        },
    }
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def submit(cluster: Cluster, folder: Path, strategy: str = "ddp", pause: float = 0.0, *more: str) -> str:
    """Submit a fit on two nodes and return the number of its job."""
    words = ["--config", str(config(folder, strategy, pause)), "--nodes", "2", "--gpus", "0", "--tasks", "1"]
    words += ["--cpus", "1", "--time", "00:09:00", "--name", "tiny", "--folder", str(folder)]
    words += ["--export", f"PATH={Path(sys.executable).parent}:$PATH", "--export", "OMP_NUM_THREADS=1", *more]
    done = cluster.run(str(Path(sys.executable).parent / "lightning-peft"), "submit", *words)
    return re.search(r"Submitted batch job (\d+)", done)[1]


def losses(folder: Path, rank: int = 0) -> list[list[str]]:
    """Return what rank 0 has reported: number of the restart, step and loss."""
    file = folder / f"losses.{rank}.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def until_it_trains(cluster: Cluster, job: str, folder: Path, steps: int = 6) -> None:
    until = time.monotonic() + 120
    while len(losses(folder)) < steps:
        state = cluster.job(job)
        assert time.monotonic() < until, output(state)
        assert state["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), output(state)
        time.sleep(0.1)


def output(job: dict[str, str]) -> str:
    """Return what a job has printed."""
    path = Path(job.get("StdOut", "/nowhere"))
    return path.read_text() if path.exists() else "(no output)"


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of one job for each strategy that nobody disturbs."""
    folders = {name: tmp_path_factory.mktemp("whole") / name for name in ("ddp", "fsdp2")}
    jobs = {name: submit(cluster, folder, name) for name, folder in folders.items()}
    for number in jobs.values():
        job = cluster.wait(number)
        assert job["JobState"] == "COMPLETED", output(job)
        assert job["Restarts"] == "0"
    return folders


def is_the_same(whole: Path, parts: Path) -> None:
    """Compare the final deltas bit for bit, and the losses of the steps that count."""
    assert_same(load_file(whole / "final.safetensors"), load_file(parts / "final.safetensors"))
    curves = [{step: loss for _, step, loss in losses(folder)} for folder in (whole, parts)]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 40
    assert not list(parts.glob("**/requeue-*"))
    assert len(list(parts.glob("tiny-*/**/config.yaml"))) >= 1


@pytest.mark.parametrize(("strategy", "signal"), [("ddp", "USR1"), ("fsdp2", "TERM")])
def test_preempted(
    cluster: Cluster, uninterrupted: dict[str, Path], tmp_path: Path, strategy: str, signal: str
) -> None:
    folder = tmp_path / strategy
    number = submit(cluster, folder, strategy, 0.2)
    until_it_trains(cluster, number, folder)
    cluster.run("scancel", f"--signal={signal}", number)
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", output(job)
    assert job["Restarts"] == "1"
    is_the_same(uninterrupted[strategy], folder)
    said = output(job)
    assert f"job {number} requeued" in said
    assert len(losses(folder)) == 40, "a step was done twice"


def test_signalled_while_it_imports(cluster: Cluster, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "early"
    number = submit(cluster, folder, "ddp", 0.05)
    cluster.wait(number, "RUNNING")
    until = time.monotonic() + 60
    while len(ranks_of(number)) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    cluster.run("scancel", "--signal=USR1", number)
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", output(job)
    assert job["Restarts"] == "1"
    is_the_same(uninterrupted["ddp"], folder)


def ranks_of(number: str) -> dict[int, int]:
    """Return rank -> pid of the python processes of a job."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        variables = dict(entry.split(b"=", 1) for entry in environment.split(b"\0") if b"=" in entry)
        ours = variables.get(b"SLURM_JOB_ID") == number.encode() and b"lightning-peft\0fit" in command
        if ours and b"SLURM_STEP_ID" in variables and b"python" in command.split(b"\0")[0]:
            found[int(variables[b"SLURM_PROCID"])] = int(process.name)
    return found


@pytest.mark.slow
def test_rates_that_were_searched_are_kept(cluster: Cluster, tmp_path: Path) -> None:
    """A job that looks for its learning rates looks once, and goes on with what it found."""
    text.save_model(tmp_path / "model")
    text.write(tmp_path / "train.csv", text.sentences(320))
    rows = {"train": str(tmp_path / "train.csv"), "max_length": 16, "batch_size": 4, "validation_share": 0.1}
    given = {
        "model": {"class_path": "TextClassification", "init_args": {"model": str(tmp_path / "model")}},
        "data": {"class_path": "TextClassificationData", "init_args": rows},
    }
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump(given))
    more = ("--config", str(tmp_path / "rows.yaml"), "--lr_find", "true", "--trainer.limit_val_batches", "0")
    for name, pause in (("whole", 0.0), ("parts", 0.2)):
        number = submit(cluster, tmp_path / name, "ddp", pause, *more)
        if name == "parts":
            until_it_trains(cluster, number, tmp_path / name)
            cluster.run("scancel", "--signal=USR1", number)
        job = cluster.wait(number)
        assert job["JobState"] == "COMPLETED", output(job)
        assert job["Restarts"] == str(int(name == "parts")), output(job)
        assert output(job).count("--lr_find: the learning rates are") == 1, output(job)
    is_the_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(cluster: Cluster, uninterrupted: dict[str, Path], tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "killed"
    number = submit(cluster, folder, "ddp", 0.3)
    until_it_trains(cluster, number, folder, steps=12)
    began = time.monotonic()
    os.kill(ranks_of(number)[rank], 9)
    while cluster.job(number)["Restarts"] == "0":
        assert time.monotonic() - began < 40, output(cluster.job(number))
        time.sleep(0.2)
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", output(job)
    is_the_same(uninterrupted["ddp"], folder)
    again = [step for restart, step, _ in losses(folder) if restart == "1"]
    assert int(again[0]) > 2, "it started from the beginning"


@pytest.mark.slow
def test_a_node_is_lost(cluster: Cluster, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    number = submit(cluster, folder, "fsdp2", 0.3)
    until_it_trains(cluster, number, folder, steps=12)
    cluster.control("crash", "node2")
    cluster.control("revive", "node2")
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", output(job)
    assert int(job["Restarts"]) >= 1
    is_the_same(uninterrupted["fsdp2"], folder)


def test_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "cancelled"
    number = submit(cluster, folder, "ddp", 0.2)
    until_it_trains(cluster, number, folder)
    began = time.monotonic()
    cluster.run("scancel", number)
    job = cluster.wait(number)
    assert job["JobState"] == "CANCELLED"
    time.sleep(3)
    assert cluster.job(number)["JobState"] == "CANCELLED", "it was brought back"
    assert time.monotonic() - began < 30
    assert not (folder / "final.safetensors").exists()
    assert "not requeued: it is" in output(job), output(job)


@pytest.mark.slow
def test_tasks_of_an_array_do_not_meet(cluster: Cluster, tmp_path: Path) -> None:
    """Both write into one folder of reports by turns; the first is pre-empted, the second is not disturbed."""
    folder = tmp_path / "array"
    number = submit(cluster, folder, "ddp", 0.1, "--sbatch=--array=0-1")
    until_it_trains(cluster, number, folder)
    cluster.run("scancel", "--signal=USR1", f"{number}_0")
    first, second = (cluster.wait(f"{number}_{task}") for task in (0, 1))
    assert (first["JobState"], second["JobState"]) == ("COMPLETED", "COMPLETED"), output(first) + output(second)
    assert (first["Restarts"], second["Restarts"]) == ("1", "0")
    assert {path.name for path in folder.glob("tiny-*/") if path.is_dir()} == {f"tiny-{number}_0", f"tiny-{number}_1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("srun --kill-on-bad-exit=1 --wait=60 ", ""), "put srun before"),
        (("--ntasks-per-node=1", "--ntasks=2"), "no --ntasks-per-node"),
        (("--job-name=tiny", "--job-name=bash"), "the job is named 'bash'"),
        (("--trainer.devices 1", "--trainer.devices 2"), "--ntasks-per-node=1"),
        (("--trainer.num_nodes 2", "--trainer.num_nodes 1"), "--nodes=2"),
        (("--signal=USR1", "--signal=B:USR1"), "goes to the batch shell alone"),
    ],
)
def test_started_wrongly(cluster: Cluster, tmp_path: Path, change: tuple[str, str], words: str) -> None:
    """It says so at once instead of waiting for processes that never come."""
    folder = tmp_path / "wrong"
    submitted = submit(cluster, folder)
    cluster.run("scancel", submitted)
    script = folder / "tiny.sbatch"
    text = script.read_text()
    assert change[0] in text
    script.write_text(text.replace(*change))
    began = time.monotonic()
    number = re.search(r"(\d+)", cluster.run("sbatch", str(script)))[1]
    job = cluster.wait(number, seconds=90)
    assert job["JobState"] == "FAILED", output(job)
    assert words in re.sub(r"\s+", " ", output(job)), output(job)
    assert time.monotonic() - began < 60
