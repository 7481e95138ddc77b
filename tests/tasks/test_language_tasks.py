"""What each task computes, against the formula, one row at a time, or the same without a method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft import (
    IA3,
    BitFit,
    CausalLM,
    CausalLMData,
    ClozeClassification,
    ClozeClassificationData,
    FullFineTuning,
    KnowledgeProbing,
    KnowledgeProbingData,
    LinearProbe,
    LoRA,
    Method,
    MultiTask,
    MultiTaskData,
    PrefixTuning,
    PromptTuning,
    QuestionAnswering,
    QuestionAnsweringData,
    Seq2Seq,
    Seq2SeqData,
    TokenClassification,
    TokenClassificationData,
    TuningError,
    activate,
    muted,
    remove_delta,
)
from lightning_peft.tasks.optimizer import shapes_of
from tests import models
from tests.contract import shake
from tests.modules import trainer
from tests.valley import set_up

Valley = Callable[[str], str]
PROMPT = PromptTuning(num_virtual_tokens=4, init="random_uniform")
WORDS = {"bad": ["bad"], "good": ["good"]}
SENTENCES = {"form": {"dataset": "made://sentences", "label": "form"}, "opinion": {"dataset": "made://opinions"}}


def tags(valley: Valley, **kwargs: Any) -> tuple[TokenClassification, TokenClassificationData]:
    data = TokenClassificationData(tokenizer=valley("bert"), dataset="made://tags", **kwargs)
    return TokenClassification(valley("bert"), data.label_names, lr=1e-2), data


def first(data: L.LightningDataModule) -> dict[str, Any]:
    set_up(data)
    return next(iter(data.val_dataloader()))


@pytest.mark.parametrize("method", [LoRA(r=8, target_modules="all-linear"), BitFit(), LinearProbe(), PROMPT])
def test_tagging_learns(method: Method, valley: Valley, tmp_path: Path) -> None:
    task, data = tags(valley)
    run = trainer(tmp_path, type(method)(**method.init_args()), max_epochs=2, limit_train_batches=30)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    assert run.callback_metrics["val_loss"] < 0.8 * before["val_loss"]
    logged = run.test(task, data, verbose=False)[0]
    assert logged.keys() == {f"test_{name}" for name in ("loss", "accuracy", "precision", "recall", "f1")}


def test_logits_are_those_of_the_text(valley: Valley) -> None:
    task, data = tags(valley)
    batch = first(data)
    with torch.no_grad():
        plain = task.eval()(batch)
        assert plain.shape == (*batch["input_ids"].shape, 6)
        method = PromptTuning(num_virtual_tokens=4, init="random_uniform")
        method.apply(task.backbone)
        wide = method.prepare(batch)
        assert wide["input_ids"].shape[1] == plain.shape[1] + 4
        assert task(wide).shape == plain.shape
        assert torch.equal(task.text_columns(wide["labels"], wide), batch["labels"])
        out = task.backbone(**task.inputs(wide)).logits
        assert torch.equal(task(wide), torch.cat([out[:, :1], out[:, 5:]], 1))


def test_predicted_tags(valley: Valley, tmp_path: Path) -> None:
    task, data = tags(valley)
    rows = [row for batch in trainer(tmp_path, PROMPT).predict(task, data) for row in batch["tags"]]
    words = data.rows("test")["tokens"]
    assert [len(row) for row in rows] == [len(row) for row in words]


def test_tags_of_no_scheme(valley: Valley) -> None:
    task = TokenClassification(valley("bert"), ["noun", "verb"])
    assert "spans" not in task.val_scores
    with pytest.raises(TuningError, match="'S-PER' is no tag of the BIO scheme, as 'B-PER' is"):
        TokenClassification(valley("bert"), ["O", "B-PER", "S-PER"])


def test_other_tags_in_the_data(valley: Valley, tmp_path: Path) -> None:
    _, data = tags(valley)
    with pytest.raises(TuningError, match=r"the data have 6 tags \(O, B-FOOD"):
        trainer(tmp_path).fit(TokenClassification(valley("bert"), ["O", "B-X"]), data)


@pytest.mark.parametrize("after", [0, 4])
def test_spans_are_those_of_the_text(after: int, valley: Valley) -> None:
    data = QuestionAnsweringData(tokenizer=valley("bert"), dataset="made://questions", batch_size=16)
    task = QuestionAnswering(valley("bert"), longest=3).eval()
    batch = first(data)
    plain = [place.clone() for place in task._places(batch)]
    if after:
        method = PromptTuning(num_virtual_tokens=after, init="random_uniform")
        method.apply(task.backbone)
        batch = dict(method.prepare(batch))
        assert torch.equal(batch["start_positions"], plain[0] + after)
    assert all(torch.equal(one, two) for one, two in zip(task._places(batch), plain, strict=True))
    with torch.no_grad():
        start, end = task(batch)
    assert start.shape == end.shape == (16, len(max(batch["offsets"], key=len)))
    perfect = [F.one_hot(place, start.shape[1]) * 50.0 for place in plain]
    texts, _ = task._answers(*perfect, batch)
    assert [[text] for text in texts] == batch["answers"]
    texts, sure = task._answers(start, end, batch)
    for i, text in enumerate(texts):  # the best span by trying all
        spans = batch["offsets"][i]
        inside = [k for k, span in enumerate(spans) if span]
        best = max((start[i, a] + end[i, b]).item() for a in inside for b in inside if a <= b < a + 3)
        assert sure[i] == pytest.approx(best - (start[i, 0] + end[i, 0]).item(), rel=1e-5, abs=1e-5)
        assert (text == "") == (sure[i] <= 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_texts_do_not_see_each_other(kind: str, valley: Valley, tmp_path: Path) -> None:
    folder = valley("gpt2")
    if kind == "llama":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        folder = str(tmp_path / "llama")
        models.hf.LlamaForCausalLM(
            models.hf.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            )
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    task = CausalLM(folder).eval()
    data = CausalLMData(tokenizer=folder, dataset="made://opinions", max_length=64, batch_size=2, packing=True)
    set_up(data)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        packed = task(batch)
        for row in range(2):
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], 64], strict=True):
                alone = task({"input_ids": batch["input_ids"][row : row + 1, start:end]})
                torch.testing.assert_close(packed[row, start:end], alone[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(TuningError, match="seen by the first text of a packed row alone: set packing=false"):
        task({**batch, "input_ids": batch["input_ids"] - 1000})


def test_validation_of_packed_rows(valley: Valley, tmp_path: Path) -> None:
    """Loss and perplexity are those of rows by themselves; from packed rows nothing is written."""
    path = valley("gpt2")
    how = {"tokenizer": path, "dataset": "made://descriptions", "prompt": "source", "separator": " = "}
    scores, rows = [], []
    for packing in (True, False):
        data = CausalLMData(**how, target="target", packing=packing, max_length=96)
        (found,) = trainer(tmp_path).validate(CausalLM(path), data, verbose=False)
        scores.append(found)
        rows.append(len(data._encoded["validation"]))
    assert rows[0] < rows[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    with pytest.raises(TuningError, match=r"cannot write from packed rows.*set packing=false, or generate=test"):
        trainer(tmp_path, limit_val_batches=1).validate(
            CausalLM(path, generate="validation and test"), CausalLMData(**how, target="target", packing=True)
        )


def test_perplexity(valley: Valley, tmp_path: Path) -> None:
    arguments = {"dataset": "made://descriptions", "prompt": "source", "target": "target"}
    data = CausalLMData(tokenizer=valley("gpt2"), batch_size=16, **arguments)
    task = CausalLM(valley("gpt2"))
    (logged,) = trainer(tmp_path, limit_test_batches=2).test(task, data, verbose=False)
    plain, total, count = AutoModelForCausalLM.from_pretrained(valley("gpt2")), 0.0, 0
    for number, batch in enumerate(data.test_dataloader()):
        if number < 2:
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                ids, labels = ids[mask == 1], labels[mask == 1]
                with torch.no_grad():
                    logits = plain(ids.unsqueeze(0)).logits[0, :-1].log_softmax(1)
                for step, label in enumerate(labels[1:].tolist()):
                    if label != -100:
                        total, count = total - logits[step, label].item(), count + 1
    assert logged["test_loss"] == pytest.approx(total / count, rel=1e-4)
    assert logged["test_perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-3)


@pytest.mark.parametrize("method", [None, PROMPT])
def test_texts_are_those_of_each_row_alone(method: Method | None, valley: Valley) -> None:
    arguments = {"dataset": "made://descriptions", "prompt": "source", "target": "target", "separator": " = "}
    data = CausalLMData(tokenizer=valley("gpt2"), batch_size=6, **arguments)
    task = CausalLM(valley("gpt2"), max_new_tokens=5).eval()
    batch = first(data)
    if method is not None:
        method = PromptTuning(**method.init_args())
        method.apply(task.backbone)
    prepared = batch if method is None else method.prepare(batch)
    texts = task.write(task.prompts(prepared))
    assert len(texts) == 6
    for i, text in enumerate(texts):
        place = int((batch["labels"][i] != -100).int().argmax())
        alone = {name: batch[name][i : i + 1, :place] for name in ("input_ids", "attention_mask")}
        assert task.write(alone if method is None else task.inputs(method.prepare(alone))) == [text]
    with pytest.raises(TuningError, match="no token before its target to write from"):
        task.prompts({**batch, "labels": batch["input_ids"]})


@pytest.mark.parametrize("method", [LoRA(r=4), PROMPT])
def test_seq2seq_learns_and_writes(method: Method, valley: Valley, tmp_path: Path) -> None:
    data = Seq2SeqData(tokenizer=valley("t5"), dataset="made://descriptions")
    task = Seq2Seq(valley("t5"), max_new_tokens=4, num_beams=2, lr=2e-2)
    run = trainer(
        tmp_path, type(method)(**method.init_args()), max_epochs=1, limit_train_batches=30, limit_val_batches=1
    )
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    names = ("loss", "perplexity", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match")
    assert before.keys() == {f"val_{name}" for name in names}
    assert run.callback_metrics["val_loss"] < before["val_loss"]
    texts = [text for batch in run.predict(task, data) for text in batch["text"]]
    assert len(texts) == len(data.rows("test"))


def cloze(
    valley: Valley, kind: str, words: dict[str, list[str]] = WORDS, **kwargs: Any
) -> tuple[ClozeClassification, Any]:
    data = ClozeClassificationData(
        tokenizer=valley(kind),
        dataset="made://opinions",
        template="{text} all in all it was {mask} .",
        verbalizer=words,
        multi_token=True,
        batch_size=8,
    )
    task = ClozeClassification(valley(kind), data.verbalizer, data.label_names, lm=data.style, lead=data.lead, **kwargs)
    return task, data


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("combine", ["mean", "max", "sum"])
def test_labels_are_scored_by_their_words(kind: str, combine: Any, valley: Valley) -> None:
    task, data = cloze(valley, kind, {"good": ["good", "fine", "great"], "bad": ["bad"]}, combine=combine)
    batch = first(data)
    tokenizer = data.tokenizer
    with torch.no_grad():
        scores = task.eval()(batch)
        logits = task.backbone(**task.inputs(batch)).logits
    for i in range(8):
        mask = tokenizer.mask_token_id
        place = (
            batch["input_ids"][i].tolist().index(mask) if kind == "bert" else int(batch["attention_mask"][i].sum()) - 1
        )
        own = logits[i, place].log_softmax(0)
        lead = "" if kind == "bert" else " "
        words = [own[tokenizer(lead + w, add_special_tokens=False)["input_ids"][0]] for w in ("good", "fine", "great")]
        together = {"mean": torch.mean, "max": torch.max, "sum": lambda x: torch.logsumexp(x, 0)}[combine](
            torch.stack(words)
        )
        bad = own[tokenizer(lead + "bad", add_special_tokens=False)["input_ids"][0]]
        torch.testing.assert_close(scores[i], torch.stack([bad, together]))


@pytest.mark.parametrize("fill", ["parallel", "confident"])
def test_words_of_several_tokens(fill: Any, valley: Valley) -> None:
    task, data = cloze(valley, "bert", {"good": ["dogs"], "bad": ["bad"]}, fill=fill)
    assert task.masks == data.masks == 2
    batch = first(data)
    with torch.no_grad():
        scores = task.eval()(batch)
        word, mask = task.tokens_of[1], data.tokenizer.mask_token_id
        for i in range(8):
            ids = batch["input_ids"][i][batch["attention_mask"][i] == 1].unsqueeze(0)
            places = (ids[0] == mask).nonzero().flatten()
            one = torch.cat([ids[:, : places[1]], ids[:, places[1] + 1 :]], 1)
            short = task.backbone(one).logits[0, places[0]].log_softmax(0)
            assert scores[i, 0].item() == pytest.approx(short[task.tokens_of[0][0]].item(), rel=1e-5)
            both = task.backbone(ids).logits[0, places].log_softmax(1)
            values = [both[k, word[k]].item() for k in range(2)]
            if fill == "confident":
                sure = values.index(max(values))
                ids[0, places[sure]] = word[sure]
                left = task.backbone(ids).logits[0, places[1 - sure]].log_softmax(0)
                values[1 - sure] = left[word[1 - sure]].item()
            assert scores[i, 1].item() == pytest.approx(sum(values), abs=1e-4)
        assert task.train()(batch).shape == (8, 2)


def test_the_hinge_of_words_of_several_tokens_is_that_of_pet(valley: Valley) -> None:
    """``sum over the wrong words of max(0, 1 + CE(right) - CE(wrong))``, each over the masks of the word."""
    words = {"good": ["dogs"], "bad": ["bad"], "fine": ["cats"]}
    task, data = cloze(valley, "bert", {label: words[label] for label in ("good", "bad")}, loss="hinge")
    task = ClozeClassification(valley("bert"), words, loss="hinge", lead=data.lead)  # three labels: two hinges a row
    batch = {**first(data), "labels": torch.arange(8) % 3}
    with torch.no_grad():
        task.backbone.get_output_embeddings().bias[task.tokens_of[1][0]] += 5
        logits, found = task.train().backbone(**task.inputs(batch)).logits, task.loss(batch)
    hinges = []
    for row, own, right in zip(logits, batch["input_ids"], batch["labels"].tolist(), strict=True):
        start = own.tolist().index(data.tokenizer.mask_token_id)
        costs = []
        for word in task.tokens_of:
            targets = torch.full_like(own, -100)
            targets[start : start + len(word)] = torch.tensor(word)
            costs.append(torch.nn.functional.cross_entropy(row, targets, reduction="sum"))
        hinges.append(sum(max(0.0, 1 + float(costs[right] - cost)) for i, cost in enumerate(costs) if i != right))
    assert 0.0 in hinges
    assert found.item() == pytest.approx(sum(hinges) / 8, rel=1e-5)
    with pytest.raises(TuningError, match="loss='triplet' is no loss of a cloze: take cross_entropy or hinge"):
        ClozeClassification(valley("bert"), words, loss="triplet")  # type: ignore[arg-type]
    ClozeClassification(valley("bert"), words, loss="cross_entropy")


def test_words_of_several_tokens_after_a_prompt(valley: Valley) -> None:
    task, data = cloze(valley, "gpt2", {"good": ["gooddoghorse"], "bad": ["bad"]})
    assert task.masks >= 3
    batch = first(data)
    with torch.no_grad():
        scores = task.eval()(batch)
        for i in range(8):
            ids = batch["input_ids"][i][batch["attention_mask"][i] == 1]
            for label, word in enumerate(task.tokens_of):
                logits = task.backbone(torch.cat([ids, torch.tensor(word)]).unsqueeze(0)).logits[0].log_softmax(1)
                expected = sum(logits[len(ids) - 1 + k, token] for k, token in enumerate(word))
                torch.testing.assert_close(scores[i, label], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [LoRA(r=4), PROMPT, FullFineTuning()])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_cloze_learns(kind: str, method: Method, valley: Valley, tmp_path: Path) -> None:
    task, data = cloze(valley, kind, {"bad": ["bad", "poor"], "good": ["gooddog"]}, lr=1e-2)
    run = trainer(tmp_path, type(method)(**method.init_args()), limit_train_batches=60, limit_val_batches=4)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    assert run.callback_metrics["val_loss"] < before["val_loss"]
    (logged,) = run.test(task, data, verbose=False)
    assert logged.keys() == {"test_loss", "test_accuracy", "test_f1"}


def test_cloze_mistakes(valley: Valley, tmp_path: Path) -> None:
    _, data = cloze(valley, "gpt2")
    masked = ClozeClassification(valley("bert"), WORDS, lm="masked")
    with pytest.raises(TuningError, match="the data are for a causal language model, this one is masked"):
        trainer(tmp_path).validate(masked, data, verbose=False)
    _, two = cloze(valley, "bert", {"good": ["dogs"], "bad": ["bad"]})
    with pytest.raises(TuningError, match="the gap of the data has 2 tokens, the longest word 1"):
        trainer(tmp_path).validate(masked, two, verbose=False)
    with pytest.raises(TuningError, match="no masked language model can be made of"):
        ClozeClassification(valley("gpt2"), WORDS, lm="masked")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("method", [LoRA(r=4), PROMPT])
def test_probing_learns(kind: str, method: Method, valley: Valley, tmp_path: Path) -> None:
    data = KnowledgeProbingData(
        tokenizer=valley(kind), dataset="made://facts", template="{sub} keeps a {obj} .", batch_size=48
    )
    task = KnowledgeProbing(valley(kind), data.candidates, lm=data.style, lead=data.lead, lr=2e-2)
    batch = first(data)
    with torch.no_grad():
        logits = task.eval()(batch)
    task.train()
    assert logits.shape == (len(batch["labels"]), len(data.tokenizer))
    run = trainer(tmp_path, type(method)(**method.init_args()), max_epochs=8, log_every_n_steps=1)
    before = run.validate(task, data, verbose=False)[0]
    assert before["val_p_at_10"] == 1  # of eight candidates
    if isinstance(method, LoRA):  # which changes nothing at the start
        hits = logits[:, task.ids].argmax(1) == batch["labels"]
        assert before["val_p_at_1"] == pytest.approx(hits.float().mean().item())
        assert before["val_loss"] == pytest.approx(F.cross_entropy(logits, task.ids[batch["labels"]]).item(), rel=1e-5)
    run.fit(task, data)
    assert run.callback_metrics["val_loss"] < before["val_loss"]
    rows = run.predict(task, data)[0]
    assert set(rows["objects"][0]) <= set(data.candidates)


def tasks(valley: Valley, **kwargs: Any) -> tuple[MultiTask, MultiTaskData]:
    data = MultiTaskData(tokenizer=valley("bert"), tasks=SENTENCES, batch_size=12, **kwargs)
    return MultiTask(valley("bert"), data.label_names, lr=5e-3), data


@pytest.mark.parametrize(
    "method", [None, PROMPT, PromptTuning(num_virtual_tokens=3, num_prompts=2, init="random_uniform")]
)
def test_a_mixed_batch_is_one_run_a_task(method: Method | None, valley: Valley) -> None:
    task, data = tasks(valley)
    batch = next(batch for batch in iter(set_up(data).train_dataloader()) if len(batch["task_ids"].unique()) == 2)
    if method is not None:
        method = PromptTuning(**method.init_args())
        method.apply(task.backbone)
        batch = dict(method.prepare(batch))
    with torch.no_grad():
        mixed = task.eval()(batch)
        for number in range(2):
            rows = batch["task_ids"] == number
            alone = task({name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)})
            torch.testing.assert_close(mixed[rows], alone, atol=1e-5, rtol=1e-5)
            assert (mixed[rows][:, task.owner != number] == -torch.inf).all()
            assert mixed[rows][:, task.owner == number].isfinite().all()
    with pytest.raises(TuningError, match=r"task id 2 is out of range: the tasks are 0 to 1 \(form, opinion\)"):
        task({**batch, "task_ids": batch["task_ids"] + 1})


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("method", [LoRA(r=4), BitFit(), PROMPT, FullFineTuning()])
def test_several_tasks_learn(method: Method, mixed: bool, valley: Valley, tmp_path: Path) -> None:
    task, data = tasks(valley, mixed=mixed, cap=600)
    run = trainer(tmp_path, type(method)(**method.init_args()), max_epochs=2)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    if isinstance(method, LoRA):  # a random backbone has no features for the others to build on
        assert run.callback_metrics["val_loss"] < before["val_loss"]
    (logged,) = run.test(task, data, verbose=False)
    assert logged.keys() == {f"test_{s}{t}" for s in ("loss", "accuracy") for t in ("", "_form", "_opinion")}
    assert logged["test_accuracy"] == pytest.approx(
        (logged["test_accuracy_form"] + logged["test_accuracy_opinion"]) / 2
    )
    rows = run.predict(task, data)[0]
    assert all(label in task.labels[name] for name, label in zip(rows["task"], rows["labels"], strict=True))


def test_each_task_has_a_delta_of_another_method(valley: Valley, tmp_path: Path) -> None:
    task, data = tasks(valley)
    deltas = [LoRA(r=2, name="form"), PrefixTuning(num_virtual_tokens=2, name="opinion")]
    batch = next(batch for batch in iter(set_up(data).train_dataloader()) if len(batch["task_ids"].unique()) == 2)
    loader = DataLoader([batch], batch_size=None)
    trainer(tmp_path, *deltas, max_epochs=2).fit(task, loader, loader)
    shake(task.backbone)
    with torch.no_grad():
        mixed = task.eval()(batch)
        for number, name in enumerate(task.labels):
            own = batch["task_ids"] == number
            rows = {n: value[own] for n, value in batch.items() if isinstance(value, Tensor)}
            activate(task.backbone, name)
            torch.testing.assert_close(mixed[own], task(rows), atol=1e-5, rtol=1e-5)
            with muted(task.backbone):
                assert not torch.allclose(mixed[own], task(rows), atol=1e-3)
                bare = task(batch)
        activate(task.backbone, "form")  # rows of the other task are the bare backbone's
        torch.testing.assert_close(task(batch)[own], bare[own])
    IA3().apply(task.backbone)
    with pytest.raises(TuningError, match="form is the delta of a task, whose rows it computes alone, and ia3 of none"):
        task(batch)
    remove_delta(task.backbone, "ia3")
    remove_delta(task.backbone, "opinion")
    PromptTuning(num_virtual_tokens=2, init="random_uniform", name="opinion").apply(task.backbone)
    with pytest.raises(TuningError, match=r"opinion is a soft prompt.*take one PromptTuning\(num_prompts=2\)"):
        task(batch)


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_pooling_leaves_padding_and_prompts_out(pool: Any, valley: Valley) -> None:
    task = MultiTask(valley("bert"), {"a": ["x", "y"]}, pool=pool)
    hidden = torch.arange(10.0).view(2, 5, 1)
    batch = {"input_ids": torch.tensor([[7, -1, 8, 9, 0], [7, -1, 8, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    expected = {"first": [0, 5], "last": [3, 7], "mean": [5 / 3, 6]}[pool]
    assert task._pooled(hidden, batch).flatten().tolist() == pytest.approx(expected)


def test_several_tasks_mistakes(valley: Valley, tmp_path: Path) -> None:
    _, data = tasks(valley)
    with pytest.raises(TuningError, match=r"the data have the tasks .*: build it with these labels"):
        trainer(tmp_path).fit(MultiTask(valley("bert"), {"a": ["x", "y"]}), data)
    with pytest.raises(TuningError, match="leaves a task without a choice"):
        MultiTask(valley("bert"), {"a": ["x"]})
    with pytest.raises(TuningError, match="use letters, digits and _ alone"):
        MultiTask(valley("bert"), {"a b": ["x", "y"]})
    with pytest.raises(TuningError, match="multi-task heads need an encoder or a decoder alone"):
        MultiTask(valley("t5"), {"a": ["x", "y"]})


def test_matrices_decay_after_a_strategy_has_flattened_them(valley: Valley) -> None:
    task, _ = tags(valley)
    LoRA(r=2).apply(task.backbone)
    task._shapes = shapes_of(task, task.backbone)
    names = {g["name"]: sum(p.numel() for p in g["params"]) for g in task.parameter_groups()}
    for parameter in task.parameters():  # as FSDP1 does
        parameter.data = parameter.data.flatten()
    assert {g["name"]: sum(p.numel() for p in g["params"]) for g in task.parameter_groups()} == names
    assert names.keys() == {"delta", "head", "head without decay"}


@pytest.mark.parametrize("kind", [TokenClassification, QuestionAnswering, CausalLM, Seq2Seq])
def test_no_such_model(kind: Any, tmp_path: Path) -> None:
    models.tiny("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(
        TuningError, match=r"^no .* can be made of '.*vit' \(.*\): give a folder or hub id\.$"
    ) as caught:
        kind(str(tmp_path / "vit"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 0}, {"num_beams": 0}])
def test_numbers_out_of_range(arguments: dict[str, int], valley: Valley) -> None:
    with pytest.raises(TuningError, match="=0 is out of range: take 1 or more"):
        Seq2Seq(valley("t5"), **arguments)
    with pytest.raises(TuningError, match="longest=0 leaves no answer"):
        QuestionAnswering(valley("bert"), longest=0)
