"""A delta of a task gives the scores again, and a run resumed inside an epoch equals an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import (
    LoRA,
    MultiTask,
    MultiTaskData,
    Seq2Seq,
    Seq2SeqData,
    TokenClassification,
    TokenClassificationData,
)
from tests.modules import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TASKS = {"form": {"dataset": "made://sentences", "label": "form"}, "opinion": {"dataset": "made://opinions"}}


def pair(name: str, valley: Callable[[str], str]) -> tuple[L.LightningModule, L.LightningDataModule]:
    L.seed_everything(0, verbose=False)
    if name == "texts":
        data: Any = Seq2SeqData(tokenizer=valley("t5"), dataset="made://descriptions")
        return Seq2Seq(valley("t5"), max_new_tokens=3, lr=1e-2), data
    if name == "several":
        data = MultiTaskData(tokenizer=valley("bert"), tasks=TASKS, cap=128)
        return MultiTask(valley("bert"), data.label_names, lr=1e-2), data
    data = TokenClassificationData(tokenizer=valley("bert"), dataset="made://tags")
    return TokenClassification(valley("bert"), data.label_names, lr=1e-2), data


@pytest.mark.parametrize("name", ["tags", "several", "texts"])
def test_scores_and_resuming(name: str, valley: Callable[[str], str], tmp_path: Path) -> None:
    few = {"max_steps": 8, "max_epochs": -1, "val_check_interval": 4, "limit_val_batches": 2, "log_every_n_steps": 1}

    def run(path: Path | None = None) -> tuple[dict[str, torch.Tensor], dict[str, float], L.LightningModule, Any]:
        task, data = pair(name, valley)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=4)
        once = trainer(tmp_path, LoRA(r=2, dropout=0.1), saver, **few)
        once.fit(task, data, ckpt_path=path)
        trained = {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}
        return trained, {k: v.item() for k, v in once.callback_metrics.items() if k.startswith("val")}, task, data

    whole, scores, _, data = run()
    again = run(tmp_path / "saved" / "step=4.ckpt")
    assert all(torch.equal(again[0][n], value) for n, value in whole.items())
    assert again[1] == scores
    fresh, _ = pair(name, valley)
    path = tmp_path / "saved" / "step=8.ckpt"
    (logged,) = trainer(tmp_path, LoRA(r=2, dropout=0.1), limit_val_batches=2).validate(
        fresh, data, path, verbose=False
    )
    assert logged == pytest.approx(scores)
