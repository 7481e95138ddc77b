"""Texts whose classes come in tasks: the same laws as for images."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_peft import (
    ContinualData,
    ContinualTextClassification,
    FullFineTuning,
    LoRA,
    Method,
    PromptTuning,
    TextClassificationData,
    TuningError,
    load_from_checkpoint,
)
from lightning_peft.cli import main
from tests.contract import assert_same
from tests.modules import trainer
from tests.text import FILLERS, save_model, write

SPLITS = ("train", "validation", "test")
NAMES = ["bird", "river", "stone", "tree"]
TASKS = [["bird", "tree"], ["river", "stone"]]


def rows(count: int, seed: int, names: list[str] = NAMES) -> list[dict[str, Any]]:
    """Return texts of a few words, of which one is the class."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        words = [*draw.choices(FILLERS, k=3), names[i % len(names)]]
        found.append({"text": " ".join(draw.sample(words, 4)), "label": words[-1]})
    return found


def texts(path: str, folder: Path, **files: Any) -> TextClassificationData:
    found = {split: write(folder / f"{split}.csv", rows(64, i)) for i, split in enumerate(SPLITS)}
    return TextClassificationData(**{"tokenizer": path, "max_length": 8, "batch_size": 8} | found | files)


def tasks(path: str, folder: Path, **kwargs: Any) -> ContinualData:
    return ContinualData(texts(path, folder), **{"tasks": TASKS, "epochs_per_task": 2} | kwargs)


def task(path: str, **kwargs: Any) -> ContinualTextClassification:
    L.seed_everything(0, verbose=False)
    return ContinualTextClassification(path, **{"labels": NAMES, "lr": 0.01} | kwargs)


def fit(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    return trainer(folder, *callbacks, **{"max_epochs": 4, "reload_dataloaders_every_n_epochs": 1} | kwargs)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("bert"))


def test_each_epoch_has_the_texts_of_its_task(path: str, tmp_path: Path) -> None:
    found = tasks(path, tmp_path)
    found.setup("fit")
    drawn = [
        torch.cat([batch["labels"] for batch in found.data.class_loader("train", classes, shuffle=True)])
        for classes in found.task_classes
    ]
    assert [set(labels.tolist()) for labels in drawn] == [{0, 3}, {1, 2}]
    assert [len(labels) for labels in drawn] == [32, 32]
    found.setup("test")
    assert [sum(len(batch["labels"]) for batch in loader) for loader in found.test_dataloader()] == [32, 32]


def test_one_fit_fills_the_matrix(path: str, tmp_path: Path) -> None:
    module, found = task(path, lr=5e-3, head_lr=5e-3, known="task"), tasks(path, tmp_path, epochs_per_task=15)
    run = fit(tmp_path / "run", FullFineTuning(), max_epochs=30, gradient_clip_val=1.0)
    run.fit(module, found)
    (first, after), (unseen, second) = module.matrix
    assert unseen == 0.0
    assert first > 0.8
    assert second > 0.8
    (scores,) = run.test(module, found, verbose=False)[:1]
    assert scores["test_accuracy_task_0"] == pytest.approx(after)
    assert {"metric": "forgetting", "after": 1, "value": pytest.approx(first - after)} in module.result_rows()


@pytest.mark.parametrize("method", [LoRA, PromptTuning])
def test_a_run_goes_on_from_a_checkpoint(path: str, tmp_path: Path, method: type[Method]) -> None:
    def run(ckpt_path: Path | None = None) -> ContinualTextClassification:
        every = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "run", filename="{epoch}", save_top_k=-1)
        module = task(path)
        fit(tmp_path, method(), every).fit(module, tasks(path, tmp_path), ckpt_path=ckpt_path)
        return module

    straight = run()
    middle = (tmp_path / "run" / "epoch=1.ckpt").rename(tmp_path / "middle.ckpt")
    for rest in (tmp_path / "run").glob("*.ckpt"):
        rest.unlink()
    resumed = run(middle)
    assert resumed.matrix == straight.matrix
    assert_same(dict(straight.delta_state()), dict(resumed.delta_state()))
    again = load_from_checkpoint(ContinualTextClassification, tmp_path / "run" / "epoch=3.ckpt")
    assert again.matrix == straight.matrix


def test_what_does_not_fit_is_refused(path: str, tmp_path: Path) -> None:
    run = fit(tmp_path, LoRA(r=2))
    with pytest.raises(TuningError, match="ContinualTextClassification needs tasks: give it ContinualData"):
        run.fit(task(path), texts(path, tmp_path))
    with pytest.raises(TuningError, match="there are no test rows to score tasks by"):
        run.fit(task(path), ContinualData(texts(path, tmp_path, test=None, test_share=0), tasks=TASKS))
    few = texts(path, tmp_path, test=write(tmp_path / "few.csv", rows(8, 0, TASKS[0])))
    with pytest.raises(TuningError, match="the test split has no rows of task 1: give it some"):
        run.fit(task(path), ContinualData(few, tasks=TASKS, epochs_per_task=2))


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_the_command_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {split: write(tmp_path / f"{split}.csv", rows(16, seed)) for seed, split in enumerate(("train", "test"))}
    own = {"class_path": "TextClassificationData", "init_args": {**files, "max_length": 12, "batch_size": 8}}
    arguments = ["--config", "continual_text_classification", "--method", "LoRA", "--model.model", path]
    arguments += ["--data.data", json.dumps(own), "--data.tasks", json.dumps(TASKS), "--data.epochs_per_task", "1"]
    arguments += [
        "--trainer.max_epochs",
        "2",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.log_every_n_steps",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["lightning-peft", "fit", *arguments])
    main()
    assert list(tmp_path.rglob("*.ckpt"))
