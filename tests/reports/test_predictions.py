"""Predictions as a file: whole, in order, and gone on with after a kill without repeating or losing a row."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import (
    BitFit,
    LoRA,
    Method,
    PredictionWriter,
    PromptTuning,
    PTuningV2,
    TuningError,
    save_delta,
)
from tests.contract import shake
from tests.models import tiny
from tests.modules import trainer

ROOT = Path(__file__).parents[2]


class Doubles(L.LightningModule):
    """Doubles numbers; stops in the middle of a batch when it is told to."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.factor = factor
        self.seen: list[int] = []
        self.stop_at: int | None = None

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        if self.stop_at == batch_idx:
            raise RuntimeError("stopped")
        self.seen += batch.tolist()
        return {"answer": [self.factor * x for x in batch.tolist()], "text": [f"é {x}" for x in batch.tolist()]}


def loader() -> DataLoader:
    return DataLoader(torch.arange(11), batch_size=2)


def predict(folder: Path, module: Doubles, **kwargs: Any) -> None:
    trainer(folder, PredictionWriter(**kwargs)).predict(module, loader(), return_predictions=False)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


EXPECTED = [{"row": x, "answer": 2 * x, "text": f"é {x}"} for x in range(11)]


def stopped(folder: Path, batch: int, **kwargs: Any) -> None:
    module = Doubles(**kwargs)
    module.stop_at = batch
    with pytest.raises(RuntimeError, match="stopped"):
        predict(folder, module)
    assert "predict_step" not in vars(module)


def test_one_line_a_row(tmp_path: Path) -> None:
    module = Doubles()
    predict(tmp_path, module)
    assert rows(tmp_path) == EXPECTED
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert "predict_step" not in vars(module)


@pytest.mark.parametrize("torn", ["", '{"row": 6, "ans', '{"row": 6, "answer": 12, "text": "x"}'])
def test_a_stopped_run_goes_on(torn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path, 3)
    with (tmp_path / ".predictions.jsonl.0").open("a") as file:
        file.write(torn)
    module = Doubles()
    predict(tmp_path, module)
    assert module.seen == list(range(6, 11))
    assert rows(tmp_path) == EXPECTED
    assert "6 predictions of an earlier run are kept" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_stopped_twice(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    stopped(tmp_path, 4)
    module = Doubles()
    predict(tmp_path, module)
    assert module.seen == [8, 9, 10]
    assert rows(tmp_path) == EXPECTED


def test_rows_of_more_processes_are_kept(tmp_path: Path) -> None:
    stopped(tmp_path, 1)
    line = json.dumps({"row": 9, "answer": 18, "text": "é 9"})
    (tmp_path / ".predictions.jsonl.1").write_text(f"{line}\n")
    module = Doubles()
    predict(tmp_path, module)
    assert module.seen == list(range(2, 11))  # the batch of row 9 has row 8, too
    assert rows(tmp_path) == EXPECTED


@pytest.mark.parametrize("change", ["module", "resume"])
def test_another_run_begins_anew(change: str, tmp_path: Path) -> None:
    stopped(tmp_path, 3, **({"factor": 3} if change == "module" else {}))
    module = Doubles()
    predict(tmp_path, module, resume=change != "resume")
    assert module.seen == list(range(11))
    assert rows(tmp_path) == EXPECTED


def test_a_killed_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.reports.test_predictions", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    module = Doubles()
    predict(tmp_path, module)
    assert module.seen == [8, 9, 10]
    assert rows(tmp_path) == EXPECTED


class Killed(Doubles):
    """Kills its process in the fifth batch."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        if batch_idx == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


if __name__ == "__main__":
    Killed.__qualname__ = Doubles.__qualname__
    predict(Path(sys.argv[1]), Killed())


class Says(L.LightningModule):
    """Says the scores of a backbone for texts of one length."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = tiny(kind)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        logits = self.net(input_ids=batch).logits
        return {"scores": (logits if logits.ndim == 2 else logits[:, -1, :3]).tolist()}


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("bert", [LoRA(r=2), BitFit(), PTuningV2(num_virtual_tokens=2)]),
        ("gpt2", [PromptTuning(num_virtual_tokens=2, init="random_uniform"), LoRA(r=2)]),
    ],
)
def test_each_delta_says_its_own_of_each_row(kind: str, methods: list[Method], tmp_path: Path) -> None:
    """As alone, whatever their methods are and with heads of their own; the file goes on where a run was killed."""
    texts, expected, files = torch.arange(3, 23).view(5, 4), {}, []
    for i, method in enumerate(methods):
        module = Says(kind).eval()
        method.apply(module)
        torch.manual_seed(i)
        shake(module)
        files.append(str(save_delta(module, tmp_path / f"{i}.safetensors")))
        with torch.no_grad():
            expected[files[-1]] = Says.predict_step(module, texts, 0)["scores"]
    rows_of = DataLoader(texts, batch_size=2)
    trainer(tmp_path / "out", PredictionWriter(deltas=files)).predict(Says(kind), rows_of, return_predictions=False)
    found = rows(tmp_path / "out")
    assert [(row["row"], row["delta"]) for row in found] == [(i, file) for i in range(5) for file in files]
    for row in found:
        torch.testing.assert_close(
            torch.tensor(row["scores"]), torch.tensor(expected[row["delta"]][row["row"]]), atol=1e-5, rtol=1e-5
        )
    assert len({tuple(row["scores"]) for row in found}) == len(found)


def test_one_delta_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"name a file twice: name each once"):
        trainer(tmp_path, PredictionWriter(deltas=["a.ckpt", "a.ckpt"])).predict(Says("bert"), loader())
