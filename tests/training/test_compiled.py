"""A compiled backbone trains as an uncompiled one, under every strategy that runs on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import compiled
from tests.contract import assert_near, assert_same
from tests.fresh import ROOT
from tests.processes import TORCHRUN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step` but have no `val_dataloader`",
        "ignore:.*is an Enum subclass and is now natively supported",
    ),
]
HOW = {"auto": ("module", "backbone"), "ddp": ("module", "backbone"), "fsdp2": ("backbone", "blocks")}
HOW["tensor parallel"] = ("backbone", "blocks")
CASES = [f"{strategy}/{method}/{how}" for strategy in HOW for method in compiled.METHODS for how in HOW[strategy]]
CASES.append("auto/LoRA/code")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The results of both ranks for the chosen cases, which share one process group."""
    folder = tmp_path_factory.mktemp("ranks")
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    asked = {item.callspec.params["case"] for item in items}
    names = [case for case in CASES if case in asked and not case.startswith("auto")]
    command = [sys.executable, *TORCHRUN, "-m", "tests.compiled", str(folder), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    (folder / "said.txt").write_text(ended.stderr)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, compiled.Noted]:
    """One process without compilation, by method."""
    folder = tmp_path_factory.mktemp("plain")
    return {method: compiled.fit(folder, "auto", method, "plain") for method in compiled.METHODS}


@pytest.mark.parametrize("case", CASES)
def test_compiled_is_not(
    case: str, request: pytest.FixtureRequest, plain: dict[str, compiled.Noted], tmp_path: Path
) -> None:
    strategy, method, how = case.split("/")
    one = plain[method]
    if strategy == "auto":
        module = compiled.fit(tmp_path, strategy, method, how)
        both = [(module.losses, module.gradients, compiled.delta_of(module), compiled.graphs())]
    else:
        ranks = request.getfixturevalue("ranks")
        files = [ranks / f"{case.replace('/', '-')}.{rank}.pt" for rank in (0, 1)]
        failed = files[0].with_suffix(".failed")
        assert files[0].exists(), failed.read_text() if failed.exists() else (ranks / "said.txt").read_text()
        both = [torch.load(file) for file in files]
        assert_same(both[0][2], both[1][2])
    for losses, gradients, delta, graphs in both:
        assert graphs
        torch.testing.assert_close(losses, one.losses, rtol=0, atol=1e-5)
        for mine, theirs in zip(one.gradients, gradients, strict=True):
            assert_near(mine, theirs, 1e-5)
        assert_near(compiled.delta_of(one), delta, 1e-5)
