"""The methods, one file each."""

from typing import TYPE_CHECKING

from lightning_peft.core.packages import classes_in

if TYPE_CHECKING:
    from lightning_peft.training.method import Method


def every_method() -> "dict[str, type[Method]]":
    """Return the methods of this package by name, in the order of the alphabet."""
    from lightning_peft.training.method import Method

    found = sorted(classes_in(__name__, __path__, Method), key=lambda kind: kind.__name__.lower())
    return {kind.__name__: kind for kind in found}
