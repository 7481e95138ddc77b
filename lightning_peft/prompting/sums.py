"""Sums in a text: where they are, and what they come to.

A sum is made of numbers, ``+ - * /``, powers and brackets. Units behind its numbers, bold type and the signs of money
are passed over; a root, a function, a letter that stands for a number and a remainder make it none.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from lightning_peft.prompting.numerals import SCALED, VULGAR, numbers

EQUALS: Final = "="
_MINUS, _OPEN, _CLOSE, _POWER = "-()^"
_NUMBER = r"\d{1,3}(?:[,.\u00a0\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?|[.]\d+"
_TOKEN = re.compile(
    rf"(?P<number>\d+[ ]\d+/[1-9]\d*(?![\d/])|(?:{_NUMBER})(?:{SCALED}|\s?[{VULGAR}])?|[{VULGAR}])(?P<percent>\s*%)?"
    r"|(?P<blank>[ \t]+|[$€£¥￥]|(?<![\d)])(?<![\d)] )\*\*|\*\*(?! ?[\d(])|^[ \t]*[-*•](?=\s))"  # bold type, a list
    r"|(?P<broken>√|(?<=[A-Za-wyz])\()"
    r"|(?P<ratio>(?<=\d):(?=\d)|(?<=\d ):(?= \d))"
    r"|(?P<sign>\*\*|[-+*/()=×÷·–^]|\\times|\\cdot|\\div|x(?![^\W\d_]))|(?P<power>[²³])"
    rf"|(?P<word>[^\W\d_{VULGAR}²³][^\W\d_]*|…+)|(?P<other>.|\n)",
    re.MULTILINE,
)
_SIGNS = {"×": "*", "x": "*", "·": "*", "\\times": "*", "\\cdot": "*", "÷": "/", "\\div": "/", "–": "-", "**": "^"}
_POWERS = {"²": 2, "³": 3}
_REMAINDERS = {"余", "餘", "あまり", "…", "……", "R", "r", "remainder", "Rest", "reste", "resto", "остаток"}
_LONGEST = 40
"""What a number, the brackets and the powers of a sum have at most [characters, brackets, powers]."""
_HIGHEST = 64
"""The greatest exponent that is worked out."""


@dataclass(frozen=True)
class Run:
    """A part of a text that may be sums.

    Args:
        text: its words.
        tokens: its numbers and signs.
        ends: where each of them ends in the words.
    """

    text: str
    tokens: list[Fraction | str]
    ends: list[int]


def runs(text: str, decimal: str) -> list[Run]:
    """Return the parts of a text with simple digits that may be sums.

    >>> [run.text for run in runs("2 盒 3 个, 一共 2 * 3 = 6 个。x + 1 = 4", ".")]
    ['2 盒', '3 个', '2 * 3 = 6 个']
    """
    if decimal == ",":  # the blanks of 1 234 567
        text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "\u00a0", text)
    reader = _Reader(text, decimal)
    for match in _TOKEN.finditer(text):
        reader.read(match)
    reader.end_run()
    return reader.found


class _Reader:
    """Puts the tokens of a text together."""

    def __init__(self, text: str, decimal: str) -> None:
        self.text, self.decimal = text, decimal
        self.found: list[Run] = []
        self.tokens: list[Fraction | str] = []
        self.ends: list[int] = []
        self.start = self.end = 0
        self.is_broken = False  # what follows is the end of a sum that cannot be read

    @property
    def last(self) -> Fraction | str | None:
        """The token before."""
        return self.tokens[-1] if self.tokens else None

    def read(self, match: re.Match[str]) -> None:
        """Go on by one token."""
        kind, piece = match.lastgroup if match.lastgroup != "percent" else "number", match[0]
        if kind == "blank":
            return
        if kind == "ratio":  # a division, in the languages that have a comma before decimals
            kind, piece = ("sign", "/") if self.decimal == "," else ("other", piece)
        if kind == "word" and isinstance(self.last, Fraction):
            if piece in _REMAINDERS:
                self.add(piece, match)
                return
            if not _is_variable(piece):
                self.end = self.ends[-1] = match.end()  # a unit
                return
        if kind == "broken" or kind in ("word", "other", None) or (kind == "number" and len(piece) > _LONGEST):
            self.end_run(is_broken=kind == "broken")
        elif kind == "power":
            if self.tokens:
                self.add(_POWER, match)
                self.add(Fraction(_POWERS[piece]), match)
        elif kind == "number":
            self.read_number(match)
        else:
            self.read_sign(_SIGNS.get(piece, piece), match)

    def read_number(self, match: re.Match[str]) -> None:
        """Go on by a number; behind another one, or a closed bracket, it begins anew."""
        if isinstance(self.last, Fraction) or self.last == _CLOSE:
            self.end_run()
        if not self.is_broken:
            value = Fraction(numbers(match["number"], self.decimal)[0])
            self.add(value / 100 if match["percent"] else value, match)

    def read_sign(self, sign: str, match: re.Match[str]) -> None:
        """Go on by a sign; a bracket right behind a number multiplies it, and ends it behind a blank."""
        if sign == _CLOSE and self.tokens.count(_OPEN) <= self.tokens.count(_CLOSE):  # 1) of a list
            self.end_run()
            return
        if sign == _OPEN and (isinstance(self.last, Fraction) or self.last == _CLOSE):
            if self.text[match.start() - 1].isspace():
                self.end_run()
            else:
                self.add("*", match)
        if not self.tokens and not self.begins(sign, match.start()):
            self.is_broken = True
        if not self.is_broken:
            self.add(sign, match)

    def begins(self, sign: str, place: int) -> bool:
        """Tell whether a sign may begin a sum: a bracket, or a minus that belongs to its number, and to no letter."""
        if sign == _OPEN:
            return True
        after, before = self.text[place + 1 : place + 2], self.text[place - 1 : place]
        return sign == _MINUS and after.isdecimal() and not (before.isalnum() or before == _CLOSE)

    def add(self, token: Fraction | str, match: re.Match[str]) -> None:
        """Add a token to the run."""
        self.start = self.start if self.tokens else match.start()
        self.end = match.end()
        self.tokens.append(token)
        self.ends.append(match.end())

    def end_run(self, is_broken: bool = False) -> None:
        """Keep the run, if there is one, and begin another."""
        if self.tokens:
            ends = [place - self.start for place in self.ends]
            self.found.append(Run(self.text[self.start : self.end], self.tokens, ends))
        self.tokens, self.ends, self.is_broken = [], [], is_broken


def _is_variable(word: str) -> bool:
    """Tell whether a word behind a number is what it is multiplied by, as in 2y, and no unit."""
    return len(word) == 1 and word.isascii() and word not in "mglLhst"


def worked_out(tokens: Sequence[Fraction | str]) -> Fraction:
    """Return what a sum comes to.

    Raises:
        ValueError: it is no sum.
    """
    if max(tokens.count(_OPEN), tokens.count(_POWER)) > _LONGEST:
        raise ValueError("it has too many brackets, or powers.")
    return _Sum(tokens).value()


class _Sum:
    """Works out a sum of numbers, ``+ - * /``, powers and brackets."""

    def __init__(self, tokens: Sequence[Fraction | str]) -> None:
        self.tokens = [*tokens, ""]
        self.place = 0

    def value(self) -> Fraction:
        """Return what it comes to."""
        value = self._terms()
        if self.place != len(self.tokens) - 1:
            raise ValueError(f"{self.tokens[self.place]!r} ends no sum.")
        return value

    def _terms(self) -> Fraction:
        value = self._product()
        while self.tokens[self.place] in ("+", "-"):
            sign = self._next()
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while self.tokens[self.place] in ("*", "/"):
            sign = self._next()
            value = value * self._factor() if sign == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        sign = 1
        while self.tokens[self.place] == _MINUS:
            self._next()
            sign = -sign
        value = self._atom()
        if self.tokens[self.place] == _POWER:
            self._next()
            power = self._factor()
            if power.denominator != 1 or not abs(power) <= _HIGHEST or abs(value) > 10**_LONGEST:
                raise ValueError(f"a power of {power} is not worked out.")
            value = Fraction(value ** int(power))
        return sign * value

    def _atom(self) -> Fraction:
        token = self._next()
        if isinstance(token, Fraction):
            return token
        if token == _OPEN:
            value = self._terms()
            if self._next() != _CLOSE:
                raise ValueError("a bracket is open.")
            return value
        raise ValueError(f"{token!r} is no number.")

    def _next(self) -> Fraction | str:
        self.place = min(self.place + 1, len(self.tokens))
        return self.tokens[self.place - 1]
