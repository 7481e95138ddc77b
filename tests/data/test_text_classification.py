"""Texts and labels from every kind of source, as batches; what is wrong with a source is said in one sentence."""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from lightning_peft import TuningError
from lightning_peft.data import TextClassificationData
from lightning_peft.data.batches import Batches
from tests import models, text
from tests.modules import trainer
from tests.text import ENDINGS, NAMES, sentences, write


def decoded(data: TextClassificationData, loader: Any) -> list[tuple[str, str]]:
    """Return text and label of every row of the batches, in order."""
    rows = []
    for batch in loader:
        texts = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        rows += zip(texts, [data.label_names[i] for i in batch["labels"].tolist()], strict=True)
    return rows


def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["text"], str(row["label"])) for row in rows]


@pytest.mark.parametrize("ending", ENDINGS)
def test_files(ending: str, model: str, tmp_path: Path) -> None:
    splits = {"train": sentences(30, 0), "validation": sentences(12, 1), "test": sentences(9, 2)}
    files = {split: write(tmp_path / f"{split}{ending}", rows) for split, rows in splits.items()}
    data = TextClassificationData(tokenizer=model, batch_size=8, **files)
    assert (data.label_names, data.num_labels) == (NAMES, 3)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader, rows in zip(loaders, splits.values(), strict=True):
        assert sorted(decoded(data, loader)) == sorted(pairs(rows))
    batches = list(data.predict_dataloader())
    assert all("labels" not in batch for batch in batches)
    texts = [text for b in batches for text in data.tokenizer.batch_decode(b["input_ids"], skip_special_tokens=True)]
    assert texts == [row["text"] for row in splits["test"]]


def test_a_batch(model: str, tmp_path: Path) -> None:
    rows = [{"text": "river of water", "label": "nature"}, {"text": "music", "label": "sound"}] * 2
    data = TextClassificationData(
        tokenizer=model, train=write(tmp_path / "t.csv", rows), validation_share=0, test_share=0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = tokenizer(["music"] * 2 + ["river of water"] * 2, padding=True, return_tensors="pt")
    assert type(batch) is dict
    assert batch.keys() == {*expected, "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    order = batch["labels"].argsort(descending=True)
    assert all(torch.equal(batch[name][order], expected[name]) for name in expected)
    assert data.val_dataloader() == []


@pytest.mark.parametrize("labels", [[10, 9, -3], [True, False, True], ["b", "a", "10"]])
def test_labels_are_numbered_in_order(labels: list[Any], model: str, tmp_path: Path) -> None:
    rows = [{"text": word, "label": label} for word, label in zip(("river", "music", "time"), labels, strict=True)]
    path = write(tmp_path / "train.jsonl", rows)
    data = TextClassificationData(tokenizer=model, train=path, validation=path, test=path)
    data.setup("fit")
    assert data.label_names == [str(label) for label in sorted(set(labels))]
    assert sorted(decoded(data, data.train_dataloader())) == sorted(pairs(rows))


def test_class_labels_keep_their_order(model: str, tmp_path: Path) -> None:
    names = ["sound", "unused", "people", "nature"]
    path = write(tmp_path / "train.parquet", sentences(20), names)
    words = write(tmp_path / "validation.csv", sentences(9))
    data = TextClassificationData(tokenizer=model, train=path, validation=words)
    data.setup("fit")
    assert data.label_names == names
    assert sorted(decoded(data, data.val_dataloader())) == sorted(pairs(sentences(9)))


def test_words_that_pandas_takes_for_missing_values(model: str, tmp_path: Path) -> None:
    rows = [{"text": "river", "label": "None"}, {"text": "null", "label": "NA"}]
    path = write(tmp_path / "train.csv", rows)
    assert TextClassificationData(tokenizer=model, train=path).label_names == ["NA", "None"]


def test_splits_drawn_from_one_file(model: str, tmp_path: Path) -> None:
    rows = [{"text": f"bird {'of ' * i}", "label": NAMES[i % 3]} for i in range(40)]
    path = write(tmp_path / "all.jsonl", rows)

    def drawn(**kwargs: Any) -> dict[str, list[str]]:
        data = TextClassificationData(tokenizer=model, train=path, **kwargs)
        splits = {split: data.rows(split) for split in ("train", "validation", "test")}
        return {split: found["text"] for split, found in splits.items() if found is not None}

    first = drawn()
    assert {split: len(texts) for split, texts in first.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(t for texts in first.values() for t in texts) == sorted(row["text"] for row in rows)
    assert drawn() == first
    assert drawn(seed=1) != first
    assert drawn(validation_share=0.5)["test"] == first["test"]
    assert drawn(test_share=0).keys() == {"train", "validation"}


def test_dataset_with_splits(model: str, tmp_path: Path) -> None:
    rows = {"train": sentences(30, 0), "validation": sentences(6, 1), "test": sentences(6, 2)}
    for split, entries in rows.items():
        write(tmp_path / "corpus" / f"{split}.jsonl", entries)
    data = TextClassificationData(tokenizer=model, dataset=str(tmp_path / "corpus"), test="train[:5]")
    for stage in ("fit", "test"):
        data.setup(stage)
    assert sorted(decoded(data, data.val_dataloader())) == sorted(pairs(rows["validation"]))
    assert sorted(decoded(data, data.test_dataloader())) == sorted(pairs(rows["train"][:5]))
    with pytest.raises(TuningError, match=r"has no split 'tset'; it has e\.g\. test"):
        TextClassificationData(tokenizer=model, dataset=str(tmp_path / "corpus"), test="tset").setup("fit")


def test_pairs_of_texts(model: str, tmp_path: Path) -> None:
    rows = [{"a": "river", "b": "good music", "label": i % 2} for i in range(4)]
    path = write(tmp_path / "train.jsonl", rows)
    data = TextClassificationData(tokenizer=model, train=path, validation=path, text=["a", "b"])
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert data.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "river good music"


def test_padding_and_truncation(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", sentences(40, longest=30))

    def widths(**kwargs: Any) -> list[int]:
        arguments: dict[str, Any] = {"train": path, "validation": path, "test": path, "batch_size": 4} | kwargs
        data = TextClassificationData(tokenizer=model, **arguments)
        data.setup("fit")
        batches = list(data.train_dataloader())
        masks = [batch["attention_mask"].sum(1).max().item() for batch in batches]
        assert kwargs or masks == [batch["input_ids"].shape[1] for batch in batches]
        return [batch["input_ids"].shape[1] for batch in batches]

    assert sum(widths()) < 0.8 * sum(widths(bucket=False))
    assert max(widths(max_length=10)) == 10
    assert {width % 8 for width in widths(pad_to_multiple_of=8)} == {0}


def test_tokenised_texts_are_cached(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", sentences(20))

    def cached(**kwargs: Any) -> list[tuple[str, int]]:
        data = TextClassificationData(tokenizer=model, train=path, **kwargs)
        data.setup("fit")
        list(data.train_dataloader())
        files = [Path(entry["filename"]) for entry in data._split("train").cache_files]
        return [(file.name, file.stat().st_mtime_ns) for file in files]

    first = cached()
    assert first == cached()
    assert first != cached(max_length=5)


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    tokenizer = AutoTokenizer.from_pretrained(models.save_tokenizer(folder))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    path = write(tmp_path / "train.jsonl", sentences(20))
    data = TextClassificationData(tokenizer=str(folder), train=path)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all()


def test_each_process_has_its_rows(model: str, tmp_path: Path) -> None:
    class Trainer(L.Trainer):
        rank = 0

        @property
        def distributed_sampler_kwargs(self) -> dict[str, int]:
            return {"num_replicas": 2, "rank": self.rank}

    rows: list[tuple[str, str]] = []
    for rank in range(2):
        data = text.data(model, tmp_path, train=45)
        data.setup("fit")
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        data.trainer.strategy.connect(L.LightningModule())
        data.trainer.rank = rank
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, Batches)
        rows += decoded(data, loader)
    assert sorted(rows) == sorted(pairs(sentences(45)))


def test_unlabelled_rows_can_be_predicted(model: str, tmp_path: Path) -> None:
    predict = write(tmp_path / "new.csv", [{"text": "river"}, {"text": "music of time"}])
    data = text.data(model, tmp_path, predict=predict)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["river", "music of time"]


def test_rows_to_predict_need_no_others(model: str, tmp_path: Path) -> None:
    predict = write(tmp_path / "new.csv", sentences(5))
    data = TextClassificationData(tokenizer=model, train="nowhere.csv", predict=predict)
    data.setup("predict")
    assert [len(batch["input_ids"]) for batch in data.predict_dataloader()] == [5]


def test_overfitting_sees_the_same_rows(model: str, tmp_path: Path) -> None:
    class Seen(L.Callback):
        batches: ClassVar[list[torch.Tensor]] = []

        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
            self.batches.append(batch["input_ids"])

    run = trainer(tmp_path, Seen(), overfit_batches=2, max_epochs=2)
    run.fit(text.task(model), text.data(model, tmp_path))
    assert len(Seen.batches) == 4
    assert all(torch.equal(*pair) for pair in zip(Seen.batches[:2], Seen.batches[2:], strict=True))
