"""Fits and tests a task in two processes, to be started as a script: Lightning starts the second one the same way."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from lightning_peft import LoRA
from lightning_peft.tasks import TextClassification
from tests import text
from tests.processes import leave, quiet_trainer


def run(model: str, folder: Path, devices: int) -> dict[str, Any] | None:
    """Return scores, confusions and the trained tensors' norms in the first process."""
    L.seed_everything(0, verbose=False)
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    data = text.TextClassificationData(tokenizer=model, batch_size=8 // devices, max_length=32, **files)
    task = TextClassification(model, labels=text.NAMES, lr=1e-2)
    trainer = quiet_trainer(folder, devices, LoRA(r=2), max_epochs=2)
    trainer.fit(task, data)
    scores: dict[str, Any] = {
        name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val")
    }
    (tested,) = trainer.test(task, data, verbose=False)
    scores |= tested
    scores["confusions"] = task.confusion_matrix().tolist()
    scores["norms"] = [p.norm().item() for p in task.parameters() if p.requires_grad]
    return scores if trainer.is_global_zero else None


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the tests in one process look at warnings
    leave(run(sys.argv[1], Path(sys.argv[2]), 2), sys.argv[2])
