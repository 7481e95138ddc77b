"""Classes by the nearest training rows, under the data module and the scores of a trained classifier."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_peft import TuningError
from lightning_peft.tasks.nearest_demonstrations import NearestDemonstrations
from tests import text
from tests.modules import trainer
from tests.text import NAMES


def test_votes_by_hand(model: str, tmp_path: Path) -> None:
    data = text.data(model, tmp_path, other=6)
    task = NearestDemonstrations(model, NAMES, neighbours=3, temperature=0.1)
    (logged,) = trainer(tmp_path).test(task, data, verbose=False)
    assert logged.keys() == {"test_loss", "test_accuracy", "test_f1"}
    train, test = (text.sentences(count, seed) for count, seed in ((48, 0), (6, 2)))
    assert not [p for p in task.parameters() if p.requires_grad]

    @torch.no_grad()
    def embed(words: str) -> torch.Tensor:
        states = task.backbone(**task.tokenizer(words, return_tensors="pt")).last_hidden_state[0]
        return F.normalize(states.mean(0), dim=0)

    pool = torch.stack([embed(row["text"]) for row in train])
    right = 0
    for row in test:
        cosines, rows = (pool @ embed(row["text"])).topk(3)
        votes = torch.zeros(3)
        for weight, number in zip((cosines / 0.1).softmax(0), rows.tolist(), strict=True):
            votes[NAMES.index(train[number]["label"])] += weight
        right += NAMES[votes.argmax()] == row["label"]
    assert logged["test_accuracy"] == pytest.approx(right / 6)
    batches = trainer(tmp_path).predict(task, data)
    assert batches is not None
    assert torch.allclose(batches[0]["probabilities"].sum(1), torch.ones(6))


def test_a_training_row_finds_itself(model: str, tmp_path: Path) -> None:
    data = text.data(model, tmp_path)
    (tmp_path / "test.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    task = NearestDemonstrations(model, NAMES, neighbours=1)
    (logged,) = trainer(tmp_path).test(task, data, verbose=False)
    assert logged["test_accuracy"] == 1.0


def test_mistakes(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"neighbours=0 and temperature=0\.05 are out of range"):
        NearestDemonstrations(model, NAMES, neighbours=0)
    with pytest.raises(TuningError, match="neighbours=49, but there are 48 training rows: take fewer"):
        trainer(tmp_path).test(
            NearestDemonstrations(model, NAMES, neighbours=49), text.data(model, tmp_path), verbose=False
        )
    with pytest.raises(TuningError, match="trains nothing: run validate, test or predict"):
        trainer(tmp_path).fit(NearestDemonstrations(model, NAMES), text.data(model, tmp_path))
    with pytest.raises(TuningError, match="the data have 3 classes"):
        trainer(tmp_path).test(NearestDemonstrations(model, NAMES[:2]), text.data(model, tmp_path), verbose=False)
