"""``compare``: rates are chosen on validation rows, and a killed comparison ends in the same table to the byte."""

import csv
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft import CausalLM, LinearProbe, LoRA, PromptTuning, TextClassification, TuningError
from lightning_peft.cli import main
from lightning_peft.commands import controls, fitting, using
from lightning_peft.commands.comparing import WHOLE, parser, runs, seconds_of
from lightning_peft.commands.method_words import methods_of, name_of
from lightning_peft.commands.trials import Result, Trial, Trials, best_scale, scales_of
from lightning_peft.core import anatomy
from lightning_peft.core.graft import grafts
from lightning_peft.reports.comparison import entries_of
from tests import images, text, two_towers

CONFIG = """
model: {class_path: TextClassification, init_args: {model: model}}
data:
  class_path: TextClassificationData
  init_args: {train: train.csv, max_length: 16, batch_size: 8, validation_share: 0.25, test_share: 0.25}
method: BitFit
trainer: {accelerator: cpu, max_epochs: 1}
"""


class Noted:
    """Stands in for the runs: the best factor of learning rates is 0.3, and each run is noted."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def __call__(self, trial: Trial) -> Result:
        self.trials.append(trial)
        return {"validation": 1.0 - abs(trial.scale - 0.3), "test": 0.5}


def test_halving_is_on_validation_rows_and_gives_each_method_the_same(tmp_path: Path) -> None:
    noted = Noted()
    trials = Trials(tmp_path, "x", noted, None)
    assert scales_of(4) == [1.0, 3.0, 0.3, 10.0]
    assert best_scale(trials, "LoRA", scales_of(4), higher=True) == 0.3
    assert [(trial.share, trial.scale) for trial in noted.trials] == [
        (0.25, 1.0), (0.25, 3.0), (0.25, 0.3), (0.25, 10.0), (0.5, 0.3), (0.5, 1.0)
    ]  # fmt: skip
    assert not any(trial.tests for trial in noted.trials)
    assert best_scale(trials, "LoRA", scales_of(4), higher=False) == 10.0
    assert best_scale(trials, "LoRA", [1.0], higher=True) == 1.0
    before = len(noted.trials)
    assert best_scale(Trials(tmp_path, "x", noted, None), "LoRA", scales_of(4), higher=True) == 0.3
    assert len(noted.trials) == before
    assert best_scale(Trials(tmp_path, "other", noted, None), "LoRA", scales_of(2), higher=True) == 1.0
    assert len(noted.trials) == before + 2


def test_the_budget_ends_a_comparison(tmp_path: Path) -> None:
    assert (seconds_of("90m"), seconds_of("2h"), seconds_of(None)) == (5400.0, 7200.0, None)
    with pytest.raises(TuningError, match=r"--budget 'soon' is no time: write it as 90s, 30m, 2h or 1d\.$"):
        seconds_of("soon")
    assert Trials(tmp_path, "x", Noted(), 0.0).all_of([Trial("LoRA", 1.0, 0, 1.0, True)]) is None
    assert Trials(tmp_path, "x", Noted(), 60.0).all_of([Trial("LoRA", 1.0, 0, 1.0, True)]) is not None


def hold(folder: Path, trial: Trial, ready: Any, go: Any) -> None:
    """Run a trial in a process of its own, as slowly as it is told."""

    def run(one: Trial) -> Result:
        ready.set()
        go.wait(30)
        return {"validation": 1.0, "test": 2.0}

    Trials(folder, "x", run, None).all_of([trial])


def test_two_processes_share_the_runs(tmp_path: Path) -> None:
    first, second = Trial("LoRA", 1.0, 1, 1.0, True), Trial("LoRA", 1.0, 2, 1.0, True)
    fork = multiprocessing.get_context("fork")
    ready, go = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, first, ready, go))
    other.start()
    assert ready.wait(30)
    ran: list[Trial] = []

    def run(trial: Trial) -> Result:
        ran.append(trial)
        go.set()
        return {"validation": 1.0, "test": 1.0}

    found = Trials(tmp_path, "x", run, None).all_of([first, second])
    other.join(30)
    assert ran == [second]
    assert [one["test"] for one in found or ()] == [2.0, 1.0]


def test_words_of_methods() -> None:
    assert name_of(" LoRA( r = 8,alpha=32.0) +BitFit()") == "LoRA(alpha=32.0) + BitFit"
    assert [type(method).__name__ for method in methods_of("LoRA(r=4) + BitFit")] == ["LoRA", "BitFit"]
    for word, said in (
        ("Lora", "'Lora' of 'Lora' is no method; it has e.g. LoRA"),
        ("LoRA(8)", r"'LoRA\(8\)' is no method \(a method is called with names and values\): write it as LoRA"),
        ("LoRA(rank=8)", "unexpected keyword argument 'rank'"),
        ("LoRA(r=open('x'))", "is no method"),
        ("LoRA(", "is no method"),
    ):
        with pytest.raises(TuningError, match=said):
            methods_of(word)


def test_how_far_a_method_is_behind() -> None:
    common = {"rates": {"delta": 0.1}, "trained": 1, "bytes": 1}
    best = {"test": 0.9, "hits": [1] * 90 + [0] * 10, **common}
    worse = {"test": 0.5, "hits": [1] * 50 + [0] * 50, **common}
    entries = entries_of({"worse": [worse], "best": [best]}, higher=True)
    assert [entry.method for entry in entries] == ["best", "worse"]
    assert entries[0].behind is None
    low, high = entries[1].behind or (0.0, 0.0)
    assert 0.28 < low < 0.38 < 0.42 < high < 0.52


def compared(monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, bytes]:
    words = ["--config", "tiny.yaml", "--methods", "LoRA(r=2)", "--seeds", "1", "--rates", "1", *more]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "compare", *words])
    main()
    return {name: Path(f"runs/compare/{name}").read_bytes() for name in ("table.md", "table.csv", "table.json")}


def test_a_method_without_training_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(two_towers.save_model(tmp_path / "clip"))
    drawn = "colours: [red, blue], shapes: [star], pixels: 16, per_class: 2, test_per_class: 4"
    shapes = f"{{class_path: ColouredShapes, init_args: {{{drawn}}}}}"
    method = "TipAdapter(alpha=100.0, num_classes=2, shots=2, train_keys=False)"
    words = ["--model", "CLIPClassification", "--model.model", model, "--data", "CLIPData", "--data.data", shapes]
    words += ["--data.processor", model, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    words += ["--methods", method, "--seeds", "1", "--rates", "1", "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "compare", *words])
    main()
    rows = {row["method"]: row for row in json.loads((tmp_path / "runs/table.json").read_text())["methods"]}
    assert rows.keys() == {name_of(method), "zero-shot"}
    assert rows[name_of(method)]["trained"] == 0
    assert rows[name_of(method)]["bytes"] > 2 * 2 * 32 * 4  # the keys
    assert rows[name_of(method)]["scores"] > [0.9] > rows["zero-shot"]["scores"]  # they tell red from blue


def test_a_killed_comparison_ends_in_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text.save_model(tmp_path / "model")
    text.write(tmp_path / "train.csv", text.sentences(60))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "other.txt").write_text("a quite other text\n\nand one more\n")
    monkeypatch.chdir(tmp_path)
    run, ran = fitting.run, []

    def killed(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str]) -> Result:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(trial)
        return run(words, monitor, trial, other)

    monkeypatch.setattr(fitting, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        compared(monkeypatch, "--other", "other.txt")
    assert len(list(Path("runs/compare/trials").glob("*.json"))) == 2
    ran.clear()
    monkeypatch.setattr(fitting, "run", lambda *given: ran.append(given) or run(*given))
    table = compared(monkeypatch, "--other", "other.txt")
    assert len(ran) == 1
    words, monitor, trial, _ = ran[-1]
    kept = [json.loads(path.read_text()) for path in Path("runs/compare/trials").glob("*.json")]
    (own,) = [one for one in kept if one["method"] == trial.method]
    choosing = run(words, monitor, replace(trial, share=0.5, tests=False))
    tested = {"test", "hits", "kept", "batch"}
    assert choosing.keys() == own.keys() - {"method", "scale", "seed", "share", "tests", "seconds"} - tested
    assert 0 < choosing["steps"] < own["steps"]
    assert len(own["hits"]) == 15
    last = run([*words, *WHOLE], monitor, trial)
    assert (own["steps"], last["steps"]) == (4, 6), "of 30 rows, and of these and the 15 for validation, 8 at a time"
    assert len(last["hits"]) == 15
    assert (last["validation"], last["curve"]) == (None, []), "what was trained on validates nothing"
    ran.clear()
    capsys.readouterr()
    assert compared(monkeypatch, "--other", "other.txt") == table
    assert not ran
    screen = capsys.readouterr().out
    assert max(map(len, screen[: screen.index("accuracy on the test rows")].splitlines())) <= 80
    assert screen.count("LinearProbe(cache_features=True)") == 3
    rows = {row["method"]: row for row in json.loads(table["table.json"])["methods"]}
    assert rows.keys() == {"LoRA(r=2)", "LinearProbe(cache_features=True)", "nearest demonstrations"}
    assert len(rows["LoRA(r=2)"]["scores"]) == 1
    assert rows["LoRA(r=2)"]["kept"][0] < rows["LinearProbe(cache_features=True)"]["kept"][0] == pytest.approx(1.0)
    assert table["table.csv"].splitlines()[0].endswith(b",kept on other text")
    costs = csv.DictReader(Path("runs/compare/costs.csv").read_text().splitlines())
    assert {row["method"]: bool(row["seconds a batch of the test"]) for row in costs} == {
        "LoRA(r=2)": True, "LinearProbe(cache_features=True)": True, "nearest demonstrations": False
    }  # fmt: skip
    assert b"| `LoRA(r=2)` | 0." in table["table.md"]
    sent = Path("runs/compare/page.html").read_text()
    assert "<td>LoRA(r=2)</td>" in sent
    assert re.findall(r"<h2>(.*?)</h2>", sent) == [
        "score against parameters", "score against seconds", "learning curves",
    ]  # fmt: skip
    assert not re.search(r"https?:|src=\"(?!data:)", sent), "nothing is read from elsewhere"


def test_only_the_last_runs_train_on_the_validation_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []

    def run(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str]) -> Result:
        asked.append((trial.tests, tuple(words[-2:]) == WHOLE))
        return {"validation": 1.0, "test": 1.0}

    monkeypatch.setattr(fitting, "run", run)
    monkeypatch.setattr(fitting, "describe", lambda words: (TextClassification.__new__(TextClassification), str(words)))
    given, words = parser().parse_known_args(["--methods", "LoRA", "--rates", "2", "--seeds", "1", "--whole"])
    given.trials = tmp_path
    runs(given, words)
    assert set(asked) == {(False, False), (True, True)}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:`.*configure_optimizers` will be overridden")
def test_a_stream_is_scored_by_validation_rows_after_its_last_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, tested_at, test = images.save_vit(tmp_path / "vit"), [], L.Trainer.test
    drawn = "colours: [red, blue], shapes: [star, ring], pixels: 8"
    few = f"{drawn}, per_class: 2, validation_per_class: 1, test_per_class: 2"
    shapes = f"{{class_path: ColouredShapes, init_args: {{{few}}}}}"
    words = ["--config", "continual_classification", "--model.model", vit, "--data", "ContinualData"]
    words += ["--data.data", shapes, "--data.tasks", "2", "--data.epochs_per_task", "2", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.setattr(
        L.Trainer, "test", lambda *given, **how: tested_at.append(how["ckpt_path"]) or test(*given, **how)
    )
    found = fitting.run(words, "val_accuracy", Trial("LoRA", 1.0, 0, 0.5, True))
    assert (found["steps"], len(found["curve"]), tested_at) == (2, 2, [None])
    assert found["validation"] == found["curve"][-1]
    assert set(found["curve"]) <= {0.0, 0.25, 0.5, 0.75, 1.0}, "four validation images"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:`.*configure_optimizers` will be overridden")
def test_validation_rows_that_were_trained_on_choose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.save_model(tmp_path / "model")
    text.write(tmp_path / "train.csv", text.sentences(60))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    tested_at, test = [], L.Trainer.test
    monkeypatch.setattr(
        L.Trainer, "test", lambda *given, **how: tested_at.append(how["ckpt_path"]) or test(*given, **how)
    )
    for whole, steps in (("true", 6), ("false", 4)):
        words = ["--config", "tiny.yaml", "--data.whole", whole]
        found = fitting.run(words, "val_accuracy", Trial("LoRA(r=2)", 1.0, 1, 1.0, True))
        assert found["steps"] == steps, "45 rows or 30, 8 in a batch"
    assert tested_at == [None, "best"]


def test_a_method_is_merged_before_its_batches_are_timed(tmp_path: Path) -> None:
    text.save_model(tmp_path / "model")
    for method, left in ((LoRA(), False), (PromptTuning(), True), (LinearProbe(cache_features=True), False)):
        task = TextClassification(str(tmp_path / "model"), ["a", "b"])
        before = using.embedded(task, ["one text", "and a longer one"])
        method.apply(task.backbone)
        using.ready(task)
        assert any(True for _ in grafts(task.backbone)) is left
        assert (using.kept(before, using.embedded(task, ["one text", "and a longer one"])) < 0.999) is left
    with pytest.raises(TuningError, match=r"--other .* has no line of text: give a file with one text in a line\.$"):
        using.lines_of(os.devnull, "--other")


def test_controls_are_trained_at_the_rates_of_their_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.save_model(tmp_path / "model")
    text.write(tmp_path / "train.csv", text.sentences(40))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    ran: list[Trial] = []
    tests = {"": 0.9, controls.RANDOM: 0.6, controls.SHUFFLED: 0.5}

    def run(words: Sequence[str], monitor: str, trial: Trial, other: Sequence[str]) -> Result:
        ran.append(trial)
        score = tests[controls.split(trial.method)[1]]
        whole = {"rates": {"delta": 0.1}, "trained": 1, "bytes": 1, "steps": 1, "curve": [], "hits": [], "memory": 0}
        return whole | {"validation": 1.0 - abs(trial.scale - 3.0), "test": score}

    monkeypatch.setattr(fitting, "run", run)
    given, words = parser().parse_known_args(
        ["--methods", "BitFit", "--controls", "--seeds", "2", "--config", "tiny.yaml"]
    )
    results, _ = runs(given, words)
    own = [name for name in results if name.startswith("BitFit")]
    assert own == ["BitFit", "BitFit, random weights", "BitFit, shuffled labels"]
    assert {trial.scale for trial in ran if trial.tests and trial.method in own} == {3.0}
    assert controls.findings(results)[0] == (
        "BitFit: of 0.900, 0.300 is the model's (0.600 with random weights, 0.500 with shuffled labels)"
    )
    task, _ = fitting.describe(words)
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    torch.manual_seed(1)  # other than that of the model
    controls.randomise(task)
    head = set(anatomy.head_names(task.backbone))
    for name, value in task.backbone.state_dict().items():
        is_matrix = value.dim() > 1 and value.is_floating_point()
        assert torch.equal(value, before[name]) is (name in head or not is_matrix), name
    with pytest.raises(TuningError, match="--controls shuffles classes and draws the weights of transformers models"):
        controls.check_task(CausalLM(str(tmp_path / "model")))


def test_a_row_keeps_the_label_that_it_was_given() -> None:
    rows = {"input_ids": torch.arange(24).view(8, 3), "labels": torch.tensor([0, 1] * 4)}
    shuffled, seen = controls.ShuffledLabels(0), []
    for order in (list(range(8)), [3, 1, 0, 2, 7, 6, 5, 4]):
        batch = {name: value[order] for name, value in rows.items()}
        shuffled.on_train_batch_start(None, None, batch, 0)
        seen.append(dict(zip(order, batch["labels"].tolist(), strict=True)))
    assert seen[0] == seen[1]
    assert sorted(seen[0].values()) == [0] * 4 + [1] * 4
    assert list(seen[0].values()) != rows["labels"].tolist()
    padded = {"input_ids": torch.tensor([[0, 1, 2, 9]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    longer = {"input_ids": torch.tensor([[0, 1, 2, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    for each in (padded, longer):
        shuffled.on_train_batch_start(None, None, each | {"labels": torch.tensor([len(shuffled.given)])}, 0)
    assert len(shuffled.given) == 9
