"""Two gloo processes compute what one computes, under DDP and FSDP2, write the same delta and resume alike."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_peft import collect
from lightning_peft.core.delta_file import META, read_delta
from tests import ddp
from tests.contract import assert_near, assert_same, frozen_names
from tests.fresh import ROOT
from tests.models import tiny
from tests.processes import TORCHRUN

pytestmark = pytest.mark.slow
CASES = ddp.cases()
LAUNCHER = [sys.executable, *TORCHRUN]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The results of both ranks for the chosen methods, which share one process group until one of them fails."""
    folder = tmp_path_factory.mktemp("ranks")
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("name") for item in items}
    left = [name for name in CASES if name in asked]
    while left:
        ended = subprocess.run([*LAUNCHER, "-m", "tests.ddp", str(folder), *left], **options())
        begun = [name for name in left if (folder / name / "begun").exists()]
        if ended.returncode == 0:
            break
        assert begun, ended.stderr
        (folder / begun[-1] / "failed").write_text(ended.stderr)
        left = [name for name in left if name not in begun]
    return folder


def options() -> dict[str, Any]:
    return {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(ranks: Path, tmp_path: Path, name: str) -> None:
    """The gradients of two halves of a batch, averaged and clipped, are that of the batch; nothing frozen moves."""
    failed = ranks / name / "failed"
    assert not failed.exists(), f"{name}: {failed.read_text()}"
    kind, method = CASES[name]
    one = ddp.descend(tmp_path, kind, method, "auto", ranks=1, seed=0)
    assert one.norms[0] > 2 * ddp.CLIP
    own = statistics(one)
    mine, pristine, frozen = dict(one.model.state_dict()), tiny(kind).state_dict(), frozen_names(one.model)
    for file in sorted(ranks.glob(f"{name}/*.0.pt")):
        if file.stem.startswith("resumed"):
            continue
        first, second = torch.load(file), torch.load(file.with_name(file.name.replace(".0.pt", ".1.pt")))
        assert_same(without(first, own), without(second, own), file.stem)
        if not own:
            assert_near(mine, first, 1e-6)
        assert_same({n: pristine[n] for n in frozen if n in pristine}, {n: first[n] for n in frozen if n in pristine})
    assert any(n not in pristine or not torch.equal(pristine[n], mine[n]) for n in mine.keys() - frozen)
    for strategy in ddp.strategies_of(method) if not own else ():
        file_is_that_of(one, tmp_path / "epoch=1.ckpt", ranks / name / strategy / "epoch=1.ckpt")


def statistics(module: ddp.Tuned) -> set[str]:
    """Return the buffers of trained BatchNorms, which take the statistics of the rows of their own rank."""
    return {
        f"{path}.{name}".removeprefix("model.")
        for path, child in module.named_modules()
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm)
        if child.weight is None or child.weight.requires_grad
        for name, _ in child.named_buffers()
    }


def without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def file_is_that_of(one: ddp.Tuned, single: Path, double: Path) -> None:
    """The file holds the delta and no more, and the random state of both ranks."""
    (mine, my_meta), (theirs, meta) = read_delta(single), read_delta(double)
    assert set(theirs) == set(collect(one))
    assert_near(mine, theirs, 1e-6)
    for entry in ("backbones", "optimizers"):
        assert my_meta[entry] == meta[entry], entry
    for ours, other in zip(my_meta["methods"], meta["methods"], strict=True):
        # Each process has made a tokenizer of its own.
        assert without(ours["init_args"], {"tokenizer"}) == without(other["init_args"], {"tokenizer"})
    assert len(meta["resume"]["random"]) == 2
    assert META not in theirs


@pytest.mark.parametrize("name", CASES)
def test_resumed_runs_are_the_uninterrupted(ranks: Path, name: str) -> None:
    """Bit for bit, with dropout and shuffling: each rank goes on with its own random numbers."""
    both = [torch.load(ranks / name / f"resumed.{rank}.pt") for rank in (0, 1)]
    for straight, resumed in both:
        assert_same(straight, resumed, name)
    assert_same(both[0][0], both[1][0], name)


def test_a_case_that_waits_for_ever_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes print where they are and end, instead of keeping the tests waiting."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "from tests import ddp\n"
        "def both(*_): time.sleep(600)\n"
        "ddp.LIMIT, ddp.both = 1, both\n"
        "ddp.main(pathlib.Path(sys.argv[1]), int(os.environ['RANK']), sys.argv[2:])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ended = subprocess.run([*LAUNCHER, str(script), str(tmp_path), next(iter(CASES))], **options(), timeout=240)
    assert ended.returncode
    assert "Timeout" in ended.stderr
    assert f'"{script}", line 3 in both' in ended.stderr
    assert (tmp_path / next(iter(CASES)) / "begun").exists()


@pytest.mark.parametrize("strategy", ["ddp", "FullyShard"])
def test_a_lost_process_is_started_anew_by_torchrun(tmp_path: Path, strategy: str) -> None:
    """Both go on from the latest save, and end where an undisturbed run does, bit for bit."""
    command = [*LAUNCHER, "--max-restarts=1", "--no-python", str(Path(sys.executable).parent / "lightning-peft"), "fit"]
    command += ["--seed_everything", "3", "--model", "tests.modules.Tuned", "--model.dropout", "0.1"]
    command += ["--data", "tests.slurm.job.Rows", "--method", "LoRA", "--method.backbone_mode", "train"]
    command += ["--trainer.accelerator", "cpu", "--trainer.strategy", strategy, "--trainer.devices", "2"]
    if strategy == "FullyShard":
        command += ["--trainer.strategy.process_group_backend", "gloo"]
    command += ["--trainer.max_epochs", "-1", "--trainer.max_steps", "40", "--trainer.enable_progress_bar", "false"]
    # SafeRequeue would be there by itself, but saves more rarely.
    command += ["--trainer.callbacks+", "lightning_peft.training.requeue.SafeRequeue"]
    command += ["--trainer.callbacks.every_minutes", "0.01", "--trainer.callbacks+", "tests.slurm.job.Reports"]
    deltas = []
    for pause, restarts in (("0", {"0"}), ("0.2", {"0", "1"})):
        folder = tmp_path / pause
        mine = ["--trainer.callbacks.folder", str(folder), "--trainer.callbacks.pause", pause]
        said = tmp_path / f"{pause}.txt"
        with said.open("w") as file:
            # Without it the processes of the second start read the addresses of the first.
            environment = options()["env"] | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            streams: dict[str, Any] = {"stdout": file, "stderr": file, "cwd": ROOT, "env": environment}
            agent = subprocess.Popen([*command, *mine, "--trainer.default_root_dir", str(folder)], **streams)
        try:
            if "1" in restarts:
                kill_rank_1(agent, folder, said)
            assert agent.wait(timeout=240) == 0, said.read_text()
        finally:
            agent.terminate()
        lines = reports(folder)
        assert {restart for restart, *_ in lines} == restarts
        assert {int(step) for _, step, _ in lines} == set(range(1, 41))
        if "1" in restarts:
            assert min(int(step) for restart, step, _ in lines if restart == "1") > 2, "it began again"
        assert not list(folder.glob("requeue*"))
        deltas.append(load_file(folder / "final.safetensors"))
    assert_same(*deltas)


def kill_rank_1(agent: subprocess.Popen[bytes], folder: Path, said: Path) -> None:
    while len(reports(folder)) < 12:
        assert agent.poll() is None, said.read_text()
        time.sleep(0.1)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill({rank_of(child): int(child) for child in children}["1"], signal.SIGKILL)


def reports(folder: Path) -> list[list[str]]:
    file = folder / "losses.0.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def rank_of(process: str) -> str:
    return re.search(rb"\0RANK=(\d+)", b"\0" + Path(f"/proc/{process}/environ").read_bytes())[1].decode()
