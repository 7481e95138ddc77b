"""Each task fits, validates, tests and predicts from its file in configs/tasks, with a tiny model and made-up rows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.cli import main
from tests.valley import TASKS

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`.*configure_optimizers` will be overridden"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
ROOT = Path(__file__).parents[2]

TABLE = "configs/tasks/{}.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft", *arguments])
    main()


@pytest.mark.parametrize("task", TASKS)
def test_each_command(task: str, valley: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / TABLE.format(task)).read_text())
    monitor = config["trainer"]["callbacks"][0]["init_args"]["monitor"]
    (tmp_path / "quick.yaml").write_text(
        """
trainer:
  accelerator: cpu
  max_steps: 3
  val_check_interval: 3
  num_sanity_val_steps: 0
  limit_val_batches: 1
  limit_test_batches: 1
  limit_predict_batches: 1
  enable_progress_bar: false
  logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: logs}}
"""
    )
    base = ["--config", str(ROOT / TABLE.format(task)), "--config", "quick.yaml", "--model.model", valley(TASKS[task])]
    base += ["--data.batch_size", "4", "--data.max_length", "100", "--trainer.callbacks.dirpath", "runs/saved"]
    if TASKS[task] == "t5" and task != "lm_adaptation":
        base += ["--model.max_new_tokens", "4"]
    method = [] if "method" in config else ["--method", "LoRA", "--method.r", "2"]
    run(monkeypatch, "fit", *base, *method)
    (saved,) = (tmp_path / "runs/saved").iterdir()
    checkpoint = torch.load(saved, weights_only=True)
    assert monitor in {key for state in checkpoint["callbacks"].values() for key in [state.get("monitor")]}
    delta = ["--ckpt_path", str(saved)]
    run(monkeypatch, "validate", *base, *delta)
    run(monkeypatch, "test", *base, *delta)
    run(monkeypatch, "predict", *base, *delta)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(4))
