"""Tests and predicts with a frozen model in two processes; Lightning starts the second one the same way."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from lightning_peft import PredictionWriter
from lightning_peft.tasks.prompted_classification import PromptedClassification
from tests import text
from tests.processes import leave, quiet_trainer

TEMPLATES = ["{text} of {answer}", "the {text} in {answer}"]


def run(model: str, folder: Path, devices: int) -> dict[str, Any] | None:
    """Return the scores in the first process, and write the predictions."""
    L.seed_everything(0, verbose=False)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    data = text.TextClassificationData(tokenizer=model, batch_size=4 // devices, max_length=32, **files)
    words = {"nature": "river", "people": "people", "sound": "music film"}
    task = PromptedClassification(
        model, TEMPLATES, words=words, labels=text.NAMES, demonstrations=3, select="nearest", calibrate=True
    )
    trainer = quiet_trainer(folder, devices, PredictionWriter("two.jsonl" if devices > 1 else "one.jsonl"))
    (scores,) = trainer.test(task, data, verbose=False)
    scores["confusions"] = task.confusion_matrix().flatten().tolist()
    trainer.predict(task, data, return_predictions=False)
    return scores if trainer.is_global_zero else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    leave(run(sys.argv[1], Path(sys.argv[2]), 2), sys.argv[2])
