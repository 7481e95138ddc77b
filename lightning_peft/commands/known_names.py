"""The names of arguments of a command line: those that a user may have meant, and those that are missing."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

import lightning_peft
from lightning_peft.commands.parameters import arguments_of
from lightning_peft.commands.short_help import classes_named
from lightning_peft.commands.wording import ALIASES
from lightning_peft.training.method import Method


def known_names(parser: LightningArgumentParser) -> list[str]:
    """Return the names of arguments that a user may have meant."""
    names = set(re.findall(r"--([\w.]*\w)", parser.format_help()))
    names.update(f"trainer.{argument}" for argument in inspect.signature(L.Trainer).parameters)
    kinds: list[type[Any]] = [Method, *_below(Method), *_below(L.LightningModule), *_below(L.LightningDataModule)]
    for kind in kinds:
        if kind.__module__.startswith("lightning_peft"):
            names.update(inspect.signature(kind).parameters)
            names.add(kind.__name__)
    return sorted(names | {name.rpartition(".")[2] for name in names})


def names_at_hand(word: str, words: Sequence[str]) -> list[str]:
    """Return the arguments of the class that an argument was meant for, where the command line says which it is."""
    meant = re.compile(rf"--(model|data|method)\.(?:init_args\.)?{re.escape(word)}(?:=.*)?")
    option = next((found for found in map(meant.fullmatch, words) if found), None)
    chosen = classes_named(words).get(option[1]) if option is not None else None
    return list(arguments_of(getattr(lightning_peft, chosen))) if chosen is not None else []


def with_place(word: str, words: Sequence[str]) -> str:
    """Return ``model.lr`` for ``--lr``, where a class that the command line names has such an argument, or ''."""
    name = ALIASES.get(word, word)
    if "--" + word not in {each.partition("=")[0] for each in words}:
        return ""
    places = classes_named(words).items()
    found = (f"{place}.{name}" for place, kind in places if name in arguments_of(getattr(lightning_peft, kind)))
    return next(found, "")


def missing(names: list[str]) -> str:
    """Say which options are missing: ``fit.data`` is ``--data``, and ``model`` what the class of ``--model`` needs."""
    places = {"model": L.LightningModule, "data": L.LightningDataModule, "method": Method}
    options = []
    for name in names:
        holders = [place for place, kind in places.items() if _needs(kind, name)]
        whole = "." in name or not holders
        options += [f"--{name.rpartition('.')[2]}"] if whole else [f"--{place}.{name}" for place in holders[:1]]
    said = " and ".join(options) + (" is missing" if len(options) == 1 else " are missing")
    if options == ["--model.model"]:
        return f"{said}: give the backbone, a folder or hub id."
    return f"{said}: give them here or in a file, such as one that lightning-peft configs lists."


def _needs(kind: type[Any], name: str) -> bool:
    """Tell whether a class of this package of that kind cannot be made without an argument."""
    ours: list[type] = [each for each in _below(kind) if each.__module__.startswith("lightning_peft")]
    return any((one := arguments_of(each).get(name)) is not None and one.is_required for each in ours)


def _below(kind: type[Any]) -> list[type[Any]]:
    direct: list[type[Any]] = kind.__subclasses__()
    return [child for one in direct for child in (one, *_below(one))]
