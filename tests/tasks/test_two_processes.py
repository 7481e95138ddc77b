"""Scores of tasks in two processes are those of one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import run_module
from tests.tasks import two_processes_of_tasks


@pytest.mark.slow
def test_two_processes_score_like_one(valley: Callable[[str], str], tmp_path: Path) -> None:
    folder = Path(valley("bert")).parent
    valley("t5")
    run_module("tests.tasks.two_processes_of_tasks", folder, tmp_path, folder=tmp_path)
    two, one = json.loads((tmp_path / "two.json").read_text()), two_processes_of_tasks.run(folder, 1)
    assert one is not None
    assert len(one) == 5 + 3 + 8 + 6
    assert two == pytest.approx(one, rel=1e-4)
