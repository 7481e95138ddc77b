"""The docstrings of Python's standard library as text classification data; nothing is downloaded."""

import ast
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.draw import number_of
from lightning_peft.data.text_data import TextData

_LEFT_OUT = re.compile(r"_.*|.*-.*|(.*_)?tests?|test_.*")
"""Folders and modules that have no part in the data: private ones, tests, site-packages."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class StdlibDocstrings(TextData):
    """Which package of the standard library is this docstring from?

    A text is the first paragraph of the docstring of a module, class or function of the running Python, read from the
    source without importing it; its class is the top-level package or module. Private packages and tests are left out,
    and so are texts of fewer than ``min_words`` words and texts that stand in several packages; no text occurs twice.
    Some texts name their package, as documentation does. A hash of the text decides whether it trains (8 of 10),
    validates or tests (1 of 10 each), so nothing depends on an order; another version of Python has other docstrings.

    Args:
        classes: how many packages to tell apart, the largest ones.
        max_per_class: the most texts of one package; their hashes decide which.
        min_words: the fewest words of a text.
        **kwargs: as in `TextData`.
    """

    def __init__(self, classes: int = 12, max_per_class: int = 600, min_words: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if classes < 2 or max_per_class < 1:
            raise TuningError(f"classes={classes} and max_per_class={max_per_class} are too few: take 2 and 1 or more.")
        self.classes = classes
        self.max_per_class = max_per_class
        self.min_words = min_words

    def rows(self, split: str) -> Dataset:
        """Return the texts of a split; those of the test are the ones to predict, too."""
        every = self.all_classes()
        wanted = "test" if split == "predict" else split
        return every.select([row for row, name in enumerate(every["split"]) if name == wanted])

    def all_classes(self) -> Dataset:
        """Return the texts of all splits."""
        return self._every

    @cached_property
    def _every(self) -> Dataset:
        # Reading the sources takes seconds: `datasets` keeps the result under a hash of these arguments.
        arguments = {
            "library": sysconfig.get_paths()["stdlib"],
            "python": platform.python_version(),
            "classes": self.classes,
            "max_per_class": self.max_per_class,
            "min_words": self.min_words,
        }
        return Dataset.from_generator(_rows, gen_kwargs=arguments)


def docstrings(library: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(package, text)`` for each first paragraph in the public sources below a folder."""
    return ((package, text) for package, _, text in documented(library))


def documented(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yield package, full dotted name and first paragraph of what has a docstring in the public sources of a folder."""
    for path in _sources(library):
        parts = path.relative_to(library).with_suffix("").parts
        with warnings.catch_warnings(action="ignore"):  # of escapes in old sources
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # a template, or a source for another version
                continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, node in _named(tree, module or parts[0]):
            if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
                yield parts[0], name, " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


def _named(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield all nodes below one, level by level, as ``ast.walk`` does, with the dotted names of what they belong to."""
    waiting = deque([(name, tree)])
    while waiting:
        name, node = waiting.popleft()
        yield name, node
        for child in ast.iter_child_nodes(node):
            own = isinstance(child, _DOCUMENTED) and not isinstance(child, ast.Module)
            waiting.append((f"{name}.{child.name}" if own else name, child))  # type: ignore[attr-defined]


def _sources(library: Path) -> Iterator[Path]:
    for folder, children, files in os.walk(library):
        children[:] = sorted(name for name in children if not _LEFT_OUT.fullmatch(name))  # os.walk goes into these
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and (stem == "__init__" or not _LEFT_OUT.fullmatch(stem)):
                yield Path(folder, name)


def _rows(
    library: str,
    python: str,  # noqa: ARG001 (another version is another entry in the cache)
    classes: int,
    max_per_class: int,
    min_words: int,
) -> Iterator[dict[str, str]]:
    packages: dict[str, set[str]] = {}
    for package, text in docstrings(Path(library)):
        if len(text.split()) >= min_words:
            packages.setdefault(text, set()).add(package)
    unique = {text: min(names) for text, names in packages.items() if len(names) == 1}
    counts = Counter(unique.values())
    largest = sorted(counts, key=lambda package: (-counts[package], package))[:classes]
    for package in sorted(largest):
        texts = sorted((number_of(text), text) for text, name in unique.items() if name == package)
        for number, text in texts[:max_per_class]:
            yield {"text": text, "label": package, "split": {0: "test", 1: "validation"}.get(number % 10, "train")}
