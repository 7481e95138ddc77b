"""``compare --models`` and ``--over``: a comparison at each point, one table over all, scores by size."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_peft import TuningError
from lightning_peft.cli import main
from lightning_peft.commands import fitting
from lightning_peft.commands.comparing import parser
from lightning_peft.commands.grid import Point, points
from lightning_peft.commands.trials import Result, Trial
from lightning_peft.reports.comparison import Entry
from lightning_peft.reports.overview import Column, table
from lightning_peft.reports.rows import read_rows
from tests import text
from tests.commands.test_comparing import CONFIG


def grid_of(*words: str) -> list[Point]:
    return points(parser().parse_known_args(["--methods", "LoRA", *words])[0])


def test_points_of_a_grid() -> None:
    assert grid_of() == []
    grid = grid_of("--models", "tiny/small", "tiny/large", "--over", "data.seed", "1", "2")
    assert [point.label for point in grid] == ["small, 1", "small, 2", "large, 1", "large, 2"]
    assert grid[1].words == ["--model.model", "tiny/small", "--data.seed", "2"]
    assert grid[1].folder(Path("x")) == Path("x/small_2")
    assert grid[1].column(7).columns == {
        "model": "small", "data.seed": "2", "backbone_parameters": 7, "dataset": "2"
    }  # fmt: skip
    alike = grid_of("--models", "a/model", "b/model")
    assert [(point.label, point.folder(Path("x")).name) for point in alike] == [
        ("a/model", "a-model"), ("b/model", "b-model")
    ]  # fmt: skip


def test_a_family_of_sets_is_averaged_in_its_groups() -> None:
    grid = grid_of("--over", "data.layout", "vtab-1k/specialized", "vtab-1k/kitti")
    assert [point.label for point in grid] == ["diabetic_retinopathy", "eurosat", "patch_camelyon", "resisc45", "kitti"]
    assert [point.group for point in grid] == ["specialized"] * 4 + ["structured"]
    assert len(grid_of("--over", "data.layout", "vtab-1k")) == 19
    columns = [point.column(1) for point in grid]
    for number, column in enumerate(columns):
        column.entries = [Entry("VPT", [{"test": 0.1 * number}, {"test": 0.1 * number + 0.1}])]
    columns[0].entries = [*columns[0].entries, Entry("LoRA", [{"test": 0.5}])]
    first, second = table(columns)
    assert first["eurosat"] == "0.150 ± 0.071"
    assert (first["mean of specialized"], first["mean of structured"], first["mean of all"]) == (
        "0.200", "0.450", "0.250"
    )  # fmt: skip
    assert (second["diabetic_retinopathy"], second["eurosat"], second["mean of all"]) == ("0.500", "", "")
    assert list(table([Column("one", {}, "", columns[0].entries)])[0]) == ["method", "one"]


def test_mistakes() -> None:
    with pytest.raises(TuningError, match=r"--over data\.seed names no values: write --over data\.seed ONE ANOTHER"):
        grid_of("--over", "data.seed")
    with pytest.raises(TuningError, match=r"model\.model has a value twice in a, b, a: name each once"):
        grid_of("--models", "a", "b", "a")


def test_scores_by_the_size_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("small", "distilbert"), ("large", "bert")):
        text.save_model(tmp_path / name, kind)
    text.write(tmp_path / "train.csv", text.sentences(40))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    ran: list[tuple[str, Trial]] = []

    def run(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str]) -> Result:
        model = words[words.index("--model.model") + 1]
        ran.append((model, trial))
        whole = {"rates": {"delta": 0.1}, "trained": 1, "bytes": 1, "steps": 1, "curve": [], "hits": [], "memory": 0}
        return whole | {"validation": 0.5, "test": 0.25 * (1 + (model == "large"))}

    monkeypatch.setattr(fitting, "run", run)
    words = ["--config", "tiny.yaml", "--methods", "BitFit", "--seeds", "1", "--rates", "1", "--models"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "compare", *words, "small", "large"])
    main()
    here = Path("runs/compare")
    with (here / "overview.csv").open() as file:
        own = next(row for row in csv.DictReader(file) if row["method"] == "`BitFit`")
    assert own == {"method": "`BitFit`", "small": "0.250", "large": "0.500", "mean of all": "0.375"}
    assert "| `BitFit` | 0.250 | 0.500 | 0.375 |" in (here / "overview.md").read_text()
    sizes = {row["model"]: row["backbone_parameters"] for row in read_rows(here / "results.csv")}
    assert sizes["large"] > sizes["small"] > 1000
    assert (here / "pictures/score_against_size.png").is_file()
    assert "| `BitFit` | 0.500 |" in (here / "large/table.md").read_text()
    assert len(list((here / "trials").glob("*.json"))) == len(ran) == 2 * 3, "one folder of runs, which a budget is of"
