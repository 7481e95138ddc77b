"""``fit --help``: what one may want, on a screen; ``--help all`` has every argument, those of Lightning too."""

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_peft.commands.parameters import arguments_of
from lightning_peft.core import shipped

_PLACES = {"model": "task", "data": "data", "method": "method"}
TRAINER = (
    *("max_epochs", "max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision"),
    *("gradient_clip_val", "accumulate_grad_batches", "val_check_interval", "default_root_dir", "callbacks", "logger"),
)
_WHAT = {
    "fit": "Train a method on a task, and keep the delta.",
    "validate": "Score a delta on the validation split.",
    "test": "Score a delta on the test split.",
    "predict": "Write what a tuned model says of new rows.",
    "search": "Find a template for a prompted task.",
    "check": "Run a few steps and say what passes, before it costs GPU hours.",
}
WIDTH = 80


def is_asked(words: Sequence[str]) -> bool:
    """Tell whether these arguments ask for the short help."""
    asked = next((i for i, word in enumerate(words) if word in ("-h", "--help")), None)
    return asked is not None and list(words[asked + 1 : asked + 2]) != ["all"]


def show(command: str, words: Sequence[str]) -> None:
    """Print the short help of a command; of the classes that the arguments name it has their own arguments."""
    print("\n".join(_lines(command, classes_named(words))))


def _lines(command: str, chosen: dict[str, str]) -> Iterator[str]:
    yield f"usage: lightning-peft {command} --config FILE [--config FILE ...] [ARGUMENTS]"
    yield f"{_WHAT[command]}\n"
    yield from _entry("--config FILE", "a YAML file, or a name that lightning-peft configs lists; several add up")
    kinds = _kinds()
    yield from _entry("--model TASK", ", ".join(kinds["model"]))
    yield from _entry("--model.model MODEL", "the backbone: a folder, a hub id, or package://NAME/FOLDER")
    yield from _entry("--data DATA", ", ".join(kinds["data"]))
    yield from _entry("--method METHOD", ", ".join(kinds["method"]))
    yield from _entry("--ckpt_path FILE", "the checkpoint to go on from" if command == "fit" else "the delta")
    yield from _entry("--seed_everything N", "of all that is random; 0")
    if command == "fit":
        yield from _entry("--lr_find true", "look for the factor of the learning rates, first")
    for place, name in chosen.items():
        yield f"\nthe {_PLACES[place]} {name}, each as --{place}.NAME VALUE:"
        yield _wrapped(_with_defaults(name))
    for place in _PLACES.keys() - chosen.keys():
        yield f"\nname a {_PLACES[place]}, by --config or --{place}, to see its arguments"
    yield "\nthe Trainer, each as --trainer.NAME VALUE:"
    yield _wrapped(TRAINER)
    yield f"\nalso --optimizer, --lr_scheduler, --print_config\nevery argument: lightning-peft {command} --help all"


def classes_named(words: Sequence[str]) -> dict[str, str]:
    """Return place -> the name of the class, of files and options; the last one wins."""
    found: dict[str, str] = {}
    for option, value in zip(words, [*words[1:], ""], strict=False):
        option, equals, rest = option.partition("=")
        value = rest if equals else value
        if option in ("-c", "--config") and (path := shipped.find(value)) is not None:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            named: dict[str, Any] = {p: content.get(p) for p in _PLACES} if isinstance(content, dict) else {}
            found |= {p: c["class_path"] if isinstance(c, dict) else c for p, c in named.items() if _is_class(c)}
        elif option.removeprefix("--") in _PLACES and value and not value.startswith("-"):
            found[option.removeprefix("--")] = value
    known = {name for names in _kinds().values() for name in names}
    last = {place: name.rpartition(".")[2] for place, name in found.items()}
    return {place: last[place] for place in _PLACES if last.get(place) in known}


def _is_class(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("class_path"), str))


@cache
def _kinds() -> dict[str, list[str]]:
    """Return place -> the names of the classes of this package that it takes."""
    import lightning as L

    import lightning_peft
    from lightning_peft.tasks.base import Task
    from lightning_peft.training.method import Method

    kinds: dict[str, Any] = {"model": Task, "data": L.LightningDataModule, "method": Method}
    every = {name: getattr(lightning_peft, name) for name in dir(lightning_peft) if name[0].isupper()}
    return {
        place: [n for n, each in every.items() if inspect.isclass(each) and issubclass(each, kind) and each is not kind]
        for place, kind in kinds.items()
    }


def _with_defaults(name: str) -> list[str]:
    """Return the arguments of a class with their defaults; those that the command line fills in are left out."""
    import lightning_peft

    filled = {"tokenizer", "processor", "labels", "model"}
    return [
        name if each.is_required or str(each.default).startswith("<factory>") else f"{name}={_value(each.default)}"
        for name, each in arguments_of(getattr(lightning_peft, name)).items()
        if name not in filled
    ]


def _value(default: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(default) if isinstance(default, bool | None) else None
    return text or (default if isinstance(default, str) and default else repr(default))


def _entry(option: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(text, WIDTH - 23)
    yield f"  {option:<19}  {lines[0]}"
    yield from (f"{'':<23}{line}" for line in lines[1:])


def _wrapped(parts: Sequence[str]) -> str:
    return textwrap.fill(", ".join(parts), WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
