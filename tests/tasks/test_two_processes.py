"""Scores of tasks in two processes are those of one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tasks import two_processes_of_tasks


def test_two_processes_score_like_one(valley: Callable[[str], str], tmp_path: Path) -> None:
    folder = Path(valley("bert")).parent
    valley("t5")
    root = Path(__file__).parents[2]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.tasks.two_processes_of_tasks", str(folder), str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | environment, check=True, capture_output=True, timeout=400)
    two, one = json.loads((tmp_path / "two.json").read_text()), two_processes_of_tasks.run(folder, 1)
    assert one is not None
    assert len(one) == 5 + 3 + 8 + 6
    assert two == pytest.approx(one, rel=1e-4)
