"""The parts of a template: text, and the slots for fields, virtual tokens, the mask, the answer and the options."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, TypeAlias

from lightning_peft.core.errors import TuningError


@dataclass(frozen=True)
class Text:
    """Words of the template itself."""

    text: str


@dataclass(frozen=True)
class Field:
    """A field of a row; ``shortens`` tells whether truncation may cut it."""

    name: str
    shortens: bool = True


@dataclass(frozen=True)
class Soft:
    """Virtual tokens ``first`` to ``first + count - 1``: ids ``-1 - first`` and down."""

    count: int
    first: int = 0


@dataclass(frozen=True)
class Mask:
    """The mask that a masked language model fills in."""


@dataclass(frozen=True)
class Answer:
    """The answer that a language model generates."""


@dataclass(frozen=True)
class Options:
    """The answers to choose from."""


@dataclass(frozen=True)
class Lettered:
    """The options of the row itself, with letters."""


Part: TypeAlias = Text | Field | Soft | Mask | Answer | Options | Lettered


RESERVED: dict[str, Part] = {"mask": Mask(), "answer": Answer(), "options": Options(), "lettered": Lettered()}


def lettered(options: Sequence[str]) -> str:
    r"""Return options with letters, one a line.

    >>> lettered(["rice", "soup"])
    '(A) rice\n(B) soup'

    Raises:
        TuningError: there are more options than letters.
    """
    if len(options) > len(ascii_uppercase):
        raise TuningError(f"{len(options)} options have no letter each: give {len(ascii_uppercase)} or fewer.")
    return "\n".join(f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def options_text(options: Sequence[str]) -> str:
    r"""Return the answers to choose from, as FLAN writes them.

    >>> options_text(["yes", "no"])
    'OPTIONS:\n- yes\n- no'
    """
    return "\n".join(["OPTIONS:", *(f"- {option}" for option in options)])


def words_of(value: Any, name: str) -> str:
    """Return the value of a field as text; a missing one is the empty text.

    Raises:
        TuningError: it is neither text nor number.
    """
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    raise TuningError(f"field {name!r} holds a {type(value).__name__}: templates take texts and numbers.")


def add_text(parts: list[Part], text: str) -> None:
    """Put text behind the parts, as one part with the text that they may end in."""
    if text and parts and isinstance(parts[-1], Text):
        parts[-1] = Text(parts[-1].text + text)
    elif text:
        parts.append(Text(text))
