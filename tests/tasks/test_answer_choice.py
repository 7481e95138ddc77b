"""Choices among answers that a model could write: T-Few's losses against their formulas, and what uses them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_peft import IA3, AnswerChoice, AnswerChoiceData, Method, MultipleChoiceData, PromptTuning, TuningError
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
ROWS = [
    {"context": "ana was wet .", "question": "why ?", "options": ["it was blue .", "rain", "the dog"], "label": "B"},
    {"context": "bea keeps a dog .", "question": "what ?", "options": ["a dog .", "a hen"], "label": 0},
    {"context": "who ?", "question": "ana or bea ?", "options": ["bea went to lund .", "ana"], "label": "ana"},
]
STYLES = {"t5": "seq2seq", "gpt2": "causal"}


def of_rows(folder: Path, model: str, rows: Any = ROWS, **kwargs: Any) -> AnswerChoiceData:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    files = {split: str(path) for split in ("train", "validation", "test")}
    return AnswerChoiceData(tokenizer=model, max_length=48, bucket=False, **files | kwargs)


def first(data: AnswerChoiceData) -> dict[str, Any]:
    return next(iter(set_up(data).val_dataloader()))


def sharp(task: AnswerChoice) -> AnswerChoice:
    """Return a task whose model finds the words of a wrong answer likely; an untrained one finds none."""
    head = task.backbone.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features)
    biased.weight = head.weight
    with torch.no_grad():
        biased.bias.zero_()
        biased.bias[task.tokenizer(f" {ROWS[0]['options'][0]}", add_special_tokens=False)["input_ids"]] = 7.0
    task.backbone.set_output_embeddings(biased)
    return task.eval()


def alone(task: AnswerChoice, row: dict[str, Any]) -> list[list[float]]:
    """Return log p of the tokens of each answer of a row, each computed without padding."""
    found, question = [], f"{row['context']} {row['question']}"
    tokens = task.tokenizer
    for option in row["options"]:
        if task.style == "seq2seq":
            ids, target = tokens(question)["input_ids"], tokens(option)["input_ids"]
            start = task.backbone.config.decoder_start_token_id
            given = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
            logits = task.backbone(**given).logits[0]
        else:
            ids, target = tokens(question)["input_ids"], [*tokens(f" {option}")["input_ids"], tokens.eos_token_id]
            logits = task.backbone(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
        found.append([float(own.log_softmax(0)[token]) for own, token in zip(logits, target, strict=True)])
    return found


@pytest.mark.parametrize("kind", STYLES)
def test_losses_and_scores_are_those_of_the_formulas(kind: str, valley: Valley, tmp_path: Path) -> None:
    task = sharp(AnswerChoice(valley(kind), choice_loss=0.5, unlikelihood=2.0))
    batch = first(of_rows(tmp_path, valley(kind), style=STYLES[kind]))
    right = [1, 0, 1]
    assert batch["right"].tolist() == right
    with torch.no_grad():
        loss, scores = task.loss(batch).item(), task(batch)
        likely = [alone(task, row) for row in ROWS]
    means = [[sum(own) / len(own) for own in row] for row in likely]
    for row, own in zip(scores, means, strict=True):
        assert row[: len(own)].tolist() == pytest.approx(own, abs=1e-4)
        assert row[len(own) :].isinf().all()
    said = [token for row, r in zip(likely, right, strict=True) for token in row[r]]
    wrong = [t for row, r in zip(likely, right, strict=True) for i, own in enumerate(row) if i != r for t in own]
    lm = -sum(said) / len(said)
    ln = sum(math.log(sum(map(math.exp, row))) - row[r] for row, r in zip(means, right, strict=True)) / 3
    ul = -sum(math.log(1 - math.exp(token) + 0.01) for token in wrong) / len(wrong)
    assert loss == pytest.approx(lm + 0.5 * ln + 2 * ul, rel=1e-4)
    task.unlikelihood = 0.0
    assert loss - task.loss(batch).item() == pytest.approx(2 * ul, abs=1e-4)
    assert 2 * ul > 0.05
    task.length_norm = 0.0
    assert task(batch)[0, 0].item() == pytest.approx(sum(likely[0][0]), rel=1e-4)


def test_gradients_are_those_of_the_authors_formula(valley: Valley, tmp_path: Path) -> None:
    """Theirs, of logits [B, C, L, V], counts padding and right tokens in the unlikelihood: a constant apart."""
    rows = [{**ROWS[0], "options": ROWS[0]["options"][:2]}, *ROWS[1:]]
    task = sharp(AnswerChoice(valley("t5")))
    batch = first(of_rows(tmp_path, valley("t5"), rows))
    task.loss(batch).backward()
    own = {name: p.grad.clone() for name, p in task.backbone.named_parameters() if p.grad is not None}
    task.zero_grad()
    ids = batch["labels"].clamp(min=0)
    target = batch["labels"].unflatten(0, (3, 2))
    start = torch.cat([torch.full_like(ids[:, :1], task.backbone.config.decoder_start_token_id), ids[:, :-1]], 1)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = task.backbone(**given, decoder_input_ids=start).logits.unflatten(0, (3, 2))
    cost = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
    every, right = torch.arange(3), batch["right"]
    lm = F.cross_entropy(logits[every, right].flatten(0, 1), target[every, right].flatten())
    mc = F.cross_entropy(-cost.sum(-1) / (target != -100).sum(-1), right)
    likely = -cost - 100 * (target < 0)
    likely[every, right] = -100
    unlikely = -torch.log(1 - likely.exp() + 1e-2).sum() / (likely != -100).sum()
    (lm + mc + unlikely).backward()
    assert len(own) > 20
    for name, parameter in task.backbone.named_parameters():
        if name in own:
            torch.testing.assert_close(own[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("t5", IA3()),
        ("gpt2", PromptTuning(num_virtual_tokens=3)),
        pytest.param("t5", PromptTuning(num_virtual_tokens=3), marks=pytest.mark.slow),
    ],
)
def test_methods_train_on_it(kind: str, method: Method, valley: Valley, tmp_path: Path) -> None:
    foods = ["rice", "soup", "fish", "cake"]
    rows = [{"text": f"ana eats {foods[i % 4]} .", "label": ("yes", "no")[i % 2]} for i in range(16)]
    kwargs = {"template": "{text} soup ?", "words": {"yes": "it is good", "no": "bad"}, "style": STYLES[kind]}
    data = of_rows(tmp_path, valley(kind), rows, batch_size=8, **kwargs)
    task, own = AnswerChoice(valley(kind), lr=5e-2), type(method)(**method.init_args())
    run = trainer(tmp_path, own, max_epochs=3)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    assert run.callback_metrics["val_loss"] < before["val_loss"]
    assert run.test(task, data, verbose=False)[0].keys() == {"test_loss", "test_accuracy"}
    (answers,) = trainer(tmp_path, own, limit_predict_batches=1).predict(task, data)
    assert set(answers["answer"]) <= {"A", "B"}
    assert sum(answers["probabilities"][0]) == pytest.approx(1, abs=1e-5)


def test_mistakes(valley: Valley, tmp_path: Path) -> None:
    model = valley("t5")
    for arguments, message in (
        ({"template": "{text} {mask} ."}, "goes on behind the answer: end it with {answer}, or leave that out"),
        ({"words": {"yes": "yes"}}, "leave no choice: give two labels or more"),
    ):
        with pytest.raises(TuningError, match=message):
            AnswerChoiceData(tokenizer=model, **arguments)
    AnswerChoiceData(tokenizer=model, template="{text} {answer}", words={"yes": "yes", "no": "no"})
    with pytest.raises(TuningError, match=r"label 'B' has no words: add it to words=, which has yes, no\."):
        first(of_rows(tmp_path, model, words={"yes": "yes", "no": "no"}))
    with pytest.raises(TuningError, match="length_norm=-1 is out of range: take 0 or more"):
        AnswerChoice(model, length_norm=-1)
    task = AnswerChoice(model)
    with pytest.raises(TuningError, match="for a causal language model, this one is seq2seq: set style='seq2seq'"):
        task.check_data(AnswerChoiceData(tokenizer=model, style="causal"), "fit")
    with pytest.raises(TuningError, match="MultipleChoiceData has no answers to choose from: use AnswerChoiceData"):
        task.check_data(MultipleChoiceData(tokenizer=model), "fit")
    task.check_data(AnswerChoiceData(tokenizer=model, style="seq2seq"), "fit")
