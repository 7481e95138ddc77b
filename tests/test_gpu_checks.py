"""The script for a GPU runs on a CPU, where it leaves out what needs one."""

import json
import subprocess
import sys

import pytest

from tests.fresh import ROOT

SMALL = ["--sizes", "tiny", "--steps", "4", "--batch", "2", "--tokens", "32"]


@pytest.mark.slow
def test_every_case_ran_or_says_why_not() -> None:
    command = [sys.executable, "examples/gpu_checks.py", *SMALL]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {row["case"] for row in rows} >= {"ours", "ours, compiled", "ours, FSDP2", "ours, FSDP", "ours, ZeRO-3"}
    ran = [row for row in rows if "left_out" not in row]
    assert {"32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"} <= {row["precision"] for row in ran}
    assert all(row["ms_a_step"] > 0 for row in ran)
    ours = [row for row in ran if row["case"].startswith("ours")]
    assert {(*row["trained_in"], row["trained"]) for row in ours} == {("float32", 4096)}
    losses = [row["last_loss"] for row in ran]
    assert max(losses) - min(losses) < 0.05
