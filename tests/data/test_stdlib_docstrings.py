"""The docstrings that are found in a folder of sources, and what the running Python's own library gives."""

from collections import Counter
from pathlib import Path

import pytest

from lightning_peft import TuningError
from lightning_peft.data import StdlibDocstrings
from lightning_peft.data.stdlib_docstrings import _rows, docstrings, documented

LIBRARY = {
    "alpha.py": '"""Alpha is a module\nof two lines.\n  \nMore of it."""\nclass A:\n    """A class of alpha."""\n',
    "beta/__init__.py": "async def f():\n    def g():\n        '''An inner function of beta.'''\n",
    "beta/deep/part.py": 'def f():\n    """Common to two packages."""\ndef g():\n    """Twice in one package."""\n' * 2,
    "gamma.py": 'def f():\n    """Common to two packages."""\n    x = """no docstring"""\n',
    "_private.py": '"""Private words nobody reads."""',
    "beta/_private/part.py": '"""Private words nobody reads."""',
    "beta/test/part.py": '"""Words of a test."""',
    "beta/idle_test/part.py": '"""Words of a test."""',
    "test/part.py": '"""Words of a test."""',
    "site-packages/other.py": '"""Not of the library."""',
    "template.py": "def {{ name }}:",
}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, source in LIBRARY.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "library"


def test_first_paragraphs_of_public_sources(library: Path) -> None:
    assert sorted(docstrings(library)) == [
        ("alpha", "A class of alpha."),
        ("alpha", "Alpha is a module of two lines."),
        ("beta", "An inner function of beta."),
        *[("beta", "Common to two packages.")] * 2,
        *[("beta", "Twice in one package.")] * 2,
        ("gamma", "Common to two packages."),
    ]


def test_names_say_what_a_docstring_is_of(library: Path) -> None:
    found = [(name, text) for _, name, text in documented(library)]
    assert found[:2] == [("alpha", "Alpha is a module of two lines."), ("alpha.A", "A class of alpha.")]
    assert ("beta.f.g", "An inner function of beta.") in found
    assert ("beta.deep.part.f", "Common to two packages.") in found


def test_duplicates_and_short_texts_are_left_out(library: Path) -> None:
    rows = list(_rows(str(library), "", classes=2, max_per_class=9, min_words=5))
    assert [(row["label"], row["text"]) for row in rows] == [
        ("alpha", "Alpha is a module of two lines."),
        ("beta", "An inner function of beta."),
    ]
    assert len(list(_rows(str(library), "", 2, 9, 4))) == 4
    assert [row["label"] for row in _rows(str(library), "", 2, 1, 4)] == ["alpha", "beta"]


def test_the_split_depends_on_the_text_alone(library: Path) -> None:
    before = {row["text"]: row["split"] for row in _rows(str(library), "", 2, 9, 1)}
    (library / "aaa.py").write_text('"""A module that comes before."""')
    (library / "beta" / "deep" / "part.py").rename(library / "beta" / "zzz.py")
    after = {row["text"]: row["split"] for row in _rows(str(library), "", 3, 9, 1)}
    assert after.items() > before.items()


def test_the_running_library(model: str) -> None:
    data = StdlibDocstrings(tokenizer=model)
    every = data.all_classes()
    counts = Counter(every["label"])
    assert data.label_names == sorted(counts)
    assert len(counts) == data.num_labels == 12
    assert {"asyncio", "email", "logging", "unittest"} <= counts.keys()
    assert not any(name.startswith("_") or name in ("test", "tests") for name in counts)
    assert max(counts.values()) <= 600
    assert min(counts.values()) >= 80
    assert len(set(every["text"])) == len(every) > 2000
    sizes = {split: len(data.rows(split)) for split in ("train", "validation", "test")}
    assert sum(sizes.values()) == len(every)
    assert all(0.08 < sizes[split] / len(every) < 0.12 for split in ("validation", "test"))
    assert data.rows("predict")["text"] == data.rows("test")["text"]
    data.setup("fit")
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == sizes["train"]


@pytest.mark.parametrize("arguments", [{"classes": 1}, {"max_per_class": 0}])
def test_too_few(arguments: dict[str, int]) -> None:
    with pytest.raises(TuningError, match="are too few: take 2 and 1 or more"):
        StdlibDocstrings(tokenizer="", **arguments)
