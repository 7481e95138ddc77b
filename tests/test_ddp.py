"""Two processes on the CPU (gloo) under DDP compute what one computes, write the same delta and resume alike."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from lightning_peft import collect
from lightning_peft.delta import META
from tests import ddp
from tests.contract import ROOT, assert_near, assert_same, frozen_names
from tests.models import tiny
from tests.modules import Tuned


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """One test for all methods, since a launch takes longer than all of their fits."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [*launcher, "-m", "tests.ddp", str(tmp_path)]
    subprocess.run(run, cwd=ROOT, check=True, timeout=400, env=environment)
    for name, (kind, method) in ddp.cases().items():
        one = ddp.descend(tmp_path / f"{name}.one", kind, method, ranks=1, seed=0)
        ranks_have_the_weights_of(one, kind, *(torch.load(tmp_path / f"{name}.state.{rank}.pt") for rank in (0, 1)))
        file_is_that_of(one, tmp_path / f"{name}.one" / "epoch=1.ckpt", tmp_path / name / "epoch=1.ckpt")
        resumed_runs_are_the_uninterrupted(tmp_path, name)


def ranks_have_the_weights_of(one: Tuned, kind: str, rank0: dict, rank1: dict) -> None:
    """The gradients of two halves of a batch, averaged, are that of the batch; what is frozen has not moved."""
    assert_near(dict(one.model.state_dict()), rank0, 1e-6)
    assert_same(rank0, rank1)
    pristine, frozen = tiny(kind).state_dict(), frozen_names(one.model)
    assert_same({n: pristine[n] for n in frozen}, {n: rank0[n] for n in frozen})
    assert all(n not in pristine or not torch.equal(pristine[n], rank0[n]) for n in rank0.keys() - frozen)


def file_is_that_of(one: Tuned, single: Path, double: Path) -> None:
    """The file holds the delta and no more, and the random state of both ranks."""
    mine, theirs = (torch.load(file, weights_only=True) for file in (single, double))
    assert set(theirs["state_dict"]) == set(collect(one))
    assert_near(mine["state_dict"], theirs["state_dict"], 1e-6)
    for entry in ("methods", "backbones", "optimizers"):
        assert mine[META][entry] == theirs[META][entry]
    assert len(theirs[META]["resume"]["random"]) == 2


def resumed_runs_are_the_uninterrupted(folder: Path, name: str) -> None:
    """Bit for bit, with dropout and shuffling: each rank goes on with its own random numbers."""
    ranks = [torch.load(folder / f"{name}.resumed.{rank}.pt") for rank in (0, 1)]
    for straight, resumed in ranks:
        assert_same(straight, resumed, name)
    assert_same(ranks[0][0], ranks[1][0], name)
