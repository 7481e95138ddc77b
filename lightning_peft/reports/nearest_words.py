"""Prints the words nearest to a soft prompt after each epoch."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lightning_peft.core.errors import TuningError

Words = list[list[tuple[str, float]]]


class NearestWords(L.Callback):
    """Prints the words nearest to each virtual token, and writes them into ``nearest_words.jsonl`` of the run's folder.

    A line holds ``epoch``, ``method`` and ``words``: for each virtual token, ``[word, cosine]`` of the nearest ones.

    Args:
        k: how many words of each virtual token.
        every_n_epochs: how often.
        tokens: how many virtual tokens the printed table shows; the file has all.
    """

    def __init__(self, k: int = 5, every_n_epochs: int = 1, tokens: int = 20) -> None:
        for name, value in (("k", k), ("every_n_epochs", every_n_epochs), ("tokens", tokens)):
            if value < 1:
                raise TuningError(f"NearestWords's {name}={value} is out of range: take 1 or more.")
        self.k, self.every_n_epochs, self.tokens = k, every_n_epochs, tokens

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
            name = type(method).__name__
            with (folder / "nearest_words.jsonl").open("a", encoding="utf-8") as file:
                line = {"epoch": trainer.current_epoch, "method": name, "words": words}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            Console().print(words_table(words[: self.tokens], f"{name}, epoch {trainer.current_epoch}"))

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
