"""A cache of its own for these tests, and a model to tokenise for."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests import text


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT and its tokenizer."""
    return text.save_model(tmp_path_factory.mktemp("bert"))
