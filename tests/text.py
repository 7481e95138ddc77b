"""A small labelled text problem: sentences of known words, in files, and a model with its tokenizer for them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassification
from tests import models

WORDS = {"nature": "river stone bird tree sun green", "people": "people house time", "sound": "music film"}
"""Class -> the words that only its sentences have."""
NAMES = list(WORDS)
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
FILLERS = ["the", "of", "and", "to", "in", "good", "bad", "water", "light"]


def sentences(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, Any]]:
    """Return rows of ``text`` and ``label``, the classes in turn; a text has 1 to ``longest`` words."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = NAMES[i % 3]
        words = [draw.choice(FILLERS) for _ in range(draw.randint(0, longest - 1))]
        words.insert(draw.randint(0, len(words)), draw.choice(WORDS[label].split()))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write(path: Path, rows: list[dict[str, Any]], classes: list[str] | None = None) -> str:
    """Write rows as the ending of the path says; with ``classes``, the labels as a ClassLabel (Parquet only)."""
    dataset = Dataset.from_list(rows)
    if classes is not None:
        dataset = dataset.cast_column("label", ClassLabel(names=classes))
    if path.suffix in (".csv", ".tsv"):
        dataset.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.to_json(path)
    return str(path)


def save_model(folder: Path, kind: str = "bert", dropout: float = 0.0) -> str:
    """Save a tiny model with its tokenizer."""
    models.tiny(kind, dropout).save_pretrained(folder)
    return str(models.save_tokenizer(folder))


def data(model: str, folder: Path, train: int = 48, other: int = 21, **kwargs: Any) -> TextClassificationData:
    """Return a data module over files of sentences; validation and test have ``other`` rows each."""
    counts = {"train": train, "validation": other, "test": other}
    files = {
        split: write(folder / f"{split}.jsonl", sentences(count, seed))
        for seed, (split, count) in enumerate(counts.items())
    }
    return TextClassificationData(**{"tokenizer": model, "batch_size": 8, "max_length": 32} | files | kwargs)


def task(model: str, **kwargs: Any) -> TextClassification:
    """Return a task for the sentences; its head depends on the seed alone."""
    L.seed_everything(0, verbose=False)
    return TextClassification(model, **{"labels": NAMES} | kwargs)


def scored(task: TextClassification, data: L.LightningDataModule) -> tuple[Tensor, Tensor]:
    """Return logits [N, C] and labels [N] of the test rows, without any of Lightning."""
    task.eval()
    with torch.no_grad():
        pairs = [(task(batch), batch["labels"]) for batch in data.test_dataloader()]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT and its tokenizer."""
    return save_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def valley(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """From 'bert', 'gpt2' or 't5' to the folder of a tiny model that knows the words of the made-up valley."""
    from tests.valley import save

    folder = tmp_path_factory.mktemp("valley")
    return lambda kind: save(kind, folder)
