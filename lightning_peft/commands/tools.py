"""``methods``, ``templates``, ``info``, ``merge`` and ``plot``: commands that need files but no Trainer.

What one of them needs is imported when it runs: ``templates`` needs no torch, ``info`` neither lightning nor
transformers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from lightning_peft.commands import imports
from lightning_peft.commands.config_files import configs
from lightning_peft.commands.parsing import ToolParser
from lightning_peft.core.errors import TuningError

if TYPE_CHECKING:
    from lightning_peft.core.method import TuningMethod


def run_tool(command: str, arguments: Sequence[str]) -> None:
    """Run one of the commands with the arguments that follow it."""
    if command in ("export", "import"):
        with imports():
            from lightning_peft.commands.interchange import run_interchange
        run_interchange(command, arguments)
        return
    if command == "push":
        from lightning_peft.commands.pushing import run_push

        run_push(arguments)
        return
    if command == "combine":
        with imports():
            from lightning_peft.commands.combining import run_combine
        run_combine(arguments)
        return
    functions: dict[str, Callable[..., None]] = {
        "methods": methods, "configs": configs, "info": info, "merge": merge_files, "plot": plot_rows,
        "templates": templates,
    }  # fmt: skip
    if command == "chat":
        with imports():
            from lightning_peft.commands.chatting import chat
        functions["chat"] = chat
    function = functions[command]
    arguments = _by_name(command, list(arguments))
    parser = ToolParser(prog=f"lightning-peft {command}", description=(function.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    function(**parser.parse_args(arguments).as_dict())


def _by_name(command: str, arguments: list[str]) -> list[str]:
    """Give the words that a command begins with, which may be left out, the names of its arguments."""
    names = {"methods": ["name"], "configs": ["action", "name"]}.get(command, [])
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    given = [part for name, word in zip(names, words, strict=False) for part in (f"--{name}", word)]
    return [*given, *arguments[len(given) // 2 :]]


def methods(name: str | None = None) -> None:
    """List the methods by kind, what they train and their papers; or the arguments of one.

    Args:
        name: a method, to see its arguments.
    """
    with imports():
        from lightning_peft.commands.method_kinds import by_kind
        from lightning_peft.core.select import near
        from lightning_peft.methods import every_method

        every = every_method()
    if name is not None and name not in every:
        raise TuningError(f"{name!r} is no method{near(name, every)}.")
    if name is not None:
        _describe(name, every[name])
        return
    table = Table(title="Methods", title_justify="left")
    for column in ("method", "kind", "trains", "paper"):
        table.add_column(column, overflow="fold")
    for of_kind in by_kind().values():
        table.add_section()
        for each, method in of_kind.items():
            table.add_row(each, *row_of(method))
    console = Console()
    console.print(table)
    console.print("lightning-peft methods NAME shows the arguments of one, with its paper.", highlight=False)


def row_of(method: "type[TuningMethod]") -> tuple[str, str, str]:
    """Return the row of a method in the table: its kind, what it trains, and authors and year of its paper."""
    return method.kind, method.trains, method.paper.split(", arXiv")[0]


def _describe(name: str, method: "type[TuningMethod]") -> None:
    """Print a method's first line, its paper, and its arguments with their defaults and meanings."""
    import docstring_parser

    console = Console()
    console.print(f"[bold]{name}[/bold]: {(method.__doc__ or '').splitlines()[0]}", highlight=False)
    console.print(method.paper, highlight=False)
    advised = method.advised
    for what, rates in (("", advised), (" on images", advised.images), (" with a new head", advised.headed)):
        if rates is not None:
            said = f"{rates.delta:g} for what it trains, {rates.head:g} for a head ({rates.source})"
            if rates.optimizer == "SGD":
                said = f"{rates.delta:g} by SGD ({rates.source})"
            console.print(f"Learning rates{what}: {said}.", highlight=False)
    meanings: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        documented = docstring_parser.parse(kind.__doc__ or "")
        meanings |= {p.arg_name: " ".join((p.description or "").split()) for p in documented.params}
    table = Table(show_lines=False)
    for column in ("argument", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for field in dataclasses.fields(method):
        default = field.default_factory() if callable(field.default_factory) else field.default
        table.add_row(field.name, escape(repr(default)), escape(meanings.get(field.name, "")))
    console.print(table)


def templates(file: str) -> None:
    """List the wordings of a task.

    Args:
        file: a YAML file of templates.
    """
    from lightning_peft.prompting.instruction_files import read_instructions

    found = read_instructions(file, count=None)
    table = Table(title=found.task, title_justify="left")
    for column in ("template", "scored", "text"):
        table.add_column(column, overflow="fold")
    for template in found.templates:
        table.add_row(template.name, "no, inverse" if template.inverse else "yes", escape(template.text))
    Console().print(table)
    if found.words:
        Console().print(", ".join(f"{label}: {word}" for label, word in found.words.items()), highlight=False)


def info(file: str, tensors: bool = True) -> None:
    """Show what a delta file holds.

    Args:
        file: a delta, as safetensors or checkpoint.
        tensors: list its tensors, too.
    """
    from lightning_peft.core.delta_file import read_delta
    from lightning_peft.reports.parameters import count, dtypes, size

    held, meta = read_delta(file)
    table = Table(show_header=False, title=escape(str(file)), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def add(name: str, value: str) -> None:
        table.add_row(name, escape(value))

    for entry in meta["methods"]:
        arguments = ", ".join(f"{k}={v!r}" for k, v in entry["init_args"].items() if v is not None)
        add("method", f"{entry['class_path'].rpartition('.')[2]}({arguments})")
    for path, backbone in meta["backbones"].items():
        origin = f" of {backbone['name_or_path']}" if backbone["name_or_path"] else ""
        add("backbone", f"{backbone['class']}{origin}" + (f", at {path}" if path else ""))
        add("fingerprint", backbone["fingerprint"])
    add("tensors", f"{len(held)}, {count(held.values()):,} values, {dtypes(held.values())}")
    add("size", f"{size(Path(file).stat().st_size)} ({size(sum(t.nbytes for t in held.values()))} of tensors)")
    add("resumes", "yes, with optimizer and random state" if "resume" in meta else "no, weights only")
    add("written with", ", ".join(f"{package} {number}" for package, number in meta["versions"].items()))
    Console().print(table)
    if not tensors:
        return
    names = Table("shape", "dtype", Column("tensor", overflow="fold"))
    for name, tensor in held.items():
        names.add_row(str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch."), escape(name))
    Console().print(names)


def merge_files(file: str, folder: str, backbone: str | None = None) -> None:
    """Fold a delta into its backbone and write a plain model folder, which AutoModel loads without this package.

    Args:
        file: a delta, as safetensors or checkpoint.
        folder: where to write the model.
        backbone: folder or hub id of the backbone; the one that the delta was trained on if left out.
    """
    with imports():
        from lightning_peft.core.folding import merge
        from lightning_peft.core.hub import load_tokenizer
        from lightning_peft.core.structure import name_or_path
        from lightning_peft.training.rebuild import from_delta
    if Path(folder).is_file():
        raise TuningError(f"{folder} is a file: give a new folder.")
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise TuningError(f"{folder} is not empty: give a new folder.")
    model = from_delta(file, backbone)
    origin = backbone or name_or_path(model)
    merge(model)
    model.save_pretrained(folder)  # type: ignore[operator]
    try:
        load_tokenizer(origin).save_pretrained(folder)
        kept = "with its tokenizer"
    except TuningError:
        kept = f"without a tokenizer: {origin} has none"
    Console(soft_wrap=True).print(f"{type(model).__name__} written to {folder}, {kept}.", highlight=False)


def plot_rows(file: str, folder: str) -> None:
    """Draw pictures of results: every picture that the rows of a file have values for, and its rows beside it.

    Args:
        file: rows of results as the callback ResultRows writes them, .csv or .jsonl.
        folder: where to write.
    """
    from lightning_peft.reports.plots import plot

    for picture in plot(file, folder):
        Console(soft_wrap=True).print(str(picture), highlight=False)
