"""Tests tasks in two processes, to be started as a script: Lightning starts the second one the same way."""

import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import lightning as L

from lightning_peft import (
    LoRA,
    MultiTask,
    MultiTaskData,
    QuestionAnswering,
    QuestionAnsweringData,
    Seq2Seq,
    Seq2SeqData,
    TokenClassification,
    TokenClassificationData,
)
from tests.processes import leave, quiet_trainer


def pairs(folder: Path, size: int) -> dict[str, tuple[L.LightningModule, L.LightningDataModule]]:
    """Return tasks and their data; ``size`` rows make a batch."""
    bert, t5 = str(folder / "bert"), str(folder / "t5")
    tagged = TokenClassificationData(tokenizer=bert, dataset="made://tags", batch_size=size)
    several = MultiTaskData(
        tokenizer=bert,
        tasks={"form": {"dataset": "made://sentences", "label": "form"}, "opinion": {"dataset": "made://opinions"}},
        batch_size=size,
    )
    asked = QuestionAnsweringData(tokenizer=bert, dataset="made://questions", max_length=26, stride=6, batch_size=size)
    written = Seq2SeqData(tokenizer=t5, dataset="made://descriptions", test="validation", batch_size=size)
    return {
        "tags": (TokenClassification(bert, tagged.label_names), tagged),
        "answers": (QuestionAnswering(bert), asked),
        "texts": (Seq2Seq(t5, max_new_tokens=3), written),
        "several": (MultiTask(bert, several.label_names), several),
    }


def run(folder: Path, devices: int) -> dict[str, Any] | None:
    """Return the scores of all tasks in the first process."""
    L.seed_everything(0, verbose=False)
    scores: dict[str, Any] = {}
    for name, (task, data) in pairs(folder, 32 // devices).items():
        trainer = quiet_trainer(folder, devices, LoRA(r=2))
        scores |= {f"{name} {key}": value for key, value in trainer.test(task, data, verbose=False)[0].items()}
    return scores if trainer.is_global_zero else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    datasets.disable_progress_bars()
    leave(run(Path(sys.argv[1]), 2), sys.argv[2])
