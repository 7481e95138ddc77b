"""Deltas of a task: loaded again they give the same logits, resumed they train to the same weights."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_peft import LoRA, LoRAMixin, load_from_checkpoint
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassification
from tests import text
from tests.modules import trainer
from tests.text import NAMES, scored


def weights(task: TextClassification) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_delta_checkpoint_gives_the_task_back(model: str, tmp_path: Path) -> None:
    data, task = text.data(model, tmp_path), text.task(model, lr=1e-2)
    saver = ModelCheckpoint(tmp_path / "saved", monitor="val_accuracy", mode="max")
    trainer(tmp_path, LoRA(r=2), saver).fit(task, data)
    data.setup("test")
    logits, _ = scored(task, data)
    assert len(torch.load(saver.best_model_path, weights_only=True)["state_dict"]) == 4 * 2 + 2
    for load in (TextClassification.load_from_checkpoint, lambda p: load_from_checkpoint(TextClassification, p)):
        L.seed_everything(7, verbose=False)
        again = load(saver.best_model_path)
        assert again.labels == NAMES
        assert torch.equal(scored(again, data)[0], logits)
    L.seed_everything(8, verbose=False)
    other = text.task(model, lr=1e-2)
    logged = trainer(tmp_path, LoRA(r=2), saver).test(other, data, ckpt_path=saver.best_model_path, verbose=False)
    assert logged == trainer(tmp_path).test(task, data, verbose=False)
    assert torch.equal(other.confusion_matrix(), task.confusion_matrix())


class Owner(LoRAMixin, TextClassification):
    """Owns its method."""


def test_as_a_mixin(model: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    task, saver = Owner(model, labels=NAMES), ModelCheckpoint(tmp_path / "saved")
    task.method = LoRA(r=2)
    data = text.data(model, tmp_path)
    trainer(tmp_path, saver).fit(task, data)
    data.setup("test")
    again = Owner.load_from_checkpoint(saver.best_model_path)
    assert torch.equal(scored(again, data)[0], scored(task, data)[0])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # a resumed run goes on in it
@pytest.mark.parametrize("when", ["end of epoch", "after validation", "inside an epoch", "after validation inside"])
def test_a_resumed_run_equals_an_uninterrupted_one(when: str, tmp_path: Path) -> None:
    model = text.save_model(tmp_path / "dropout", dropout=0.1)
    saving: dict[str, dict[str, Any]] = {
        "end of epoch": {"save_on_train_epoch_end": True, "every_n_epochs": 1},
        "after validation": {"save_on_train_epoch_end": False, "every_n_epochs": 1},
        "inside an epoch": {"every_n_train_steps": 4},
        "after validation inside": {"save_on_train_epoch_end": False, "every_n_epochs": 1},
    }
    often = {"val_check_interval": 4} if when == "after validation inside" else {}

    def run(path: Path | None = None) -> dict[str, Tensor]:
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, **saving[when])
        method = LoRA(r=2, dropout=0.2, backbone_mode="train")
        task = text.task(model, lr=1e-2)
        trainer(tmp_path, method, saver, max_epochs=3, **often).fit(task, text.data(model, tmp_path), ckpt_path=path)
        return weights(task)

    whole = run()
    middle = {path.name: path for path in (tmp_path / "saved").iterdir()}
    assert len(middle) >= 3
    steps = {"inside an epoch": (4, 8), "after validation inside": (4, 10)}
    for step in steps.get(when, (6, 12)):
        assert_equal(run(middle[f"step={step}.ckpt"]), whole)


def test_hyper_parameters_rebuild_the_data(model: str, tmp_path: Path) -> None:
    data, saver = text.data(model, tmp_path, max_length=20), ModelCheckpoint(tmp_path / "saved")
    trainer(tmp_path, LoRA(r=2), saver).fit(text.task(model), data)
    again = TextClassificationData.load_from_checkpoint(saver.best_model_path)
    assert again.hparams == data.hparams
    assert (again.max_length, again.given) == (20, data.given)
