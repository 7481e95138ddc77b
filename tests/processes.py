"""Runs a module of the tests in an interpreter of its own, whose ranks Lightning or torchrun starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_module(module: str, *arguments: str | Path, folder: Path, before: tuple[str, ...] = ()) -> None:
    """Run ``python BEFORE -m MODULE ARGUMENTS`` in ``folder``; a failure shows what the ranks have printed."""
    own = {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *before, "-m", module, *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
