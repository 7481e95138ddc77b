"""``predict --text``: what a tuned model says of texts from the shell, by its checkpoint alone."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lightning_peft import tasks
from lightning_peft.commands.parsing import ToolParser
from lightning_peft.commands.using import lines_of
from lightning_peft.core.delta_file import CLASS_PATH, meta_of, read_checkpoint
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic
from lightning_peft.data.sources import ENDINGS
from lightning_peft.data.stdlib_docstrings import StdlibDocstrings
from lightning_peft.tasks.base import Task
from lightning_peft.training.rebuild import load_from_checkpoint

_OWN = "lightning-peft fit --config quickstart --config files --data.train mine.csv"
_SHOWN = 3
"""How many of the likeliest classes of a text are shown."""


def predict(words: Sequence[str]) -> None:
    """Print what the model of a checkpoint says of each text."""
    parser = ToolParser(prog="lightning-peft predict --text", description="Print what a tuned model says of texts.")
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint that fit has written")
    parser.add_argument("--text", type=str, nargs="+", required=True, help="the texts, or files.txt of one a line")
    parser.add_argument("--out", type=str | None, default=None, help="a file of JSON lines to write, not a table")
    parser.add_argument("--max_length", type=int | None, default=None, help="where a text is cut [tokens]")
    given = parser.parse_args(_together(words))
    texts = [text for word in given.text for text in texts_of(word)]
    rows = load_task(given.ckpt_path).predict(texts, max_length=given.max_length)
    if given.out is not None:
        with atomic(Path(given.out)) as temporary:
            temporary.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
        Console(soft_wrap=True).print(f"{len(rows)} answers in {given.out}", highlight=False, markup=False)
        return
    Console().print(_table(rows))
    known = read_checkpoint(given.ckpt_path).get("datamodule_hyper_parameters") or {}
    if str(known.get(CLASS_PATH)).rpartition(".")[2] == StdlibDocstrings.__name__:
        Console(soft_wrap=True).print(f"on a CSV file of yours: {_OWN}", highlight=False)


def texts_of(word: str) -> list[str]:
    """Return a text, or the lines of a file of texts.

    Raises:
        TuningError: the file has no line, or is one of rows.
    """
    path = Path(word)
    if path.suffix not in (".txt", *ENDINGS) or not path.is_file():
        return [word]
    if path.suffix != ".txt":
        raise TuningError(
            f"--text {word} is a file of rows: give a .txt with one text a line, or --data.predict {word} with the "
            "--config of the fit."
        )
    return lines_of(path, "--text")


def load_task(path: str) -> Task:
    """Return the task of a checkpoint with its delta.

    Raises:
        TuningError: the checkpoint is of no task of this package.
    """
    checkpoint = read_checkpoint(path)
    meta = meta_of(checkpoint, path)
    hyper: Mapping[str, Any] = checkpoint.get("hyper_parameters", {})
    package, _, name = str(hyper.get(CLASS_PATH)).rpartition(".")  # the command line writes lightning_peft.NAME
    found = vars(tasks).get(name) if package.partition(".")[0] == "lightning_peft" else None
    kind = found if isinstance(found, type) and issubclass(found, Task) else None
    if kind is None:
        raise TuningError(
            f"{path} does not say which task of lightning_peft it is of: load it by load_from_checkpoint of your "
            "class, and call its predict."
        )
    told = {}
    takes = "labels" in inspect.signature(kind).parameters
    if takes and "labels" not in hyper:  # the command line gives them to the task from the data
        names = [b["config"].get("id2label") for b in meta["backbones"].values()]
        told = {"labels": list(names[0].values())} if names and names[0] else {}
    return load_from_checkpoint(kind, path, **told)


def _together(words: Sequence[str]) -> list[str]:
    """Return the arguments with the texts of several ``--text`` behind one."""
    kept, texts, into = [], [], False
    for word in words:
        option, equals, rest = word.partition("=")
        if option.startswith("--"):
            into = option == "--text"
            if not into:
                kept.append(word)
            elif equals:
                texts.append(rest)
        else:
            (texts if into else kept).append(word)
    return [*kept, "--text", *texts]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of texts, each with its answer and the likeliest classes."""
    scored = all("probabilities" in row for row in rows)
    table = Table(Column("text", overflow="fold"), Column("answer", overflow="fold"))
    if scored:
        table.add_column("probabilities", overflow="fold")
    for row in rows:
        answer = str(row["label"] if "label" in row else row["written"])
        cells = [row["text"], answer]
        if scored:
            likely = sorted(row["probabilities"].items(), key=lambda item: -item[1])[:_SHOWN]
            cells.append(", ".join(f"{name} {p:.3f}" for name, p in likely))
        table.add_row(*(escape(cell) for cell in cells))
    return table
