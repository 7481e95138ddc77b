"""The script for a GPU runs on a CPU, where it leaves out what needs one."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from tests.fresh import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location("gpu_checks", ROOT / "examples" / "gpu_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(printed: str) -> list[list[str]]:
    """Return the cells of each line of the table."""
    lines = printed.split("|---|---|---|---|---|---|---|\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["gpu_checks.py", "--sizes", "tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    return ended.value.code


@pytest.mark.slow
def test_rows_are_chosen_and_printed_in_their_order(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, "--only", "6", "3", "1") == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", *"333333", "6"]
    assert {row[2] for row in rows} == {"held", "left out"}
    assert all(len(row) == 7 for row in rows)


def test_it_stops_in_time_with_what_it_has(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(script, monkeypatch, "--seconds", "-1") == 0
    assert [row[0] for row in table(capsys.readouterr().out)] == [str(row) for row in range(1, 14)]


def test_the_exit_code_counts_the_rows_that_failed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(setup: object) -> None:
        raise ValueError("no such | thing")

    monkeypatch.setitem(script.ROWS, 1, (1, fails))
    monkeypatch.setitem(script.ROWS, 2, (1, lambda setup: iter([script.Line("a", "FAILED")] * 2)))
    assert run(script, monkeypatch, "--only", "1", "2") == 2
    assert "no such / thing" in table(capsys.readouterr().out)[0][6]


@pytest.mark.slow
def test_every_row_holds_on_a_cpu() -> None:
    command = [sys.executable, "-W", "ignore", "examples/gpu_checks.py", "--sizes", "tiny"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = table(ended.stdout)
    assert {row[0] for row in rows} == {str(row) for row in range(1, 14)}
    assert [row for row in rows if row[2] == "left out"] == [row for row in rows if row[0] == "6"]
