"""Checks the arithmetic in a chain of thought: every ``expression = number`` is worked out anew, without ``eval``.

A step may hold units ("2 盒 * 3 个 = 6 个网球", "$5 + $6 = $11"), which are not converted; what cannot be read as a sum
is no step, nor is a division with a remainder. A wrong step says more than its expression gives, or less; a rounded
number counts as right to its last decimal. A step is unused if nothing later computes with its number and it is not the
answer.

Source: the errors that Wei et al. 2022 (2201.11903, appendix D) sort chains of thought by; filtering before the vote
goes beyond Wang et al. 2022 (2203.11171), who count all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from lightning_peft.prompting.numerals import simple
from lightning_peft.prompting.sums import EQUALS, Run, runs, worked_out


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
    steps = tuple(step for run in runs(simple(text), decimal) for step in _steps(run))
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


def _steps(run: Run) -> list[Step]:
    """Return the steps of ``expression = number``, or of ``a = b = c``, each side against the one before."""
    sides: list[tuple[list[Fraction | str], int]] = [([], 0)]
    inner = slice(1, -1) if _is_in_brackets(run.tokens) else slice(None)
    for token, end in zip(run.tokens[inner], run.ends[inner], strict=True):
        if token == EQUALS:
            sides.append(([], end))
        else:
            sides[-1] = ([*sides[-1][0], token], end)
    found = []
    for number, ((left, _), (right, end)) in enumerate(pairwise(sides), 2):
        operands = tuple(token for token in left if isinstance(token, Fraction))
        said = _said(right, is_last=number == len(sides))
        if len(operands) < 2 or said is None:
            continue
        try:
            value: Fraction | None = worked_out(left)
        except ZeroDivisionError:
            value = None
        except ValueError:  # no sum
            continue
        found.append(Step(run.text[inner.start or 0 : end].strip(), operands, value, said, _is_right(value, said)))
    return found


def _is_in_brackets(tokens: Sequence[Fraction | str]) -> bool:
    """Tell whether a step stands in brackets as a whole: "(2 + 1 = 3)"."""
    if tokens[0] != "(" or tokens[-1] != ")" or EQUALS not in tokens:
        return False
    left = tokens[: tokens.index(EQUALS)]
    return left.count("(") == left.count(")") + 1


def _said(side: Sequence[Fraction | str], is_last: bool) -> Fraction | None:
    """Return the number that a side says: with its sign, or a fraction behind which nothing is worked out."""
    if len(side) == 3 and side[1] == "/" and not is_last:
        return None
    is_number = len(side) == 1 or (len(side) == 2 and side[0] == "-") or (len(side) == 3 and side[1] == "/")
    try:
        return worked_out(side) if is_number else None
    except (ValueError, ZeroDivisionError):
        return None


def _is_right(value: Fraction | None, said: Fraction) -> bool:
    if value is None:
        return False
    places = 0
    while places < 9 and (said * 10**places).denominator != 1:
        places += 1
    return value == said if places == 0 else abs(value - said) <= Fraction(1, 2 * 10**places)
