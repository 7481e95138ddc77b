"""The methods, one file each."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_peft.training.method import Method


def every_method() -> "dict[str, type[Method]]":
    """Return the methods of this package by name, in the order of the alphabet."""
    from lightning_peft.training.method import Method

    modules = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    found = {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
