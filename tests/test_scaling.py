"""The script of pictures of scale runs: with few steps here, which says nothing of what it finds with many."""

import sys
from pathlib import Path

import pytest

from examples import scaling
from lightning_peft.reports.rows import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no text held an answer")]  # after 20 steps


def test_each_size_is_run_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--folder", str(tmp_path), "--steps", "20", "--tuned", "3", "--sizes", "16", "32"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    thought, prompts = (read_rows(tmp_path / part / "results.csv") for part in ("thought", "prompts"))
    assert [row["method"] for row in thought] == ["step by step", "at once"] * 2
    assert {row["dataset"] for row in prompts} == set(scaling.PROMPTS)
    assert {row["method"] for row in prompts if row["dataset"] == "objective"} == {
        "gaps", "gaps, sentinel before targets", "writing", "full fine-tuning"
    }  # fmt: skip
    assert len({row["backbone_parameters"] for row in thought}) == 2
    for part in ("thought", "prompts"):
        assert (tmp_path / part / "score_against_size.png").is_file()

    def train(*given: object, **named: object) -> float:
        raise AssertionError("what has been run is not run again")

    monkeypatch.setattr(scaling, "train", train)
    scaling.main()
    assert len(read_rows(tmp_path / "prompts/results.csv")) == len(prompts)
