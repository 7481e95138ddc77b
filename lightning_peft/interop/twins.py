"""The types of adapters that methods declare themselves."""

from typing import Any

from lightning_peft.core.twin import Twin
from lightning_peft.interop.schema import BY_TYPE, Kind
from lightning_peft.methods import every_method

TWINS: dict[str, tuple[str, Twin]] = {
    method.twin.peft_type: (name, method.twin) for name, method in every_method().items() if method.twin is not None
}
"""Type of an adapter -> the name of the method, and what it says of it."""


def kinds_of(peft_type: str) -> dict[str, tuple[Kind, ...]]:
    """Return the kinds of value of the keys that are arguments of a method; of its other numbers and texts, none."""
    if peft_type not in TWINS:
        return {}
    twin = TWINS[peft_type][1]
    plain: dict[str, Any] = {key: value for key, value in twin.defaults.items() if type(value) in BY_TYPE}
    words = {key: [word for _, word in twin.words.get(name, ())] for name, key in twin.arguments.items()}
    return {
        key: tuple(BY_TYPE[kind] for kind in dict.fromkeys(map(type, [value, *words[key]]))) if key in words else ()
        for key, value in plain.items()
    }
