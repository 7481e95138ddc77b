"""Two gloo processes compute what one computes, under DDP and FSDP2, write the same delta and resume alike."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import collect
from lightning_peft.delta import META, read_delta
from tests import ddp
from tests.contract import ROOT, assert_near, assert_same, frozen_names
from tests.models import tiny

pytestmark = pytest.mark.slow
CASES = ddp.cases()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The results of both ranks for the chosen methods; launching takes longer than the fits of a method."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}
    left = [name for name in CASES if name in asked]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.ddp"]
    while left:
        run = [*launcher, str(folder), *left]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ended = subprocess.run(run, cwd=ROOT, timeout=3000, env=environment, capture_output=True, text=True)
        begun = [name for name in left if (folder / name / "begun").exists()]
        if ended.returncode == 0:
            break
        assert begun, ended.stderr
        (folder / begun[-1] / "failed").write_text(ended.stderr)
        left = [name for name in left if name not in begun]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one(ranks: Path, tmp_path: Path, name: str) -> None:
    """The gradients of two halves of a batch, averaged, are that of the batch; what is frozen has not moved."""
    failed = ranks / name / "failed"
    assert not failed.exists(), failed.read_text()
    kind, method = CASES[name]
    one = ddp.descend(tmp_path, kind, method, "auto", ranks=1, seed=0)
    mine, pristine, frozen = dict(one.model.state_dict()), tiny(kind).state_dict(), frozen_names(one.model)
    for file in sorted(ranks.glob(f"{name}/*.0.pt")):
        if file.stem.startswith("resumed"):
            continue
        first, second = torch.load(file), torch.load(file.with_name(file.name.replace(".0.pt", ".1.pt")))
        assert_same(first, second, file.stem)
        assert_near(mine, first, 1e-6)
        assert_same({n: pristine[n] for n in frozen if n in pristine}, {n: first[n] for n in frozen if n in pristine})
    assert any(n not in pristine or not torch.equal(pristine[n], mine[n]) for n in mine.keys() - frozen)
    for strategy in ddp.strategies_of(method):
        file_is_that_of(one, tmp_path / "epoch=1.ckpt", ranks / name / strategy / "epoch=1.ckpt")


def file_is_that_of(one: ddp.Tuned, single: Path, double: Path) -> None:
    """The file holds the delta and no more, and the random state of both ranks."""
    (mine, my_meta), (theirs, meta) = read_delta(single), read_delta(double)
    assert set(theirs) == set(collect(one))
    assert_near(mine, theirs, 1e-6)
    for entry in ("methods", "backbones", "optimizers"):
        assert my_meta[entry] == meta[entry], entry
    assert len(meta["resume"]["random"]) == 2
    assert META not in theirs


@pytest.mark.parametrize("name", CASES)
def test_resumed_runs_are_the_uninterrupted(ranks: Path, name: str) -> None:
    """Bit for bit, with dropout and shuffling: each rank goes on with its own random numbers."""
    both = [torch.load(ranks / name / f"resumed.{rank}.pt") for rank in (0, 1)]
    for straight, resumed in both:
        assert_same(straight, resumed, name)
    assert_same(both[0][0], both[1][0], name)
