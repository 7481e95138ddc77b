"""Prints the words nearest to a soft prompt after each epoch, and what they have in common."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
from rich.console import Console
from rich.table import Table

from lightning_peft.core.errors import TuningError

Words = list[list[tuple[str, float]]]


class Summary(TypedDict):
    """What the nearest words of virtual tokens have in common; see `words_summary`."""

    shared: dict[str, list[int]]
    clusters: list[list[int]]
    labels: dict[str, list[int]]


class NearestWords(L.Callback):
    """Prints the words nearest to each virtual token, and writes them into ``nearest_words.jsonl`` of the run's folder.

    A line holds ``epoch``, ``method``, ``words``: for each virtual token, ``[word, cosine]`` of the nearest ones, and
    the entries of `words_summary`, which are printed below the table.

    Args:
        k: how many words of each virtual token.
        labels: words of the classes, to be looked for among the nearest; None: the names of the task's classes.
        every_n_epochs: how often.
        tokens: how many virtual tokens the printed table shows; the file has all.
    """

    def __init__(
        self, k: int = 5, every_n_epochs: int = 1, tokens: int = 20, labels: Sequence[str] | None = None
    ) -> None:
        for name, value in (("k", k), ("every_n_epochs", every_n_epochs), ("tokens", tokens)):
            if value < 1:
                raise TuningError(f"NearestWords's {name}={value} is out of range: take 1 or more.")
        self.k, self.every_n_epochs, self.tokens, self.labels = k, every_n_epochs, tokens, labels

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a soft prompt.

        Raises:
            TuningError: no method of the Trainer trains virtual tokens.
        """
        if not self._methods(trainer):
            raise TuningError("NearestWords finds no soft prompt: use it with PromptTuning, PTuning or WARP.")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and print the words."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all processes must ask for log_dir together
        if (trainer.current_epoch + 1) % self.every_n_epochs or not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for method in self._methods(trainer):
            words: Words = method.nearest_words(pl_module, self.k)
            name, summary = type(method).__name__, words_summary(words, self._classes(pl_module))
            with (folder / "nearest_words.jsonl").open("a", encoding="utf-8") as file:
                line = {"epoch": trainer.current_epoch, "method": name, "words": words, **summary}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            Console().print(words_table(words[: self.tokens], f"{name}, epoch {trainer.current_epoch}"))
            Console().print(*summary_lines(summary), sep="\n", markup=False, highlight=False)

    def _classes(self, module: L.LightningModule) -> list[str]:
        given = self.labels if self.labels is not None else vars(module).get("labels")
        return [name for name in given if isinstance(name, str)] if isinstance(given, (list, tuple)) else []

    def _methods(self, trainer: L.Trainer) -> list[Any]:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if hasattr(callback, "nearest_words")]


def words_table(words: Words, title: str) -> Table:
    """Return a table of the nearest words of virtual tokens, with their cosines."""
    table = Table(title=title, title_justify="left")
    table.add_column("token", justify="right")
    table.add_column("nearest words (cosine)", overflow="fold")
    for i, near in enumerate(words):
        table.add_row(str(i), ", ".join(f"{word} ({cosine:.2f})" for word, cosine in near))
    return table


def words_summary(words: Words, labels: Sequence[str] = ()) -> Summary:
    """Return what the nearest words of virtual tokens have in common.

    ``shared``: word -> the virtual tokens that have it among their nearest, if there are several. ``clusters``: the
    groups of virtual tokens that are joined by words they share. ``labels``: class -> the virtual tokens that have a
    word of its name among their nearest. Case, and the marks by which tokenizers note a space, make no difference.

    >>> words = [[("film", 0.9), ("the", 0.2)], [("Film", 0.8), ("music", 0.7)], [("stone", 0.9), ("river", 0.3)]]
    >>> words_summary(words, ["music and film", "nature"])
    {'shared': {'film': [0, 1]}, 'clusters': [[0, 1]], 'labels': {'music and film': [0, 1]}}

    Source: Lester et al. 2021, arXiv 2104.08691, section 7: neighbours form clusters, several tokens of a prompt have
    the same ones, and the words of the classes are often among them.
    """
    near = [{_plain(word) for word, _ in row} for row in words]
    holders = {word: [i for i, own in enumerate(near) if word in own] for word in sorted(set().union(*near) - {""})}
    shared = {word: tokens for word, tokens in holders.items() if len(tokens) > 1}
    named = {label: sorted({i for word in label.split() for i in holders.get(_plain(word), [])}) for label in labels}
    return {
        "shared": shared,
        "clusters": _joined(list(shared.values())),
        "labels": {label: tokens for label, tokens in named.items() if tokens},
    }


def summary_lines(summary: Summary) -> list[str]:
    """Return the sentences that say it."""
    shared, clusters, labels = summary["shared"], summary["clusters"], summary["labels"]
    joined = [f"{_numbers(tokens)} share neighbours" for tokens in clusters]
    most = sorted(shared, key=lambda word: -len(shared[word]))[:5]
    often = [f"{word!r} is near to {_numbers(shared[word])}" for word in most]
    found = [f"class {label!r} is near to {_numbers(tokens)}" for label, tokens in labels.items()]
    return [*joined, *often, *found] or ["no two tokens share a neighbour, and no word of a class is among them"]


def _numbers(tokens: Sequence[int]) -> str:
    return f"token{'s' if len(tokens) > 1 else ''} {', '.join(str(token) for token in tokens)}"


def _plain(word: str) -> str:
    return "".join(letter for letter in word if unicodedata.category(letter)[0] in "LMN").removeprefix("Ġ").casefold()


def _joined(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the groups with those that have a member in common made one."""
    found: list[set[int]] = []
    for group in groups:
        touching = [one for one in found if not one.isdisjoint(group)]
        found = [one for one in found if one.isdisjoint(group)] + [set(group).union(*touching)]
    return sorted(sorted(one) for one in found)
