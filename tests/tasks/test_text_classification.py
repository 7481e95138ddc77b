"""Scores, optimizer, schedule and checkpoints of text classification, in a Trainer with real data loaders."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM

from lightning_peft import (
    BitFit,
    FullFineTuning,
    LinearProbe,
    LoRA,
    Method,
    PromptTuning,
    TuningError,
)
from lightning_peft.tasks import TextClassification
from tests import models, text
from tests.modules import trainer
from tests.processes import run_module
from tests.tasks import two_processes
from tests.text import NAMES, scored

METHODS = [
    LoRA(r=4),
    BitFit(),
    LinearProbe(),
    PromptTuning(num_virtual_tokens=4, init="random_uniform"),
    FullFineTuning(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_learns_and_scores(method: Method, model: str, tmp_path: Path) -> None:
    data = text.data(model, tmp_path, train=240, other=60)
    lr = 3e-3 if isinstance(method, FullFineTuning) else 2e-2
    task = text.task(model, lr=lr, head_lr=lr)
    run = trainer(tmp_path, method, max_epochs=5)
    before = run.validate(task, data, verbose=False)[0]
    run.fit(task, data)
    after = {name: value.item() for name, value in run.callback_metrics.items()}
    assert after["val_loss"] < 0.8 * before["val_loss"]
    assert {"train_loss", "val_loss", "val_accuracy", "val_f1"} <= after.keys()
    logged = run.test(task, data, verbose=False)[0]
    assert logged.keys() == {"test_loss", "test_accuracy", "test_f1"}
    if not isinstance(method, (LinearProbe, PromptTuning)):  # a random backbone has no features to build on
        assert logged["test_accuracy"] > 0.5


def test_scores_are_those_of_the_formulas(model: str, tmp_path: Path) -> None:
    data, task = text.data(model, tmp_path, other=47), text.task(model)
    logged = trainer(tmp_path).test(task, data, verbose=False)[0]
    logits, labels = scored(task, data)
    guesses = logits.argmax(1)
    matrix = torch.zeros(3, 3, dtype=torch.long)
    for label, guess in zip(labels.tolist(), guesses.tolist(), strict=True):
        matrix[label, guess] += 1
    hits = matrix.diagonal()
    f1 = 2 * hits / (matrix.sum(0) + matrix.sum(1))
    assert logged["test_accuracy"] == pytest.approx((guesses == labels).float().mean().item())
    assert logged["test_f1"] == pytest.approx(f1.mean().item())
    assert logged["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert torch.equal(task.confusion_matrix(), matrix)
    assert matrix.sum() == 47
    trainer(tmp_path).test(task, data, verbose=False)
    assert torch.equal(task.confusion_matrix(), matrix)


def test_sums_are_in_fp32_under_bf16(model: str, tmp_path: Path) -> None:
    data, task = text.data(model, tmp_path, other=300), text.task(model)
    logged = trainer(tmp_path, precision="bf16-true").test(task, data, verbose=False)[0]
    logits, labels = scored(task, data)
    assert logits.dtype is torch.float32
    assert logged["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_two_processes_score_and_train_like_one(model: str, tmp_path: Path) -> None:
    text.data(model, tmp_path, train=64, other=37)
    run_module("tests.tasks.two_processes", model, tmp_path, folder=tmp_path)
    two, one = json.loads((tmp_path / "two.json").read_text()), two_processes.run(model, tmp_path, 1)
    assert one is not None
    assert two.pop("confusions") == one.pop("confusions")
    # Halves of a batch are rounded otherwise, and Adam makes more of that.
    assert two.pop("norms") == pytest.approx(one.pop("norms"), rel=1e-4)
    assert two == pytest.approx(one, rel=1e-4)


def test_no_confusion_matrix_before_a_test(model: str) -> None:
    with pytest.raises(TuningError, match=r"no confusion matrix before a test: run trainer\.test first\.$"):
        text.task(model).confusion_matrix()


def test_predictions(model: str, tmp_path: Path) -> None:
    data, task = text.data(model, tmp_path), text.task(model)
    batches = trainer(tmp_path).predict(task, data)
    probabilities = torch.cat([batch["probabilities"] for batch in batches])
    labels = [label for batch in batches for label in batch["labels"]]
    assert probabilities.shape == (21, 3)
    assert torch.allclose(probabilities.sum(1), torch.ones(21))
    assert labels == [NAMES[i] for i in probabilities.argmax(1).tolist()]
    tokens = data.tokenizer(text.sentences(21, 2)[5]["text"], return_tensors="pt")
    assert torch.allclose(task.eval()(tokens).softmax(1)[0], probabilities[5], atol=1e-6)


def test_texts_without_a_trainer(model: str, tmp_path: Path) -> None:
    """A person's own texts get the scores that the same rows get from a Trainer, and the module stays as it was."""
    data, task = text.data(model, tmp_path), text.task(model)
    PromptTuning(num_virtual_tokens=3).apply(task)
    batches = trainer(tmp_path).predict(task, data)
    task.train()
    modes = [module.training for module in task.modules()]
    texts = [row["text"] for row in text.sentences(21, 2)]
    rows = task.predict(texts, batch_size=8)
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows] == [label for batch in batches for label in batch["labels"]]
    assert all(list(row["probabilities"]) == NAMES for row in rows)
    expected = torch.cat([batch["probabilities"] for batch in batches])
    assert torch.allclose(torch.tensor([list(row["probabilities"].values()) for row in rows]), expected, atol=2e-6)
    assert [module.training for module in task.modules()] == modes
    with pytest.raises(TuningError, match=r"is no list of texts: give e\.g\. \['a text', 'another'\]\.$"):
        task.predict("a text")


def test_other_classes_in_the_data(model: str, tmp_path: Path) -> None:
    task = text.task(model, labels=["nature", "people"])
    with pytest.raises(
        TuningError, match=r"the data have 3 classes \(nature, people, sound\), the model 2 \(nature, pe"
    ):
        trainer(tmp_path).fit(task, text.data(model, tmp_path))


def test_texts_longer_than_the_model(model: str, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="max_length=100 of the data is beyond the 64 positions of the model"):
        trainer(tmp_path).fit(text.task(model), text.data(model, tmp_path, max_length=100))


@pytest.mark.parametrize("kind", ["missing", "vit"])
def test_no_text_classifier(kind: str, tmp_path: Path) -> None:
    if kind == "vit":
        models.tiny("vit").save_pretrained(tmp_path / kind)
    words = r"^no text classifier can be made of '.*' \(.*\): give a folder or hub id( that this machine has;.*)?\.$"
    with pytest.raises(TuningError, match=words) as caught:
        TextClassification(str(tmp_path / kind))
    assert "\n" not in str(caught.value)


def test_labels(model: str) -> None:
    task = text.task(model, labels=["yes", "no"])
    assert task.backbone.config.id2label == {0: "yes", 1: "no"}
    assert task.backbone.config.label2id == {"yes": 0, "no": 1}
    assert task.backbone.classifier.out_features == 2
    assert text.task(model, labels=None).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert all(p.dtype is torch.bfloat16 for p in text.task(model, dtype="bfloat16").parameters())


def test_weights_that_are_missing_outside_of_the_head(model: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    with pytest.warns(
        UserWarning, match=r"no weights for 2 tensors .* e\.g\. bert\.pooler\.dense\.bias: .*also_train="
    ):
        TextClassification(str(tmp_path / "mlm"), labels=NAMES)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "distilbert"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    folder = text.save_model(tmp_path / kind, kind)
    config = AutoConfig.from_pretrained(folder)
    if kind in ("gpt2", "llama"):
        config.pad_token_id = None
    elif kind == "t5":
        config.eos_token_id = AutoTokenizer.from_pretrained(folder).sep_token_id  # it pools at the end of the sequence
    config.save_pretrained(folder)
    data = text.data(folder, tmp_path)
    task = text.task(folder)
    assert task.backbone.config.pad_token_id == AutoTokenizer.from_pretrained(folder).pad_token_id == 0
    trainer(tmp_path, LoRA(r=2)).fit(task, data)
    logits, _ = scored(task, data_with_test(data))
    order = [row["text"] for row in text.sentences(21, 2)]
    alone = [task(data.tokenizer(words, return_tensors="pt"))[0] for words in order]
    assert sorted(logits[:, 0].tolist()) == pytest.approx(sorted(v[0].item() for v in alone), abs=1e-5)


def data_with_test(data: L.LightningDataModule) -> L.LightningDataModule:
    data.setup("test")
    return data


def test_the_mean_of_the_hidden_states(model: str, tmp_path: Path) -> None:
    """Padding and virtual tokens do not count; the head is trained, saved and loaded."""
    data, task = text.data(model, tmp_path, train=24, other=12), text.task(model, pooling="mean", lr=1e-2, head_lr=1e-2)
    run = trainer(tmp_path, PromptTuning(num_virtual_tokens=2, init="random_uniform"), max_steps=2)
    start = task.head.weight.clone()
    run.fit(task, data)
    assert not torch.equal(task.head.weight, start)
    batch = next(iter(data.val_dataloader()))
    task.eval()
    with torch.no_grad():
        logits = task(batch)
    run.save_checkpoint(tmp_path / "mean.ckpt")
    loaded = TextClassification.load_from_checkpoint(tmp_path / "mean.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(batch), logits)
        bare = text.task(model, pooling="mean").eval()
        states = bare.backbone(**bare.inputs(batch)).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).float()
        torch.testing.assert_close(bare(batch), bare.head((states * weights).sum(1) / weights.sum(1)))
    for arguments, message in (
        ({"labels": NAMES, "pooling": "max"}, "pooling='max' is no pooling: take model or mean"),
        ({"pooling": "mean"}, "pooling='mean' has a head of its own: give labels="),
    ):
        with pytest.raises(TuningError, match=message):
            TextClassification(model, **arguments)
