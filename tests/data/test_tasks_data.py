"""Rows of each task as batches: where the labels stand, what is cut, what is packed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from lightning_peft import (
    CausalLMData,
    ClozeClassificationData,
    KnowledgeProbingData,
    LMAdaptationData,
    MultiTaskData,
    QuestionAnsweringData,
    Seq2SeqData,
    TokenClassificationData,
)
from lightning_peft.data.batches import TaskBatches
from tests.valley import set_up

Valley = Callable[[str], str]
TAGS = ["O", "B-FOOD", "B-LOC", "B-PER", "I-LOC", "I-PER"]


def test_tags_stand_at_first_tokens(valley: Valley) -> None:
    data = set_up(TokenClassificationData(tokenizer=valley("bert"), dataset="made://tags"), "fit", "predict")
    assert data.label_names == TAGS
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].shape == batch["input_ids"].shape
    words = {"".join(row["tokens"]): row["tags"] for row in data.rows("validation")}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        tags = words[data.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")]
        assert [TAGS[i] for i in labels[labels != -100]] == tags
        assert labels[0] == -100
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    places = next(iter(data.predict_dataloader()))["labels"]
    assert set(places.unique().tolist()) == {-100, 0}


def test_later_tokens_of_a_word_have_no_tag(valley: Valley, tmp_path: Path) -> None:
    rows = [{"tokens": ["zzqx", "lives"], "tags": ["B-PER", "O"]}]
    Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    path = str(tmp_path / "train.jsonl")
    data = set_up(TokenClassificationData(tokenizer=valley("gpt2"), train=path, validation_share=0, test_share=0))
    (batch,) = data.train_dataloader()
    assert (batch["labels"] != -100).sum() == 2
    assert batch["labels"].shape[1] > 2
    (batch,) = set_up(
        TokenClassificationData(tokenizer=valley("gpt2"), train=path, validation_share=0, test_share=0, max_length=1)
    ).train_dataloader()
    assert batch["labels"].tolist() == [[1]]


def test_tags_as_class_labels(valley: Valley, tmp_path: Path) -> None:
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["X", "O", "B-X"]))})
    rows = Dataset.from_dict({"tokens": [["the", "dog"]], "tags": [[1, 2]]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    path = str(tmp_path / "train.parquet")
    data = set_up(TokenClassificationData(tokenizer=valley("bert"), train=path, validation_share=0, test_share=0))
    assert data.label_names == ["X", "O", "B-X"]
    (batch,) = data.train_dataloader()
    assert batch["labels"].tolist() == [[-100, 1, 2, -100]]


@pytest.mark.parametrize("max_length", [100, 26])
def test_spans_hold_the_answers(max_length: int, valley: Valley) -> None:
    data = QuestionAnsweringData(
        tokenizer=valley("bert"), dataset="made://questions", max_length=max_length, stride=6, batch_size=16
    )
    set_up(data)
    rows, seen, windows = data.rows("validation"), set(), 0
    for batch in data.val_dataloader():
        assert batch["input_ids"].shape[1] <= max_length
        for i, question in enumerate(batch["question"].tolist()):
            windows += 1
            (answer,) = rows[question]["answers"]["text"]
            start, end = int(batch["start_positions"][i]), int(batch["end_positions"][i])
            assert batch["context"][i] == rows[question]["context"]
            if start:
                spans = batch["offsets"][i]
                assert batch["context"][i][spans[start][0] : spans[end][1]] == answer
                seen.add(question)
            else:
                assert max_length == 26
    assert seen == set(range(len(rows)))
    assert (windows > len(rows)) == (max_length == 26)


def test_questions_that_the_context_does_not_answer(valley: Valley, tmp_path: Path) -> None:
    row = {"question": "what ?", "context": "a dog .", "answers": {"text": ["a"], "answer_start": [0]}}
    empty = row | {"answers": {"text": [], "answer_start": []}}
    Dataset.from_list([row, empty]).to_parquet(tmp_path / "t.parquet")
    path = str(tmp_path / "t.parquet")
    data = set_up(
        QuestionAnsweringData(tokenizer=valley("bert"), train=path, validation=path, validation_share=0, test_share=0)
    )
    (batch,) = data.val_dataloader()
    assert sorted(batch["start_positions"].tolist()) == [0, 4]


def test_only_the_target_has_labels(valley: Valley) -> None:
    data = CausalLMData(
        tokenizer=valley("gpt2"), dataset="made://descriptions", prompt="source", target="target", separator=" = "
    )
    set_up(data, "fit", "predict")
    batch = next(iter(data.val_dataloader()))
    rows = {row["target"]: row["source"] for row in data.rows("validation")}
    for ids, labels, (target,) in zip(batch["input_ids"], batch["labels"], batch["references"], strict=True):
        tokens = labels[labels != -100]
        assert data.tokenizer.decode(tokens) == f" {target}<|endoftext|>"
        assert data.tokenizer.decode(ids[labels == -100], skip_special_tokens=True) == f"{rows[target]} ="
        assert torch.equal(ids[labels != -100], tokens)
    (first, *_) = data.predict_dataloader()
    assert first.keys() == {"input_ids", "attention_mask"}
    assert (first["attention_mask"][:, -1] == 1).all()
    assert (
        data.tokenizer.decode(first["input_ids"][0], skip_special_tokens=True) == data.rows("test")[0]["source"] + " ="
    )


def test_packed_rows_hold_the_same_texts(valley: Valley) -> None:
    def texts(packing: bool) -> list[list[int]]:
        data = CausalLMData(tokenizer=valley("gpt2"), dataset="made://opinions", max_length=64, packing=packing)
        set_up(data)
        found = []
        for batch in data.train_dataloader():
            if packing:
                assert batch["input_ids"].shape[1] == 64
                assert batch.keys() == {"input_ids", "labels", "position_ids"}
            for i, ids in enumerate(batch["input_ids"].tolist()):
                if not packing:
                    found.append(ids[: int(batch["attention_mask"][i].sum())])
                    continue
                starts = [k for k, place in enumerate(batch["position_ids"][i].tolist()) if place == 0]
                for start, end in itertools.pairwise([*starts, 64]):
                    labels = batch["labels"][i, start:end].tolist()
                    assert labels[0] == -100
                    if set(labels) != {-100}:
                        assert labels[1:] == ids[start + 1 : end]
                        found.append(ids[start:end])
        return found

    assert sorted(texts(True)) == sorted(texts(False))


def test_sources_and_targets(valley: Valley, tmp_path: Path) -> None:
    rows = [{"source": "the dog", "target": ["a dog", "a hen"]}, {"source": "the hen that likes", "target": ["a"]}]
    Dataset.from_list(rows).to_json(tmp_path / "t.jsonl")
    path = str(tmp_path / "t.jsonl")
    data = Seq2SeqData(tokenizer=valley("t5"), train=path, validation=path, test_share=0, prefix="likes ", bucket=False)
    (batch,) = set_up(data).val_dataloader()
    decode = data.tokenizer.batch_decode
    assert decode(batch["input_ids"], skip_special_tokens=True) == ["likes the dog", "likes the hen that likes"]
    assert batch["references"] == [["a dog", "a hen"], ["a"]]
    assert data.tokenizer.decode(batch["labels"][0]) == "a dog</s>"
    assert batch["labels"][1, -1] == -100


def test_text_is_cut_in_two(valley: Valley) -> None:
    def pieces(**kwargs: Any) -> list[tuple[list[int], list[int]]]:
        data = LMAdaptationData(
            tokenizer=valley("t5"), dataset="made://corpus", max_length=32, batch_size=1, bucket=False, **kwargs
        )
        return [(b["input_ids"][0].tolist(), b["labels"][0].tolist()) for b in set_up(data).val_dataloader()]

    found = pieces()
    data = LMAdaptationData(tokenizer=valley("t5"), dataset="made://corpus")
    whole = [i for text in data.rows("validation")["text"] for i in data.tokenizer(text)["input_ids"]]
    assert [i for one, two in found for i in [*one, *two]] == whole
    assert all(one and two and len(one) + len(two) == 32 for one, two in found[:-1])
    assert len({len(one) for one, _ in found}) > 10
    assert pieces() == found
    assert pieces(seed=1) != found
    assert min(len(side) for pair in pieces(shortest=9) for side in pair) == 9


@pytest.mark.parametrize(("kind", "style"), [("bert", "masked"), ("gpt2", "causal")])
def test_templates_keep_their_gap(kind: str, style: str, valley: Valley) -> None:
    data = ClozeClassificationData(
        tokenizer=valley(kind),
        dataset="made://opinions",
        template="{text} all in all it was {mask} ." if kind == "bert" else "{text} all in all it was {answer}",
        verbalizer={"bad": ["bad", "poor"], "good": "good"},
        max_length=14,
    )
    assert (data.style, data.masks) == (style, 1)
    assert data.verbalizer == {"bad": ["bad", "poor"], "good": ["good"]}
    for batch in set_up(data).val_dataloader():
        assert batch["input_ids"].shape[1] <= 14
        if kind == "bert":
            assert ((batch["input_ids"] == data.tokenizer.mask_token_id).sum(1) == 1).all()
        texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=kind == "gpt2")
        assert all("all in all it was" in text for text in texts)


def test_soft_prompts_in_templates(valley: Valley) -> None:
    data = KnowledgeProbingData(
        tokenizer=valley("bert"), dataset="made://facts", template="{v:3} {sub} {v:2} {obj} {v:1}"
    )
    batch = next(iter(set_up(data).val_dataloader()))
    virtual = [[i for i in row if i < 0] for row in batch["input_ids"].tolist()]
    assert all(row == [-1, -2, -3, -4, -5, -6] for row in virtual)


def test_candidates(valley: Valley, tmp_path: Path) -> None:
    data = KnowledgeProbingData(tokenizer=valley("bert"), dataset="made://facts", template="{sub} keeps a {obj} .")
    assert set(data.candidates) >= set(data.rows("test")["obj"])
    batches = list(set_up(data, "test").test_dataloader())
    chosen = sorted(data.candidates[i] for batch in batches for i in batch["labels"].tolist())
    assert chosen == sorted(data.rows("test")["obj"])
    (tmp_path / "words.txt").write_text("dog\ncat\nzzqxvw\n")
    few = KnowledgeProbingData(
        tokenizer=valley("bert"),
        dataset="made://facts",
        template="{sub} keeps a {obj} .",
        vocabulary=str(tmp_path / "words.txt"),
        unknown="drop",
    )
    assert few.candidates == ["cat", "dog"]
    labels = torch.cat([batch["labels"] for batch in set_up(few).train_dataloader()])
    assert len(labels) == sum(word in ("cat", "dog") for word in few.rows("train")["obj"])


def test_facts_of_one_relation(valley: Valley, tmp_path: Path) -> None:
    rows = [
        {"sub": "ana", "obj": obj, "relation": relation} for obj, relation in [("dog", "p"), ("cat", "p"), ("x y", "q")]
    ]
    Dataset.from_list(rows).to_json(tmp_path / "t.jsonl")
    path = str(tmp_path / "t.jsonl")
    data = KnowledgeProbingData(
        tokenizer=valley("bert"),
        train=path,
        validation=path,
        test=path,
        template="{sub} keeps {obj}",
        where={"relation": "p"},
    )
    assert data.candidates == ["cat", "dog"]
    (batch,) = set_up(data).train_dataloader()
    assert len(batch["labels"]) == 2


def tasks_data(valley: Valley, **kwargs: Any) -> MultiTaskData:
    tasks: dict[str, dict[str, Any]] = {
        "form": {"dataset": "made://sentences", "label": "form"},
        "opinion": {"dataset": "made://opinions"},
    }
    return set_up(MultiTaskData(tokenizer=valley("bert"), tasks=tasks, **kwargs))


def test_tasks_share_batches_up_to_the_cap(valley: Valley) -> None:
    data = tasks_data(valley, cap=100)
    assert data.label_names == {"form": ["asked", "ordered", "told"], "opinion": ["bad", "good"]}
    batches = list(data.train_dataloader())
    ids = torch.cat([batch["task_ids"] for batch in batches])
    assert ids.bincount().tolist() == [100, 100]
    assert any(len(batch["task_ids"].unique()) == 2 for batch in batches)
    validation = torch.cat([batch["task_ids"] for batch in data.val_dataloader()])
    assert len(validation) == sum(len(part.rows("validation")) for part in data.parts.values())
    alone = list(tasks_data(valley, cap=None, mixed=False).train_dataloader())
    assert all(len(batch["task_ids"].unique()) == 1 for batch in alone)
    order = [int(batch["task_ids"][0]) for batch in alone]
    assert order != sorted(order)


def test_each_epoch_draws_anew() -> None:
    tasks = [0] * 50 + [1] * 5

    def rows(epoch: int, **kwargs: Any) -> list[list[int]]:
        arguments: dict[str, Any] = {"tasks": tasks, "cap": 20, "mixed": True} | kwargs
        batches = TaskBatches(np.arange(55), 4, True, True, **arguments)
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        return found

    first, second = (sorted(itertools.chain.from_iterable(rows(epoch))) for epoch in (0, 1))
    assert len(first) == len(set(first)) == len(second) == 25
    assert first[-5:] == second[-5:] == [50, 51, 52, 53, 54]
    assert first != second
    assert rows(0) == rows(0)
    halves = [rows(0, num_replicas=2, rank=rank, mixed=False) for rank in range(2)]
    assert len(halves[0]) == len(halves[1])
    assert len(set(itertools.chain.from_iterable(map(itertools.chain.from_iterable, halves)))) == 25
