"""Rows of results, tables made of them, and pictures."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lightning_peft import L2P, ContinualClassification, ContinualData, LinearProbe, TuningError
from lightning_peft.cli import main
from lightning_peft.reports.plots import PICTURES, plot
from lightning_peft.reports.rows import ResultRows, read_rows, write_rows
from lightning_peft.tasks.base_to_new import base_new_table, harmonic_mean
from tests.images import save_vit, shapes
from tests.modules import Tuned, loader, trainer

Rows = list[dict[str, Any]]


def shots() -> Rows:
    few = [
        {"method": m, "dataset": d, "seed": s, "shots": n, "metric": "accuracy", "value": v + 0.01 * s + 0.02 * n}
        for m, v in (("CoOp", 0.5), ("LinearProbe", 0.2))
        for d in ("a", "b")
        for s in (0, 1)
        for n in (1, 2, 4)
    ]
    zero = [{"method": "CoOp", "dataset": d, "shots": 0, "metric": "accuracy", "value": 0.4} for d in ("a", "b")]
    return few + zero


def halves() -> Rows:
    return [
        {"method": m, "dataset": d, "seed": 0, "metric": f"{half}_accuracy", "value": v}
        for m, d, base, new in (("CoOp", "a", 0.9, 0.3), ("CoOp", "b", 0.5, 0.7), ("CLIP", "a", 0.6, 0.6))
        for half, v in (("base", base), ("new", new))
    ]


def tasks() -> Rows:
    matrix = [[0.9, 0.8, 0.7], [0, 0.85, 0.8], [0, 0, 0.95]]
    return [
        {"method": "L2P", "metric": "task_accuracy", "task": i, "after": t, "value": matrix[i][t]}
        for t in range(3)
        for i in range(t + 1)
    ]


EXAMPLES: dict[str, Rows] = {
    "accuracy_against_shots": shots(),
    "base_new": halves(),
    "task_matrix": tasks(),
    "selection_histogram": [
        {"method": "L2P", "metric": "selection_count", "task": t, "prompt": p, "value": 3 * t + p}
        for t in range(2)
        for p in range(4)
    ],
    "accuracy_against_length": [
        {"method": "VPT", "metric": "accuracy", "prompt_length": n, "value": 0.5 + n / 1000} for n in (1, 10, 100)
    ],
    "accuracy_against_depth": [
        {"method": "VPT", "metric": "accuracy", "prompt_depth": n, "value": 0.5 + n / 100} for n in (1, 2, 3)
    ],
    "score_against_size": [
        {"method": m, "seed": s, "metric": "f1", "backbone_parameters": n, "value": v + n / 1e7 + s / 10}
        for m, v in (("LoRA", 0.6), ("BitFit", 0.3))
        for s in (0, 1)
        for n in (100_000, 1_000_000)
    ],
    "coverage": [{"method": "DAPL", "metric": "coverage", "epoch": e, "value": e / 4} for e in range(4)],
    **{
        f"score_against_{name}": [
            {"method": m, "seed": s, "metric": "f1", column: cost, "value": v + s / 10}
            for m, cost, v in (("LoRA", 500, 0.6), ("demonstrations", 0, 0.3))
            for s in (0, 1)
        ]
        for name, column in (("parameters", "trained"), ("seconds", "seconds"))
    },
    "learning_curves": [{"method": "LoRA", "metric": "val_f1", "epoch": e, "value": e / 4} for e in range(4)],
    "alpha": [{"method": "SideTuning", "metric": "alpha", "epoch": e, "value": 0.5 - e / 10} for e in range(4)],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as matplotlib has them."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (saved.append(self), save(self, *args, **kwargs))
    )
    return saved


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_rows_come_back(tmp_path: Path, ending: str) -> None:
    rows = [{"method": "A", "seed": 1, "metric": "accuracy", "value": 0.5}, {"metric": "x", "value": 2, "task": 3}]
    file = write_rows(tmp_path / f"rows{ending}", rows[:1])
    write_rows(file, rows[1:])
    assert read_rows(file) == rows


def test_rows_without_a_value_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("metric,value\naccuracy,0.5\naccuracy,good\n")
    with pytest.raises(TuningError, match=r"row 2 of .* has no metric with a number"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(TuningError, match="is no file"):
        read_rows(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("base", "new", "mean"),
    [(69.34, 74.22, 71.70), (82.69, 63.22, 71.66), (80.47, 71.69, 75.83), (82.28, 75.14, 78.55)],
)
def test_harmonic_means_that_were_published(base: float, new: float, mean: float) -> None:
    assert harmonic_mean(base, new) == pytest.approx(mean, abs=0.005)


def test_the_average_has_both_harmonic_means() -> None:
    table = base_new_table(halves())
    average = next(entry for entry in table if entry["method"] == "CoOp" and entry["dataset"] == "average")
    assert average["H"] == pytest.approx((harmonic_mean(0.9, 0.3) + harmonic_mean(0.5, 0.7)) / 2)
    assert average["H_published"] == pytest.approx(harmonic_mean(0.7, 0.5))
    assert average["H_published"] > average["H"]
    assert harmonic_mean(0, 0) == 0


def test_half_a_table_is_refused() -> None:
    with pytest.raises(TuningError, match="CLIP has no new_accuracy on a: test it on both halves"):
        base_new_table(halves()[:-1])


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_drawn_from_its_rows(name: str, tmp_path: Path) -> None:
    others = [row for other, rows in EXAMPLES.items() if other != name for row in rows]
    file = write_rows(tmp_path / "results.csv", EXAMPLES[name])
    (picture,) = plot(str(file), str(tmp_path / "plots"))
    assert picture == tmp_path / "plots" / f"{name}.png"
    with Image.open(picture) as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(10**6)) > 10
    assert read_rows(picture.with_suffix(".csv")) == read_rows(file)
    write_rows(file, others)
    assert len(plot(str(file), str(tmp_path / "plots"))) == len(PICTURES)
    assert read_rows(picture.with_suffix(".csv")) == EXAMPLES[name], "rows of other pictures, or of before"


def lines(axis: Axes) -> dict[str, list[float]]:
    return {line.get_label(): [round(y, 6) for y in line.get_ydata()] for line in axis.lines}


def test_zero_shot_is_a_star_at_zero(tmp_path: Path, figures: list[Figure]) -> None:
    plot(str(write_rows(tmp_path / "rows.csv", shots())), str(tmp_path))
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["a", "b", "average"]
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert [(list(star.get_xdata()), list(star.get_ydata())) for star in stars] == [([0], [40.0])]
    drawn = lines(figure.axes[0])
    assert drawn["CoOp"] == [52.5, 54.5, 58.5], "means over the seeds"
    assert drawn["LinearProbe"] == [22.5, 24.5, 28.5]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "4"]


def test_a_method_stands_at_its_mean_score_and_cost(tmp_path: Path, figures: list[Figure]) -> None:
    plot(str(write_rows(tmp_path / "rows.csv", EXAMPLES["score_against_parameters"])), str(tmp_path))
    (axis,) = figures[0].axes
    assert axis.get_ylabel() == "f1"
    points = [(bars[0].get_xdata()[0], round(bars[0].get_ydata()[0], 6)) for bars in axis.containers]
    assert points == [(500, 0.65), (0, 0.35)]


def test_any_score_is_drawn_along_the_sizes_of_models(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [*EXAMPLES["score_against_size"], {"metric": "val_f1", "value": 0.1, "epoch": 0, "backbone_parameters": 7}]
    plot(str(write_rows(tmp_path / "rows.csv", rows)), str(tmp_path))
    axis = figures[0].axes[0]
    assert (axis.get_ylabel(), axis.get_xscale()) == ("f1", "log")
    assert lines(axis) == {"LoRA": [0.66, 0.75], "BitFit": [0.36, 0.45]}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.1", "1"]


def test_bars_are_as_high_as_the_accuracies(tmp_path: Path, figures: list[Figure]) -> None:
    plot(str(write_rows(tmp_path / "rows.csv", halves())), str(tmp_path))
    axis = figures[0].axes[-1]
    assert axis.get_title() == "average"
    heights = [round(bar.get_height(), 3) for bar in axis.patches]
    assert heights == [70.0, 60.0, 50.0, 60.0, round(100 * harmonic_mean(0.7, 0.5), 3), 60.0]


def test_the_matrix_shows_its_numbers(tmp_path: Path, figures: list[Figure]) -> None:
    plot(str(write_rows(tmp_path / "rows.csv", tasks())), str(tmp_path))
    axis = figures[0].axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["70", "80", "80", "85", "90", "95"]
    assert axis.images[0].get_array().mask.sum() == 3, "what is below the diagonal is left empty"


def test_shares_of_choices_add_up(tmp_path: Path, figures: list[Figure]) -> None:
    plot(str(write_rows(tmp_path / "rows.csv", EXAMPLES["selection_histogram"])), str(tmp_path))
    assert sum(bar.get_height() for bar in figures[0].axes[0].patches) == pytest.approx(100)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv", [{"metric": "loss", "value": 1.0}])
    with pytest.raises(TuningError, match=r"has rows for no picture \(metrics: loss\)"):
        plot(str(file), str(tmp_path))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "rows.csv", tasks())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TuningError, match=r"pip install 'lightning-peft\[plot\]'"):
        plot(str(file), str(tmp_path))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.csv", tasks())
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "plot", str(file), str(tmp_path / "plots")])
    main()
    assert "task_matrix.png" in capsys.readouterr().out


def test_a_run_writes_its_rows(tmp_path: Path) -> None:
    path = save_vit(tmp_path / "vit")
    data = ContinualData(shapes(processor=path), tasks=2, epochs_per_task=1)
    module = ContinualClassification(path, labels=data.label_names)
    method = L2P(pool_size=4, prompt_length=2, top_n=2)
    results = ResultRows("out/results.csv", epoch_metrics=["train_loss"], extra={"prompt_length": 2})
    fit = trainer(tmp_path, method, results, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    fit.fit(module, data)
    fit.test(module, data, verbose=False)
    rows = read_rows(tmp_path / "out/results.csv")
    assert {(row["method"], row["dataset"], row["seed"], row["prompt_length"]) for row in rows} == {
        ("L2P", "ColouredShapes", 0, 2)
    }
    found = {name: [row for row in rows if row["metric"] == name] for name in {row["metric"] for row in rows}}
    assert [(row["task"], row["after"]) for row in found["task_accuracy"]] == [(0, 0), (0, 1), (1, 1)]
    assert [row["epoch"] for row in found["train_loss"]] == [0, 1]
    counts = found["selection_count"]
    assert [(row["task"], row["prompt"]) for row in counts] == [(t, p) for t in (0, 1) for p in range(4)]
    assert sum(row["value"] for row in counts) == 2 * 2 * 12
    assert len(found["accuracy"]) == 1
    assert {path.stem for path in plot(str(tmp_path / "out/results.csv"), str(tmp_path))} == {
        "task_matrix",
        "selection_histogram",
        "accuracy_against_length",
    }


def test_a_metric_that_was_never_logged_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, LinearProbe(), ResultRows(epoch_metrics=["alpah"]))
    module = Tuned("vit")
    with pytest.raises(TuningError, match="epoch_metrics has 'alpah', which was never logged"):
        run.fit(module.train(), loader("vit"), loader("vit"))
    with pytest.raises(TuningError, match="has an ending that is not known"):
        ResultRows("results.txt")


def test_files_are_plain(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", tasks())
    write_rows(tmp_path / "a.jsonl", tasks())
    with (tmp_path / "a.csv").open() as file:
        assert next(csv.reader(file))[:6] == ["method", "dataset", "seed", "shots", "metric", "value"]
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["metric"] == "task_accuracy"
    assert isinstance(ResultRows(), L.Callback)
