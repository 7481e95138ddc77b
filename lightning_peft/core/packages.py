"""Finds what the files of a package define, so that no list has to name it."""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

T = TypeVar("T")


def classes_in(package: str, path: Iterable[str], base: type[T]) -> list[type[T]]:
    """Return the classes of a kind that the files of a package define, in the order of files and lines.

    Args:
        package: its name.
        path: its ``__path__``.
        base: what the classes derive from.
    """
    modules = [import_module(f"{package}.{file.name}") for file in iter_modules(path)]
    return [
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
    ]
