"""A search by reflection: what gepa is told, what becomes of its candidates, and what is said where it is missing."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft import TuningError, search_prompts
from lightning_peft.data import Seq2SeqData, TextClassificationData
from lightning_peft.tasks import PromptedClassification, PromptedGeneration
from tests.modules import trainer
from tests.text import write

Valley = Callable[[str], str]
CLOZE = "{text} all in all it was {mask} ."


@dataclass
class Batch:
    """Stands in for gepa's own."""

    outputs: list[Any]
    scores: list[float]
    trajectories: list[Any] | None = None


def optimize(**given: Any) -> Any:
    """Do what gepa does, with the newest candidate as the parent of the next and each let go on."""
    adapter, rows = given["adapter"], given["valset"]
    candidates, parents = [given["seed_candidate"]], [[None]]
    scores = [adapter.evaluate(rows, candidates[0], False).scores]
    while not any(stop(None) for stop in given["stop_callbacks"]):
        few = given["trainset"][: given["reflection_minibatch_size"]]
        seen = adapter.evaluate(few, candidates[-1], True)
        (part,) = candidates[0]
        told = adapter.make_reflective_dataset(candidates[-1], seen, [part])[part]
        candidates.append({part: given["reflection_lm"](repr(told))})
        parents.append([len(candidates) - 2])
        scores.append(adapter.evaluate(rows, candidates[-1], False).scores)
    means = [sum(own) / len(own) for own in scores]
    return SimpleNamespace(candidates=candidates, parents=parents, val_aggregate_scores=means)


@pytest.fixture
def gepa(monkeypatch: pytest.MonkeyPatch) -> None:
    if "gepa" not in sys.modules:
        monkeypatch.setitem(sys.modules, "gepa", SimpleNamespace(optimize=optimize, EvaluationBatch=Batch))


def opinions(model: str, folder: Path) -> tuple[PromptedClassification, TextClassificationData]:
    rows = [{"text": f"the soup was {word} .", "label": label} for word, label in (("good", "good"), ("bad", "bad"))]
    files = {split: write(folder / f"{split}.jsonl", rows * 3) for split in ("train", "validation")}
    data = TextClassificationData(tokenizer=model, max_length=64, test_share=0, **files)
    return PromptedClassification(model, CLOZE, words={"bad": "bad", "good": "good"}), data


def test_a_writer_reads_what_went_wrong(valley: Valley, tmp_path: Path, gepa: None) -> None:
    task, data = opinions(valley("bert"), tmp_path)
    told: list[str] = []

    def writer(text: str) -> str:
        told.append(text)
        return f"say {{one}} of number {len(told)}"

    found = search_prompts(task, data, "gepa", 4, trainer=trainer(tmp_path), writer=writer)
    assert [one.how for one in found.tried][:2] == ["given", "gepa"]
    assert len(found.tried) <= 4
    for number, one in enumerate(found.tried[1:], 1):
        assert one.template.startswith("say {{one}} of number ")
        assert one.template.endswith(f"\n{CLOZE}")
        assert one.parent in [other.template for other in found.tried[:number]]
        alone = PromptedClassification(valley("bert"), one.template, words={"bad": "bad", "good": "good"})
        (scores,) = trainer(tmp_path).validate(alone, data, verbose=False)
        assert one.score == pytest.approx(scores["val_accuracy"])
    assert task.templates[0].text == found.best.template
    assert "the soup was good ." in told[0]
    assert "This is wrong. The right answer is" in told[0] or "This is right." in told[0]


@pytest.mark.slow
def test_the_model_of_the_task_writes(valley: Valley, tmp_path: Path, gepa: None) -> None:
    model = valley("gpt2")
    rows = [{"source": f"name : an{i}", "target": f"an{i}"} for i in range(4)]
    files = {split: write(tmp_path / f"{split}.jsonl", rows) for split in ("train", "validation")}
    data = Seq2SeqData(tokenizer=model, max_length=64, test_share=0, **files)
    task = PromptedGeneration(model, "{source} = {answer}", target="target", max_new_tokens=4)
    found = search_prompts(task, data, "gepa", 2, trainer=trainer(tmp_path))
    assert found.metric == "val_exact_match"
    assert len(found.tried) <= 2
    assert all(one.template.endswith("{source} = {answer}") for one in found.tried)


def test_mistakes(valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = opinions(valley("bert"), tmp_path)
    monkeypatch.setitem(sys.modules, "gepa", None)
    with pytest.raises(TuningError, match=r"needs gepa, which is not there: pip install 'lightning-peft\[search\]'"):
        search_prompts(task, data, "gepa", 2, trainer=trainer(tmp_path))
    monkeypatch.setitem(sys.modules, "gepa", SimpleNamespace(optimize=optimize, EvaluationBatch=Batch))
    with pytest.raises(TuningError, match="masked language model, which writes no texts: give writer=, a function"):
        search_prompts(task, data, "gepa", 2, trainer=trainer(tmp_path))
    rows = type(data).rows
    monkeypatch.setattr(type(data), "rows", lambda self, split: None if split == "train" else rows(self, split))
    with pytest.raises(TuningError, match="how='gepa' reads train rows, and there are none: give a train split"):
        search_prompts(task, data, "gepa", 2, trainer=trainer(tmp_path), writer=str)
