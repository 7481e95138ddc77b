"""Tests tasks in two processes, to be started as a script: Lightning starts the second one the same way."""

import json
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
        trainer = L.Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            callbacks=[LoRA(r=2)],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        scores |= {f"{name} {key}": value for key, value in trainer.test(task, data, verbose=False)[0].items()}
    return scores if trainer.is_global_zero else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    datasets.disable_progress_bars()
    found = run(Path(sys.argv[1]), 2)
    if found is not None:
        Path(sys.argv[2], "two.json").write_text(json.dumps(found))
