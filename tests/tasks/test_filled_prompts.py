"""Templates and label words as LM-BFF finds them: what is likeliest for all training rows together."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_peft import TuningError, search_prompts
from lightning_peft.core.hub import load_tokenizer
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import PromptedClassification
from lightning_peft.tasks.filled_prompts import Filler, _few, filled_prompts
from lightning_peft.tasks.label_words import label_words
from tests.modules import trainer

Valley = Callable[[str], str]
ROWS = [("the soup was dull", "bad"), ("the fish was not bad", "good"), ("a lovely cake", "good")] * 2
WORDS: dict[str, str | list[str]] = {"bad": "bad", "good": "good"}


def asked(model: str, folder: Path, template: str, rows: Any = ROWS) -> tuple[PromptedClassification, Any]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "more": "ana", "label": label}) for text, label in rows))
    files = {split: str(path) for split in ("train", "validation", "test")}
    return PromptedClassification(model, template, words=WORDS), TextClassificationData(tokenizer=model, **files)


@pytest.fixture(scope="module")
def filler(valley: Valley) -> Filler:
    """A tiny T5 that likes to end a gap after some words, as a trained one does."""
    tokenizer = load_tokenizer(valley("t5"))
    model = hf.T5ForConditionalGeneration.from_pretrained(valley("t5")).eval()
    found = Filler(model, tokenizer)
    head = torch.nn.Linear(model.config.d_model, model.config.vocab_size)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[found.gaps] = torch.tensor([0.0, 5.0, 6.0])
    model.lm_head = head
    return found


def test_the_score_of_words_is_that_of_all_rows(filler: Filler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each score is computed anew, one row at a time."""
    sources = [filler.source(text, answer, "") for text, answer in ROWS[:3]]
    monkeypatch.setattr("lightning_peft.tasks.filled_prompts.LONGEST", 6)
    found = filler.fill(sources, 8)
    assert len(found) > 2
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert max(len(one.before) + len(one.behind) for one in found) > 0

    def score(words: list[int]) -> float:
        targets, total = [*words], 0.0
        for ids in sources:
            given = torch.tensor([[filler.model.config.decoder_start_token_id, *words[:-1]]])
            with torch.no_grad():
                logits = filler.model(input_ids=torch.tensor([ids]), decoder_input_ids=given).logits[0]
            total += float(logits.log_softmax(-1)[range(1, len(targets)), targets[1:]].sum())
        return total / len(sources)

    opening, second, third = filler.gaps
    for one in found[:3]:
        ends = [[opening, *one.before, second, *one.behind, end] for end in (third, filler.tokenizer.eos_token_id)]
        assert one.score in [pytest.approx(score(words), abs=1e-4) for words in ends]
    assert found[0].score >= score([opening, second, third]) - 1e-5, "the empty template is one of them"
    assert all(token not in filler.gaps for one in found for token in (*one.before, *one.behind))
    assert all(len(one.before) + len(one.behind) + 2 <= 6 for one in found)


def test_a_t5_writes_the_words_between_text_and_answer(
    filler: Filler, valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_peft.tasks.filled_prompts.load_model", lambda *given, **how: filler.model)
    monkeypatch.setattr("lightning_peft.tasks.filled_prompts.LONGEST", 4)
    writer = valley("t5")
    task, data = asked(valley("bert"), tmp_path, "{text} {mask}")
    texts = filled_prompts(task, data, "{text} {mask}", 6, writer)
    assert {text.startswith("{text}") for text in texts} == {True, False}, "behind the text and before it"
    assert all("{mask}" in text for text in texts)
    texts = filled_prompts(task, data, "{text} {mask} {more}", 6, writer)
    assert texts
    assert all(text.startswith("{text}") and text.endswith("{more}") and "{mask}" in text for text in texts)
    assert filler.said(filler.tokenizer("was good .", add_special_tokens=False)["input_ids"]) == " was good ."
    with pytest.raises(TuningError, match="fills no gaps of <extra_id_0>: give writer= the folder or hub id of a T5"):
        filled_prompts(task, data, "{text} {mask}", 3, None)
    texts = filled_prompts(task, data, "{text} {answer}", 6, writer)
    assert all(text.startswith("{text}") and text.endswith(" {answer}") for text in texts), "nothing behind an answer"
    with pytest.raises(TuningError, match="has 3 fields: give the task such a template"):
        filled_prompts(task, data, "{text} {more} {label} {mask}", 3, writer)
    with pytest.raises(TuningError, match=r"with \{mask\} for the answer, between two, and .* has 2 fields"):
        filled_prompts(task, data, "{text} {more} {answer}", 3, writer)


def test_some_rows_of_each_answer_are_read() -> None:
    rows: list[Any] = [({"text": str(number)}, "good" if number % 5 else "bad") for number in range(200)]
    kept = _few(rows, 0)
    assert Counter(answer for _, answer in kept) == {"good": 16, "bad": 16}
    assert all(row in rows for row in kept)
    assert _few(rows, 1) != kept, "drawn by the seed"
    assert len(_few([(row, str(number)) for number, (row, _) in enumerate(rows)], 0)) == 64


@pytest.mark.slow
def test_the_best_filled_template_wins(
    filler: Filler, valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_peft.tasks.filled_prompts.load_model", lambda *given, **how: filler.model)
    task, data = asked(valley("bert"), tmp_path, "{text} {mask}")
    found = search_prompts(task, data, "fill", 7, trainer=trainer(tmp_path), writer=valley("t5"))
    assert [one.how for one in found.tried] == ["given", *["fill"] * (len(found.tried) - 1)]
    assert 3 < len(found.tried) <= 7
    assert task.templates[0].text == found.best.template


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("bert", "{text} it was {mask} ."),
        pytest.param("gpt2", "{text} it was {answer}", marks=pytest.mark.slow),
    ],
)
def test_words_that_tell_the_training_rows_apart_come_first(
    kind: str, template: str, valley: Valley, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_peft.tasks.label_words.LIKELY", 6)
    task, data = asked(valley(kind), tmp_path, template)
    found = label_words(task, data, 40)
    every, tokens = [], task.tokenizer
    with torch.no_grad():
        for text, answer in ROWS:
            ids = tokens(template.format(text=text, mask="[MASK]", answer="").rstrip())["input_ids"]
            place = ids.index(tokens.mask_token_id) if kind == "bert" else -1
            logits = task.backbone(input_ids=torch.tensor([ids])).logits[0, place]
            every.append((logits.log_softmax(-1), ["bad", "good"].index(answer)))
    lead = "" if kind == "bert" else " "
    ids_of = {w: tokens(lead + w, add_special_tokens=False)["input_ids"] for one in found for w in one.values()}
    assert all(len(ids) == 1 for ids in ids_of.values())

    def right(words: dict[str, str]) -> int:
        numbers = [ids_of[words[label]][0] for label in ("bad", "good")]
        return sum(int(scores[numbers].argmax()) == label for scores, label in every)

    counts = [right(words) for words in found]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) > 20
    kept = {label: {one[label] for one in found} for label in ("bad", "good")}
    assert max(counts) == max(right({"bad": a, "good": b}) for a, b in product(*kept.values()) if a != b)
    for number, label in enumerate(("bad", "good")):
        own = sum(scores for scores, which in every if which == number)
        told = ((i, tokens.decode([i]).strip()) for i in own.argsort(descending=True).tolist())
        whole = [w for i, w in told if w.isalpha() and tokens(lead + w, add_special_tokens=False)["input_ids"] == [i]]
        assert kept[label] <= {*whole[:6]}, "the likeliest of each label"


def test_the_best_words_go_to_the_task_and_the_file(valley: Valley, tmp_path: Path) -> None:
    task, data = asked(valley("bert"), tmp_path, "{text} {mask} .")
    found = search_prompts(task, data, "words", 3, trainer=trainer(tmp_path))
    assert [one.how for one in found.tried] == ["given", "words", "words"]
    assert found.best.words is not None, "words chosen on these very rows are better than words of an untrained model"
    assert task.prompts.options == list(found.best.words.values())
    again = PromptedClassification(valley("bert"), str(found.save(tmp_path / "best.yaml", {"bad": "x", "good": "y"})))
    assert again.prompts.options == task.prompts.options
    again_score = trainer(tmp_path).validate(again, data, verbose=False)[0]["val_accuracy"]
    assert again_score == pytest.approx(found.best.score)
    trace = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert "words" not in trace[0]
    assert trace[1]["words"] == found.tried[1].words
    with pytest.raises(TuningError, match="how='words' is for masked and causal language models: take how='edits'"):
        label_words(asked(valley("t5"), tmp_path, "{text} {answer}")[0], data, 3)
