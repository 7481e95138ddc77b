"""CTRL's control codes: the first word of every text and window; which code a text came from; penalised sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from lightning_peft import TuningError
from lightning_peft.data import CausalLMData, TextClassificationData
from lightning_peft.tasks import PromptedClassification, PromptedGeneration
from tests import models, text
from tests.modules import trainer
from tests.valley import set_up

CODE = "who"
"""A word of the vocabulary, as CTRL asks of a code."""


@pytest.fixture(scope="module")
def gpt2(valley: Any) -> str:
    return valley("gpt2")


def coded(model: str, **kwargs: Any) -> CausalLMData:
    defaults = {"dataset": "made://opinions", "prefix": f"{CODE} ", "batch_size": 4, "max_length": 64}
    return CausalLMData(tokenizer=model, **defaults | kwargs)


def test_the_code_is_first_in_every_text(gpt2: str) -> None:
    data = set_up(coded(gpt2), "fit", "test")
    (code,) = data.tokenizer(CODE)["input_ids"]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert batch["input_ids"][:, 0].eq(code).all()
            assert batch["labels"][:, 0].eq(-100).all()  # p(x | c): nothing is trained to say the code
            assert batch["labels"][:, 1].ne(-100).all()


def test_the_code_is_first_in_every_text_of_a_window(gpt2: str) -> None:
    data = set_up(coded(gpt2, packing=True))
    (code,) = data.tokenizer(CODE)["input_ids"]
    plain = set_up(coded(gpt2, prefix="", packing=True))
    texts = 0
    for batch in data.train_dataloader():
        assert batch["input_ids"][:, 0].eq(code).all()
        starts = batch["position_ids"].eq(0) & batch["labels"].roll(-1, 1).ne(-100)  # what has no label is padding
        assert batch["input_ids"][starts].eq(code).all()
        assert batch["labels"][starts].eq(-100).all()
        texts += int(starts.sum())
    assert texts == len(data.rows("train")) == len(plain.rows("train"))


def test_a_tokenizer_with_a_beginning_has_it_in_front(tmp_path: Path) -> None:
    model = str(models.save_tokenizer(tmp_path))
    rows = text.write(tmp_path / "train.jsonl", text.sentences(40))
    data = set_up(CausalLMData(tokenizer=model, train=rows, prefix="river ", max_length=16, packing=True))
    opening = [data.tokenizer.bos_token_id, data.tokenizer.convert_tokens_to_ids("river")]
    assert all(row[:2] == opening for batch in data.train_dataloader() for row in batch["input_ids"].tolist())


def test_a_cut_prompt_keeps_its_code(gpt2: str, tmp_path: Path) -> None:
    long = " ".join(["the soup in berg was good ."] * 10)
    (tmp_path / "predict.jsonl").write_text("".join(json.dumps({"p": words}) + "\n" for words in (long, "the soup")))
    files = {"dataset": None, "predict": str(tmp_path / "predict.jsonl")}
    data = set_up(coded(gpt2, prompt="p", separator="", max_length=12, bucket=False, **files), "predict")
    (batch,) = data.predict_dataloader()
    (code,) = data.tokenizer(CODE)["input_ids"]
    whole = data.tokenizer(f"{CODE} {long}")["input_ids"]
    assert batch["input_ids"][0].tolist() == [code, *whole[-11:]]
    short = batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()
    assert short == data.tokenizer(f"{CODE} the soup")["input_ids"]
    longer = coded(gpt2, prompt="p", prefix=f"{CODE} " * 12, max_length=12, **files)
    with pytest.raises(TuningError, match="a prefix of 12 tokens leaves no room for its prompt: raise max_length"):
        set_up(longer, "predict")


def test_texts_are_attributed_to_the_code_that_makes_them_likeliest(gpt2: str, tmp_path: Path) -> None:
    codes = {"bad": "does", "good": "who"}
    data = TextClassificationData(tokenizer=gpt2, dataset="made://opinions", batch_size=8, bucket=False)
    task = PromptedClassification(gpt2, "{answer} {text}", words=codes, normalise="pmi")
    (batch, *_) = trainer(tmp_path, limit_predict_batches=1).predict(task, data)
    model, tokens = AutoModelForCausalLM.from_pretrained(gpt2).eval(), data.tokenizer
    rows = data.rows("test")["text"][:8]
    assert len(batch["answer"]) == 8
    for words, scores, answer in zip(rows, batch["scores"], batch["answer"], strict=True):
        found = {}
        for label, code in codes.items():
            ids = torch.tensor([[tokens.eos_token_id, *tokens(f"{code} {words}")["input_ids"]]])
            with torch.no_grad():
                likely = model(ids).logits[0, 1:-1].log_softmax(-1)  # of the text, behind the code
            found[label] = likely.gather(1, ids[0, 2:].unsqueeze(1)).sum()
        wanted = torch.stack(list(found.values())).log_softmax(0)
        torch.testing.assert_close(torch.tensor(list(scores.values())), wanted, atol=1e-4, rtol=0)
        assert answer == max(found, key=lambda label: found[label])


def asked(model: str, penalty: float, **kwargs: Any) -> PromptedGeneration:
    defaults = {"target": "label", "max_new_tokens": 12, "repetition_penalty": penalty, "answer": "text"}
    return PromptedGeneration(model, "{text} it is {answer}", **defaults | kwargs)


def answers(task: PromptedGeneration, model: str, folder: Path, size: int = 8) -> list[str]:
    data = TextClassificationData(tokenizer=model, dataset="made://opinions", batch_size=size, bucket=False)
    found = trainer(folder, limit_predict_batches=8 // size).predict(task, data)
    assert found is not None
    return [path[0] for batch in found for path in batch["text"]]


def test_a_negative_logit_is_punished_too() -> None:
    punish = RepetitionPenaltyLogitsProcessor(1.2)
    logits = torch.tensor([[-2.0, 2.0, 0.5]])
    for token in (0, 1):
        after = punish(torch.tensor([[token]]), logits.clone())
        assert after.softmax(1)[0, token] < logits.softmax(1)[0, token]
        assert after[0, 2] == 0.5


def test_a_penalty_of_one_changes_nothing(gpt2: str, tmp_path: Path) -> None:
    task = asked(gpt2, 1.0)
    calls = []
    generate = task.backbone.generate
    task.backbone.generate = lambda **how: calls.append(how) or generate(**how)
    assert answers(task, gpt2, tmp_path) == answers(asked(gpt2, 1), gpt2, tmp_path)
    assert calls
    assert not any("logits_processor" in how for how in calls)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_what_was_written_is_punished_and_the_prompt_is_not(kind: str, valley: Any, tmp_path: Path) -> None:
    model = valley(kind)
    task = asked(model, 1e6)
    written = answers(task, model, tmp_path)
    plain = answers(asked(model, 1.0), model, tmp_path)
    assert any(repeats(task, words) for words in plain)
    assert not any(repeats(task, words) for words in written)
    for before, after in zip(plain, written, strict=True):  # the first token is as likely as it was
        first = [task.tokenizer(words, add_special_tokens=False)["input_ids"][:1] for words in (before, after)]
        assert first[0] == first[1]
    assert answers(asked(model, 1.3), model, tmp_path) == answers(asked(model, 1.3), model, tmp_path, size=2)


def repeats(task: PromptedGeneration, words: str) -> bool:
    ids = task.tokenizer(words, add_special_tokens=False)["input_ids"]
    return len(set(ids)) < len(ids)


def test_a_penalty_below_one_is_refused(gpt2: str) -> None:
    with pytest.raises(TuningError, match=r"repetition_penalty=0.5 rewards repetition: take 1 \(none\) or more"):
        asked(gpt2, 0.5)
