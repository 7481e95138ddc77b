"""A tiny model that reads its context, and what a prefix keeps of a text that was put into it."""

import random
from pathlib import Path

import pytest
import torch

from examples.pretrain_reader import FEWEST, IGNORED, batch, build, prepare, right, save_tokenizer, train
from lightning_peft.data.synthetic import PEOPLE
from tests.benchmarks import context


def test_answers_stand_in_the_text_before_them(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    rows = batch(tokenizer, random.Random(1), 9)
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        text, _, asked = tokenizer.decode(ids).rpartition(" . ")
        told = {(words[0], words[-1]) for words in map(str.split, text.split(" . "))}
        questions = [question.split() for question in asked.split(" </s>")[:-1]]
        assert len(text.split(" . ")) == 9
        assert all((next(word for word in words if word in PEOPLE), words[-1]) in told for words in questions)
        answers = " ".join(f"{words[-1]} </s>" for words in questions)
        assert tokenizer.decode(labels[labels != IGNORED]) == answers


def test_two_layers_start_out_as_readers(tmp_path: Path) -> None:
    """They say a third of what nine texts tell before they are trained: by chance it would be a thirtieth."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(tmp_path)
    model, rows = build(tokenizer), batch(tokenizer, random.Random(1), FEWEST)
    with torch.no_grad():
        before = right(model(**rows).logits, rows["labels"], tokenizer.eos_token_id)
        prepare(model, tokenizer)
        after = right(model(**rows).logits, rows["labels"], tokenizer.eos_token_id)
    assert before < 0.1 < 0.25 < after


def test_a_text_of_512_tokens_tells_each_fact_once() -> None:
    facts = context.text_of(1)
    assert 508 < sum(len(fact.told().split()) for fact in facts) <= 512
    assert len({(fact.name, fact.about) for fact in facts}) == len(facts)
    assert context.text_of(1) == facts != context.text_of(2)
    for fact in facts:
        assert f"{fact.begun()} {fact.value} ." == fact.told()
        assert fact.value not in fact.asked().split()


@pytest.mark.slow
def test_a_prefix_of_32_keeps_what_512_tokens_say(tmp_path: Path) -> None:
    assert train(tmp_path / "reader") > 0.95
    ways = ["with the text", "without it", "PrefixTuning"]
    with_text, without, kept = context.runs(str(tmp_path / "reader"), 1, context.STEPS, ways, tmp_path / "runs")
    assert without["asked"] < 0.3
    assert kept["asked"] >= context.BOUND * with_text["asked"]
