"""Numbers for texts: loss, correlations, rows without a number, and the further scores of classes."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_peft import LoRA, TextClassification, TextRegression, TextRegressionData, TuningError
from lightning_peft.tasks.class_scores import class_metrics
from tests.modules import trainer
from tests.text import sentences, write

SPLITS = ("train", "validation", "test")


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return texts and a number for each, by the kind of its words."""
    numbers = {"nature": -1.5, "people": 0.5, "sound": 1.0}
    return [
        {"first": row["text"], "second": "the light", "score": numbers[row["label"]]}
        for row in sentences(count, seed, longest=3)
    ]


def data(model: str, folder: Path, **kwargs: Any) -> TextRegressionData:
    files = {split: write(folder / f"{split}.csv", rows(48, i)) for i, split in enumerate(SPLITS)}
    columns = {"text": ["first", "second"], "label": "score", "max_length": 24, "batch_size": 8}
    return TextRegressionData(**{"tokenizer": model} | columns | files | kwargs)


def test_it_learns_numbers(model: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    task, found = TextRegression(model, lr=1e-2), data(model, tmp_path, test=str(tmp_path / "train.csv"))
    run = trainer(tmp_path / "run", LoRA(r=4), max_epochs=12)
    run.fit(task, found)
    (scores,) = run.test(task, found, verbose=False)
    assert scores["test_pearson"] > 0.8
    batches = list(found.test_dataloader())
    task.eval()
    with torch.no_grad():
        numbers = torch.cat([task(batch) for batch in batches])
    right = torch.cat([batch["labels"] for batch in batches])
    assert right.dtype == torch.float32
    assert scores["test_loss"] == pytest.approx(float(F.mse_loss(numbers, right)), abs=1e-4)
    assert scores["test_pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([numbers, right]))[0, 1]), abs=1e-4)
    predicted = run.predict(task, found)
    assert torch.allclose(torch.cat([batch["numbers"] for batch in predicted]).sort().values, numbers.sort().values)


@pytest.mark.parametrize("value", [float("nan"), "many", True])
def test_a_row_without_a_number_is_refused(model: str, tmp_path: Path, value: Any) -> None:
    odd = [{"first": "a", "second": "b", "score": value}]
    found = data(model, tmp_path, test=write(tmp_path / "odd.parquet", odd))
    with pytest.raises(TuningError, match=r"row 1 of the test split has .* in column 'score', which is no number"):
        found.setup("test")


def test_further_scores_of_classes() -> None:
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    classes = torch.tensor([0, 1, 0, 1, 1])
    scores = class_metrics(2, ["matthews", "f1_second"])
    for score in scores.values():
        score.update(logits, classes)
    true, false_found, missed, rest = 2, 1, 1, 1
    assert float(scores["f1_second"].compute()) == pytest.approx(2 * true / (2 * true + false_found + missed))
    matthews = (true * rest - false_found * missed) / (3 * 3 * 2 * 2) ** 0.5
    assert float(scores["matthews"].compute()) == pytest.approx(matthews)


def test_further_scores_are_logged(model: str, tmp_path: Path) -> None:
    from tests.text import data as classes

    task = TextClassification(model, ["nature", "people", "sound"], more_scores=["matthews"])
    (scores,) = trainer(tmp_path).test(task, classes(model, tmp_path), verbose=False)
    assert "test_matthews" in scores
    with pytest.raises(TuningError, match="f1_second is the F1 of the second of two classes, and there are 3"):
        TextClassification(model, ["a", "b", "c"], more_scores=["f1_second"])
    with pytest.raises(TuningError, match="more_scores has 'mathews', which is no score: take matthews, f1_second"):
        TextClassification(model, ["a", "b"], more_scores=["mathews"])
