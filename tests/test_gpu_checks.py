"""The script for a GPU runs on a CPU, where it leaves out what needs one."""

import importlib.util
import signal
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
    assert [row[0] for row in rows] == ["1", *"3333", "6"]
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
    monkeypatch.setitem(script.ROWS, 2, (1, lambda setup: iter([("a", lambda: script.Line("FAILED"))] * 2)))
    assert run(script, monkeypatch, "--only", "1", "2") == 2
    assert "no such / thing" in table(capsys.readouterr().out)[0][6]


def test_a_case_that_fails_stops_no_other_and_one_that_takes_long_the_rest_of_its_row(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise ValueError("no such thing")

    def hangs() -> None:
        raise script.Over

    fine = ("b", lambda: script.Line(note="went"))
    monkeypatch.setitem(script.ROWS, 1, (1, lambda setup: iter([("a", fails), fine])))
    monkeypatch.setitem(script.ROWS, 2, (1, lambda setup: iter([("c", hangs), fine])))
    monkeypatch.setitem(script.ROWS, 3, (1, lambda setup: iter([fine])))
    assert run(script, monkeypatch, "--only", "1", "2", "3") == 1
    printed = capsys.readouterr()
    rows = [row[:3] for row in table(printed.out)]
    assert rows[:2] == [["1", "a", "FAILED"], ["1", "b", "held"]]
    assert rows[2:] == [["2", "c and the rest", "left out"], ["3", "b", "held"]]
    assert "ValueError at test_gpu_checks.py" in table(printed.out)[0][6]
    assert "Traceback" in printed.err


def test_a_limit_stops_what_takes_longer(script: ModuleType) -> None:
    with pytest.raises(script.Over), script.at_most(0.01):
        signal.pause()


@pytest.mark.slow
def test_every_row_holds_on_a_cpu() -> None:
    command = [sys.executable, "-W", "ignore", "examples/gpu_checks.py", "--sizes", "tiny", "--seconds", "1500"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = table(ended.stdout)
    assert {row[0] for row in rows} == {str(row) for row in range(1, 14)}
    assert [row for row in rows if row[2] == "left out"] == [row for row in rows if row[0] == "6"]
