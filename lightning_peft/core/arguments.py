"""Declares the bounds and choices of a method's arguments at its fields, and checks them before anything is changed.

The annotation says the type, the choices (``Literal``) and whether None is one; the default says which numbers are
taken, alone or in lists, as in ``dropout: float = rate(0.1)``. Every float is finite. A class that changes a default
keeps what its base says of the field.

>>> @dataclass
... class Noise:
...     scale: float = positive(1.0)
...     kind: Literal["white", "pink"] = choice("white", "is no colour")
>>> check_arguments(Noise(scale=0.0))
Traceback (most recent call last):
...
lightning_peft.core.errors.TuningError: Noise's scale=0.0 is out of range: take more than 0.
"""

import math
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_peft.core.errors import TuningError

T = TypeVar("T")
_KEY = "bounds"
_MOST = {int: 1e7, float: 1e12}
"""Numbers beyond which an argument of any method is a mistake; an integer is a size, and something is allocated."""


@dataclass(frozen=True)
class Bounds:
    """The range of numbers that a field takes, and the words of the error for other values."""

    otherwise: str = ""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def hold(self, number: float) -> bool:
        """Tell whether a number is within the bounds."""
        low = self.at_least is None or number >= self.at_least
        high = self.at_most is None or number <= self.at_most
        return (
            low and high and (self.above is None or number > self.above) and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        parts = (
            (self.at_least, "{:g} or more"),
            (self.above, "more than {:g}"),
            (self.below, "less than {:g}"),
            (self.at_most, "{:g} at most"),
        )
        return " and ".join(text.format(bound) for bound, text in parts if bound is not None) or "a finite number"


def bounded(default: T, otherwise: str = "", **ends: float) -> T:
    """Return a field whose numbers have `Bounds`; the error says ``otherwise`` of other values, as in "is no size"."""
    return field(default=default, metadata={_KEY: Bounds(otherwise, **ends)})


def natural(default: T, otherwise: str = "") -> T:
    """Return a field that takes numbers from 1 on."""
    return bounded(default, otherwise, at_least=1)


def numbers(default: list[int]) -> list[int]:
    """Return a field that takes a list of numbers from 0 on."""
    made: list[int] = field(default_factory=lambda: list(default), metadata={_KEY: Bounds(at_least=0)})
    return made


def positive(default: T, otherwise: str = "") -> T:
    """Return a field that takes numbers above 0."""
    return bounded(default, otherwise, above=0)


def rate(default: T, otherwise: str = "is no probability below 1") -> T:
    """Return a field that takes rates of dropout."""
    return bounded(default, otherwise, at_least=0, below=1)


def choice(default: T, otherwise: str) -> T:
    """Return a field that takes what its ``Literal`` says; the error says ``otherwise`` of other values."""
    return bounded(default, otherwise)


def check_arguments(method: Any) -> None:
    """Check that the arguments of a method are what its fields take.

    Raises:
        TuningError: one is not.
    """
    kind = type(method)
    try:
        hints = get_type_hints(kind)
    except NameError:  # a class may postpone annotations and import what they name for type checkers alone
        hints = {each.name: Any if isinstance(each.type, str) else each.type for each in fields(method)}
    for each in fields(method):
        value = getattr(method, each.name)
        problem = _problem(value, hints[each.name], bounds_of(kind, each.name), hints[each.name])
        if problem is not None:
            raise TuningError(f"{kind.__name__}'s {each.name}={value!r} {problem}.")


def check_divides(argument: str, value: int, size: int, whose: str, otherwise: str = "", least: int = 1) -> None:
    """Check that a size can be cut into parts of ``value``, or into as many.

    Args:
        argument: its name.
        value: what it is.
        size: what it must divide.
        whose: says in a message what the size is.
        otherwise: what else can be done than to take another value.
        least: the least value that can be taken.

    Raises:
        TuningError: it cannot; the nearest value that can is named.
    """
    if size % value:
        divisors = [d for d in range(least, size + 1) if size % d == 0]
        best = min(divisors, key=lambda d: (abs(d - value), -d), default=None)
        remedy = "leave it out with exclude=" if best is None else f"take {best}{otherwise}"
        raise TuningError(f"{argument}={value} does not divide {size}, which {whose}: {remedy}.")


def bounds_of(kind: type, name: str) -> Bounds:
    """Return the bounds of a field: those that the class says, or the nearest base that says some."""
    declared = (vars(base).get("__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next((each.metadata[_KEY] for each in declared if each is not None and _KEY in each.metadata), Bounds())


def _problem(value: Any, hint: Any, bounds: Bounds, whole: Any) -> str | None:
    """Return what is wrong with a value, or one in it, where ``whole`` is declared; None: nothing."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    option = next((option for option in options if _is_of(value, option)), None)
    kind, inner = get_origin(option) or option, get_args(option)
    if option is None:
        return f"is of another type: give {whole.__name__ if type(whole) is type else whole}".replace("typing.", "")
    if kind is Literal and value not in inner:
        take = "one" if hint is whole else "some"
        return f"{bounds.otherwise or 'is unknown'}: take {take} of {', '.join(map(str, inner))}"
    if kind in (list, dict) and inner:
        entries = value.values() if kind is dict else value
        if not value and get_origin(inner[-1]) is Literal:
            entries = ("",)  # no choice at all is none of them
        return next(filter(None, (_problem(entry, inner[-1], bounds, whole) for entry in entries)), None)
    if kind not in (int, float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"is not finite: take {bounds}"
    if abs(value) >= _MOST[kind]:
        return f"is out of range: take less than {_MOST[kind]:g}"
    return None if bounds.hold(value) else f"{bounds.otherwise or 'is out of range'}: take {bounds}"


def _is_of(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type, whatever is in it; an int is a float, a tuple a list, and a bool no number."""
    kind = get_origin(hint) or hint
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is Any or not isinstance(kind, type):
        return True
    return isinstance(value, (list, tuple) if kind is list else kind)
