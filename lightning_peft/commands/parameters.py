"""What a class is built with, as a command line may give it."""

import inspect
from functools import cache
from typing import Any, NamedTuple, get_type_hints


class Argument(NamedTuple):
    """The annotation of an argument, `Any` where it has none, and its default, ``inspect.Parameter.empty`` if none."""

    hint: Any
    default: Any

    @property
    def is_required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty


@cache
def arguments_of(kind: type) -> dict[str, Argument]:
    """Return the arguments of a class by name, those that it hands on to its parents before its own."""
    found: dict[str, Argument] = {}
    for base in kind.__mro__:
        init = vars(base).get("__init__")
        if not inspect.isfunction(init):
            continue
        try:
            hints = get_type_hints(init)
        except (NameError, TypeError):  # an annotation that is there for type checkers alone
            hints = {}
        own = list(inspect.signature(init).parameters.values())[1:]
        named = [each for each in own if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        found = {each.name: Argument(hints.get(each.name, Any), each.default) for each in named} | found
        if all(each.kind is not each.VAR_KEYWORD for each in own):
            break
    return found
