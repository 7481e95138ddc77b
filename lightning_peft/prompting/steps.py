"""Checks the arithmetic in a chain of thought: every ``expression = number`` is worked out anew, without ``eval``.

A step may hold units ("2 盒 * 3 个 = 6 个网球", "$5 + $6 = $11"); what cannot be read as a sum is no step. A wrong step
says more than its expression gives, or less; a rounded number counts as right to its last decimal. A step is unused if
nothing later computes with its number and it is not the answer.

Source: the errors that Wei et al. 2022 (2201.11903, appendix D) sort chains of thought by; filtering before the vote
goes beyond Wang et al. 2022 (2203.11171), who count all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from lightning_peft.prompting.numerals import numbers, simple

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:[,.\u00a0\u202f]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)?|[.]\d+)(?P<percent>\s*%)?"
    r"|(?P<sign>[-+*/()=×÷·–]|x(?![^\W\d_])|[$€£¥￥])|(?P<word>[^\W\d_]+)|(?P<blank>[ \t]+)|(?P<other>.|\n)"
)
_SIGNS = {"×": "*", "x": "*", "·": "*", "÷": "/", "–": "-"}
_MINUS, _EQUALS, _OPEN, _CLOSE = "-=()"
_MONEY = "$€£¥￥"
_LONGEST = 40
"""What a number or the brackets of a sum have at most [characters, brackets]."""
_Tokens = list[Fraction | str]


@dataclass(frozen=True)
class Step:
    """One ``expression = number`` of a rationale.

    Args:
        text: its words.
        operands: the numbers of the expression.
        value: what the expression comes to; None: it divides by zero.
        said: the number that stands behind it.
        right: whether that is so, up to its last decimal.
    """

    text: str
    operands: tuple[Fraction, ...]
    value: Fraction | None
    said: Fraction
    right: bool


@dataclass(frozen=True)
class Checked:
    """What a check of a rationale found.

    Args:
        steps: the sums that it works out.
        unused: those whose number nothing later uses.
        consistent: whether the last step comes to the answer; None: there is no step, or no answer.
    """

    steps: tuple[Step, ...]
    unused: tuple[Step, ...]
    consistent: bool | None

    @property
    def wrong(self) -> tuple[Step, ...]:
        """The steps that are not right."""
        return tuple(step for step in self.steps if not step.right)

    @property
    def holds(self) -> bool:
        """Whether no step is wrong and the answer, if there is one, is that of the last step."""
        return not self.wrong and self.consistent is not False


def check_steps(text: str, answer: str | None = None, decimal: str = ".") -> Checked:
    """Return what a check of the sums in a rationale finds.

    >>> found = check_steps("2 盒 3 个网球, 一共就是 2 * 3 = 6 个网球。5 + 6 = 12。", "12")
    >>> [(step.text, step.right) for step in found.steps], len(found.unused), found.consistent
    ([('2 * 3 = 6 个网球', True), ('5 + 6 = 12', False)], 0, True)

    Args:
        text: the rationale.
        answer: the answer that it leads to, a number; None: there is none.
        decimal: the mark before decimals.
    """
    steps = tuple(step for run in _runs(simple(text), decimal) for step in _steps(*run))
    last = Fraction(answer) if answer is not None else None
    unused = []
    for number, step in enumerate(steps):
        later = [operand for other in steps[number + 1 :] for operand in other.operands]
        is_end = step.said == last if last is not None else number == len(steps) - 1
        if step.said not in later and not is_end:
            unused.append(step)
    consistent = None if last is None or not steps else steps[-1].said == last
    return Checked(steps, tuple(unused), consistent)


def sound(answers: Sequence[str | None], checks: Sequence[Checked]) -> list[str | None]:
    """Return answers with None in place of those whose rationale does not hold; all of them where none holds."""
    kept = [answer if check.holds else None for answer, check in zip(answers, checks, strict=True)]
    return kept if any(answer is not None for answer in kept) else list(answers)


def _runs(text: str, decimal: str) -> list[tuple[str, _Tokens, list[int]]]:
    """Return the parts of a text that may be sums: their words, their tokens, and the ends of these in the words."""
    runs: list[tuple[str, _Tokens, list[int]]] = []
    tokens: _Tokens = []
    ends: list[int] = []
    start = end = 0
    is_broken = False  # it begins with the end of a sum that cannot be read
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup if match.lastgroup != "percent" else "number"
        piece = match[0]
        if kind == "blank" or (kind == "sign" and piece in _MONEY):
            continue
        if kind == "word" and tokens and isinstance(tokens[-1], Fraction) and not _is_variable(piece):
            end = ends[-1] = match.end()  # a unit
            continue
        if kind == "number" and len(piece) > _LONGEST:
            kind = "other"
        if tokens and isinstance(tokens[-1], Fraction) and (kind == "number" or piece == _OPEN):
            runs.append((text[start:end], tokens, [place - start for place in ends]))
            tokens, ends = [], []
        if kind == "sign" and not tokens and not _begins(text, match.start()):
            is_broken = True
        if kind in ("number", "sign") and is_broken:
            continue
        if kind in ("number", "sign"):
            start = start if tokens else match.start()
            end = match.end()
            tokens.append(_number(match, decimal) if kind == "number" else _SIGNS.get(piece, piece))
            ends.append(end)
            continue
        if tokens:
            runs.append((text[start:end], tokens, [place - start for place in ends]))
        tokens, ends, is_broken = [], [], False
    return [*runs, (text[start:end], tokens, [place - start for place in ends])] if tokens else runs


def _is_variable(word: str) -> bool:
    """Tell whether a word behind a number is what it is multiplied by, as in 2y, and no unit."""
    return len(word) == 1 and word.isascii() and word not in "mglLhst"


def _begins(text: str, place: int) -> bool:
    """Tell whether a sign may begin a sum: a bracket, or a minus that belongs to its number, and to no letter."""
    if text[place] == _OPEN:
        return True
    after, before = text[place + 1 : place + 2], text[place - 1 : place]
    return text[place] == _MINUS and after.isdecimal() and not (before.isalnum() or before == _CLOSE)


def _number(match: re.Match[str], decimal: str) -> Fraction:
    value = Fraction(numbers(match["number"], decimal)[0])
    return value / 100 if match["percent"] else value


def _steps(text: str, tokens: _Tokens, ends: Sequence[int]) -> list[Step]:
    """Return the steps of ``expression = number``, or of ``a = b = c``, each side against the one before."""
    sides: list[tuple[_Tokens, int]] = [([], 0)]
    for token, end in zip(tokens, ends, strict=True):
        if token == _EQUALS:
            sides.append(([], end))
        else:
            sides[-1] = ([*sides[-1][0], token], end)
    found = []
    for (left, _), (right, end) in pairwise(sides):
        if len(left) < 2 or left.count("(") > _LONGEST or len(right) != 1 or not isinstance(right[0], Fraction):
            continue
        try:
            value: Fraction | None = _Sum(left).value()
        except ZeroDivisionError:
            value = None
        except ValueError:  # no sum
            continue
        operands = tuple(token for token in left if isinstance(token, Fraction))
        found.append(Step(text[:end].strip(), operands, value, right[0], _is_right(value, right[0])))
    return found


def _is_right(value: Fraction | None, said: Fraction) -> bool:
    if value is None:
        return False
    places = 0
    while places < 9 and (said * 10**places).denominator != 1:
        places += 1
    return value == said if places == 0 else abs(value - said) <= Fraction(1, 2 * 10**places)


class _Sum:
    """Works out a sum of numbers, ``+ - * /`` and brackets."""

    def __init__(self, tokens: _Tokens) -> None:
        self.tokens = [*tokens, ""]
        self.place = 0

    def value(self) -> Fraction:
        """Return what it comes to.

        Raises:
            ValueError: it is no sum.
        """
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
        token = self._next()
        if isinstance(token, Fraction):
            return token
        if token == _MINUS:
            return -self._factor()
        if token == _OPEN:
            value = self._terms()
            if self._next() != _CLOSE:
                raise ValueError("a bracket is open.")
            return value
        raise ValueError(f"{token!r} is no number.")

    def _next(self) -> Fraction | str:
        self.place = min(self.place + 1, len(self.tokens))
        return self.tokens[self.place - 1]
