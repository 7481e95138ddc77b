"""Rows of several tasks in wordings drawn for them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_peft import LoRA, TuningError
from lightning_peft.data.instructions import InstructionCausalLMData, InstructionSeq2SeqData, InstructionTask
from lightning_peft.tasks import CausalLM
from tests import models, text
from tests.modules import trainer

TOPICS = {
    "task": "topics",
    "templates": {"ask": "{text} of", "list": "{text}\n{options}\n", "write": "a {label} is"},
    "inverse": ["write"],
    "words": {"nature": "river", "people": "people", "sound": "music"},
}
FACTS = {"task": "facts", "templates": {"a": "the {text} to {answer}", "b": "{text} in", "c": "{text} and"}}


def tasks(folder: Path) -> dict[str, InstructionTask]:
    found = {}
    for name, parts, count in (("topics", TOPICS, 40), ("facts", FACTS, 10)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(parts))
        files = {}
        for split, rows in {"train": count, "validation": 6, "test": 6}.items():
            files[split] = text.write(folder / f"{name}.{split}.jsonl", text.sentences(rows, len(split)))
        found[name] = InstructionTask(str(folder / f"{name}.yaml"), source=files)
    return found


def data(model: str, folder: Path, **kwargs: Any) -> InstructionCausalLMData:
    return InstructionCausalLMData(model, tasks(folder), **{"templates": 3, "max_length": 40} | kwargs)


def test_each_row_is_a_wording_of_its_task(model: str, tmp_path: Path) -> None:
    rows = data(model, tmp_path).rows("train")
    assert rows is not None
    assert len(rows) == 50
    seen = Counter((row["task"], row["template"]) for row in rows)
    assert set(seen) == {("topics", n) for n in ("ask", "list", "write")} | {("facts", n) for n in "abc"}
    source = {row["text"]: row["label"] for row in text.sentences(40, 5)}
    options = "OPTIONS:\n- river\n- people\n- music"
    for row in rows:
        if row["template"] == "ask":
            words = row["prompt"].removesuffix(f" of\n\n{options}")
            assert row["target"] == TOPICS["words"][source[words]]
        elif row["template"] == "list":
            assert row["prompt"].endswith(f"\n{options}\n")
        elif row["template"] == "write":
            assert row["prompt"].startswith("a ")
            assert source[row["target"]] in row["prompt"]
        else:
            assert "OPTIONS" not in row["prompt"]
            assert row["target"] in text.NAMES


def test_the_mixture_is_capped_and_reproducible(model: str, tmp_path: Path) -> None:
    module = data(model, tmp_path, cap=10, count=600)
    assert module.rates() == {"topics": 0.5, "facts": 0.5}
    rows = module.rows("train")
    assert rows is not None
    assert Counter(row["task"] for row in rows)["facts"] / 600 == pytest.approx(0.5, abs=0.07)
    assert list(rows) == list(data(model, tmp_path, cap=10, count=600).rows("train"))
    assert list(rows) != list(data(model, tmp_path, cap=10, count=600, seed=1).rows("train"))
    capped = data(model, tmp_path, cap=10).rows("train")
    assert capped is not None
    assert len(capped) == 20


def test_inverse_wordings_are_not_scored(model: str, tmp_path: Path) -> None:
    rows = data(model, tmp_path).rows("test")
    assert rows is not None
    assert len(rows) == 12
    assert "write" not in set(rows["template"])


def test_any_method_trains_on_it(tmp_path: Path) -> None:
    models.tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    name = str(models.save_tokenizer(tmp_path / "gpt2"))
    task = CausalLM(name, lr=1e-2)
    run = trainer(tmp_path, LoRA(r=2))
    rows = data(name, tmp_path)
    before = run.validate(task, rows, verbose=False)[0]["val_loss"]
    run.fit(task, rows)
    assert run.callback_metrics["val_loss"] < before


def test_a_held_out_cluster_is_tested_alone(model: str, tmp_path: Path) -> None:
    module = data(model, tmp_path, held_out=["facts"])
    named = {split: {row["task"] for row in module.rows(split)} for split in ("train", "validation", "test", "predict")}
    assert named == {"train": {"topics"}, "validation": {"topics"}, "test": {"facts"}, "predict": {"facts"}}
    assert len(module.rows("train")) == 40
    assert module.rates() == {"topics": 1.0}
    both = tasks(tmp_path)
    both["facts"].cluster = both["topics"].cluster = "words"
    with pytest.raises(TuningError, match=r"held_out=\['words'\] leaves no task to train: hold out fewer clusters"):
        InstructionCausalLMData(model, both, templates=3, held_out=["words"])
    with pytest.raises(TuningError, match=r"held_out has 'fact', which is the cluster of no task; it has e\.g\. facts"):
        data(model, tmp_path, held_out=["fact"])


def test_for_an_encoder_decoder(model: str, tmp_path: Path) -> None:
    found = InstructionSeq2SeqData(model, tasks(tmp_path), templates=3, max_length=40)
    found.setup("fit")
    batch = next(iter(found.train_dataloader()))
    assert {"input_ids", "labels", "references"} <= batch.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "topics has 3 templates where 10 are asked for"),
        ({"tasks": {}, "templates": 3}, "there are no tasks to mix"),
        ({"cap": 0, "templates": 3}, "leave nothing to mix"),
    ],
)
def test_mistakes(change: dict, message: str, model: str, tmp_path: Path) -> None:
    arguments = {"tasks": tasks(tmp_path), "max_length": 40} | change
    with pytest.raises(TuningError, match=message):
        InstructionCausalLMData(model, **arguments).rows("train")


def test_a_label_without_a_word(model: str, tmp_path: Path) -> None:
    module = data(model, tmp_path)
    module.instructions["topics"].words.pop("sound")  # type: ignore[attr-defined]
    with pytest.raises(TuningError, match="task 'topics' has the label 'sound', which its file has no word for"):
        module.rows("train")


def test_columns_that_rows_lack(model: str, tmp_path: Path) -> None:
    given = tasks(tmp_path)
    given["facts"].answer = "lable"
    with pytest.raises(TuningError, match="the train split has no column 'lable'"):
        InstructionCausalLMData(model, given, templates=3, max_length=40).rows("train")
