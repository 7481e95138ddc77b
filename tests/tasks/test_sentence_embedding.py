"""Embeddings: losses against their formulas, recall and rank correlation, and what is wrong with pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lightning_peft import LoRA, Method, PromptTuning, SentenceEmbedding, SentencePairsData, TuningError
from lightning_peft.tasks.retrieval_metrics import Recall, Spearman
from tests.contract import assert_near
from tests.modules import trainer
from tests.processes import TORCHRUN, run_module
from tests.tasks import embedding_two_processes
from tests.valley import set_up

Valley = Callable[[str], str]
ROWS = [
    {"anchor": "where does anmar live ?", "positive": "anmar lives in lund .", "no": "anmar likes rice .", "s": 0.9},
    {"anchor": "what does bemar keep ?", "positive": "bemar keeps a dog .", "no": "bemar keeps a hen .", "s": 0.1},
    {"anchor": "what does cora like ?", "positive": "cora likes plums .", "no": "the road .", "s": 0.5},
    {"anchor": "who likes cheese ?", "positive": "anlin likes cheese .", "no": "red .", "s": 0.5},
]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(valley: Valley, file: str, kind: str = "bert", **kwargs: Any) -> dict[str, Any]:
    shares = {"validation_share": 0, "test_share": 0, "bucket": False}
    data = SentencePairsData(tokenizer=valley(kind), train=file, validation=file, **shares | kwargs)
    set_up(data)
    return next(iter(data.val_dataloader()))


def vector(task: SentenceEmbedding, text: str, pool: str) -> Tensor:
    ids = task.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = task.backbone(input_ids=ids).last_hidden_state[0]
    one = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pool]
    return one / one.norm()


@pytest.mark.parametrize(("kind", "pool"), [("bert", "mean"), ("bert", "first"), ("gpt2", "last")])
def test_infonce_is_the_formula(kind: str, pool: Any, valley: Valley, tmp_path: Path) -> None:
    task = SentenceEmbedding(valley(kind), pool=pool, scale=7.0, symmetric=True).eval()
    prompts = {"anchor_prompt": "ask : ", "positive_prompt": "say : "}
    batch = read(valley, write(tmp_path, ROWS), kind, negative="no", **prompts)
    anchors, positives, negatives = (
        torch.stack([vector(task, start + row[name], pool) for row in ROWS])
        for start, name in (("ask : ", "anchor"), ("say : ", "positive"), ("say : ", "no"))
    )
    torch.testing.assert_close(task(batch), torch.cat([anchors, positives, negatives]), atol=1e-5, rtol=1e-4)
    losses = []
    for i in range(4):
        every = torch.cat([positives, negatives]) @ anchors[i] * 7
        back = anchors @ positives[i] * 7
        losses += [(every.exp().sum().log() - every[i]) / 2, (back.exp().sum().log() - back[i]) / 2]
    assert task.loss(batch).item() == pytest.approx(float(torch.stack(losses).sum() / 4), rel=1e-4)
    assert int(task.counted(batch)) == task.rows_in(batch) == 4


def test_cosent_is_the_formula(valley: Valley, tmp_path: Path) -> None:
    task = SentenceEmbedding(valley("bert"), objective="cosent", scale=5.0).eval()
    batch, total = read(valley, write(tmp_path, ROWS), score="s"), 1.0
    cosines = [float(vector(task, row["anchor"], "mean") @ vector(task, row["positive"], "mean")) for row in ROWS]
    for i, row in enumerate(ROWS):
        for j, other in enumerate(ROWS):
            if row["s"] > other["s"]:
                total += torch.tensor(5 * (cosines[j] - cosines[i])).exp().item()
    assert task.loss(batch).item() == pytest.approx(torch.tensor(total).log().item(), rel=1e-4)
    batch["scores"] = torch.ones(4)
    assert task.loss(batch).item() == 0


def test_metrics_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    anchors, positives = (torch.nn.functional.normalize(torch.randn(30, 4), dim=1) for _ in range(2))
    recall, rank = Recall(), Spearman()
    for start in (0, 13):
        rows = slice(start, 13 if start == 0 else None)
        recall.update(anchors[rows], positives[rows])
        rank.update((anchors * positives).sum(1)[rows], torch.arange(30.0)[rows])
    orders = (anchors @ positives.T).argsort(1, descending=True).tolist()
    for k in (1, 5):
        expected = sum(i in order[:k] for i, order in enumerate(orders)) / 30
        assert recall.compute()[f"recall_at_{k}"].item() == pytest.approx(expected)
    expected = spearmanr((anchors * positives).sum(1), torch.arange(30.0)).statistic
    assert rank.compute().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", [LoRA(r=8), PromptTuning(num_virtual_tokens=4, init="random_uniform")])
def test_pairs_are_learned(method: Method, valley: Valley, tmp_path: Path) -> None:
    data = SentencePairsData(tokenizer=valley("bert"), dataset="made://matches", batch_size=32)
    task = SentenceEmbedding(valley("bert"), lr=3e-2)
    run = trainer(tmp_path, type(method)(**method.init_args()), max_epochs=5, check_val_every_n_epoch=5)
    before = run.validate(task, data, verbose=False)[0]["val_recall_at_1"]
    run.fit(task, data)
    assert run.callback_metrics["val_recall_at_1"] > before + 0.1
    found = run.predict(task, data)
    assert len(found[0]["embedding"]) == 32
    assert len(found[0]["embedding"][0]) == 32


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "empty": ({"anchor": " "}, {}, "has ' ' in column 'anchor': give a text"),
    "same": ({"positive": ROWS[0]["anchor"]}, {}, "has the same text in columns 'anchor' and 'positive': leave"),
    "negative": ({"no": ROWS[0]["positive"]}, {"negative": "no"}, "the same text in columns 'positive' and 'no'"),
    "score": ({"s": None}, {"score": "s"}, "has None in column 's': give a number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_pairs_are_named_by_number(name: str, valley: Valley, tmp_path: Path) -> None:
    change, arguments, message = MISTAKES[name]
    file = write(tmp_path, [ROWS[1], {**ROWS[0], **change}])
    with pytest.raises(TuningError, match=f"^row 2 of the train split .*{message}"):
        read(valley, file, **arguments)
    with pytest.warns(UserWarning, match="1 of 2 rows of the (train|validation) split are left out"):
        assert len(read(valley, file, skip_bad_rows=True, **arguments)["input_ids"]) == (
            3 if "negative" in arguments else 2
        )


def test_what_does_not_fit_together(valley: Valley, tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    data = SentencePairsData(tokenizer=valley("bert"), train=file, score="s", validation_share=0)
    with pytest.raises(TuningError, match="the data have scores, objective=infonce is not for them: take cosent"):
        trainer(tmp_path, LoRA(r=2)).fit(SentenceEmbedding(valley("bert")), data)
    with pytest.raises(TuningError, match="negative='no' and score='s' are of two kinds of rows"):
        SentencePairsData(tokenizer=valley("bert"), negative="no", score="s")
    with pytest.raises(TuningError, match=r"scale=0\.0 is out of range"):
        SentenceEmbedding(valley("bert"), scale=0.0)
    with pytest.raises(TuningError, match="symmetric=True is for objective=infonce"):
        SentenceEmbedding(valley("bert"), objective="cosent", symmetric=True)
    with pytest.raises(TuningError, match="is an encoder-decoder: embeddings need an encoder or a decoder alone"):
        SentenceEmbedding(valley("t5"))


@pytest.mark.slow
def test_negatives_of_two_processes_are_those_of_one(valley: Valley, tmp_path: Path) -> None:
    run_module("tests.tasks.embedding_two_processes", valley("bert"), tmp_path, folder=tmp_path, before=TORCHRUN)
    two = torch.load(tmp_path / "two.pt")
    assert_near(two, embedding_two_processes.step(valley("bert"), tmp_path, 1), 2e-6)
