"""Two processes on the CPU (gloo) under DDP compute what one computes, and write the same delta."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import collect
from tests import ddp
from tests.contract import ROOT, assert_near, assert_same, frozen_names
from tests.models import tiny

NAMES = pytest.mark.parametrize("name", ddp.cases())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the two processes have written to."""
    folder = tmp_path_factory.mktemp("ddp")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "tests.ddp", str(folder)],
        cwd=ROOT,
        check=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return folder


@NAMES
def test_two_ranks_are_one(name: str, results: Path, tmp_path: Path) -> None:
    kind, method = ddp.cases()[name]
    one = ddp.descend(tmp_path, kind, method, ranks=1, seed=0)
    two = torch.load(results / f"{name}.state.0.pt")
    assert_near(dict(one.model.state_dict()), two, 1e-6)
    assert_same(two, torch.load(results / f"{name}.state.1.pt"))
    pristine = tiny(kind).state_dict()
    frozen = pristine.keys() & frozen_names(one.model)
    assert_same({n: pristine[n] for n in frozen}, {n: two[n] for n in frozen})
    assert all(n not in pristine or not torch.equal(pristine[n], two[n]) for n in two.keys() - frozen)


@NAMES
def test_the_file_is_that_of_one_process(name: str, results: Path, tmp_path: Path) -> None:
    kind, method = ddp.cases()[name]
    module = ddp.descend(tmp_path, kind, method, ranks=1, seed=0)
    one, two = (torch.load(f / "epoch=1.ckpt", weights_only=True) for f in (tmp_path, results / name))
    assert set(two["state_dict"]) == set(collect(module))
    assert_near(one["state_dict"], two["state_dict"], 1e-6)
    assert one["lightning_peft"]["methods"] == two["lightning_peft"]["methods"]
    assert one["lightning_peft"]["backbones"] == two["lightning_peft"]["backbones"]
    assert len(two["lightning_peft"]["resume"]["random"]) == 2


@NAMES
def test_a_resumed_run_is_the_uninterrupted_one(name: str, results: Path) -> None:
    """Bit for bit, with dropout and shuffling: each rank goes on with its own random numbers."""
    ranks = [torch.load(results / f"{name}.resumed.{rank}.pt") for rank in (0, 1)]
    for straight, resumed in ranks:
        assert_same(straight, resumed)
    assert_same(ranks[0][0], ranks[1][0])
