"""Writes answers with a frozen model in two processes; Lightning starts the second one the same way."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from lightning_peft import PredictionWriter
from lightning_peft.data import Seq2SeqData
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from tests.processes import leave, quiet_trainer


def run(model: str, folder: Path, devices: int) -> dict[str, Any] | None:
    """Return the scores in the first process, and write the predictions."""
    L.seed_everything(0, verbose=False)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    data = Seq2SeqData(tokenizer=model, batch_size=4 // devices, max_length=32, **files)
    task = PromptedGeneration(
        model, "Q: {source}\nA: {answer}", target="target", demonstrations=1, max_new_tokens=5, answer="text"
    )
    trainer = quiet_trainer(folder, devices, PredictionWriter("two.jsonl" if devices > 1 else "one.jsonl"))
    (scores,) = trainer.test(task, data, verbose=False)
    trainer.predict(task, data, return_predictions=False)
    return scores if trainer.is_global_zero else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    leave(run(sys.argv[1], Path(sys.argv[2]), 2), sys.argv[2])
