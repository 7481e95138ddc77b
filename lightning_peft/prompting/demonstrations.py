"""In-context learning as text: which solved rows stand before the question, in which order, and how they are written.

Source: Brown et al. 2020 (2005.14165), section 2; Zhao et al. 2021 (2102.09690) for the format; Liu et al. 2022
(2101.06804) for the nearest rows as demonstrations.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.template import Template

Select = Literal["random", "balanced", "nearest"]
Order = Literal["random", "as_selected", "nearest_last", "nearest_first"]


def random_rows(rows: int, count: int, seed: int) -> list[int]:
    """Return ``count`` of the numbers below ``rows``, in random order; a seed always gives the same.

    >>> random_rows(10, 3, seed=0) == random_rows(10, 3, seed=0)
    True
    """
    _check_count(rows, count)
    return random.Random(seed).sample(range(rows), count)


def balanced_rows(labels: Sequence[Any], count: int, seed: int) -> list[int]:
    """Return ``count`` row numbers with as many of each label as can be, in random order.

    >>> labels = ["a"] * 50 + ["b"] * 2
    >>> sorted(labels[i] for i in balanced_rows(labels, 4, seed=0))
    ['a', 'a', 'b', 'b']
    """
    _check_count(len(labels), count)
    draw = random.Random(seed)
    of: dict[Any, list[int]] = {}
    for row in draw.sample(range(len(labels)), len(labels)):
        of.setdefault(labels[row], []).append(row)
    names = sorted(of, key=str)
    draw.shuffle(names)  # which labels have one more, where they cannot all have equally many
    chosen: list[int] = []
    while len(chosen) < count:
        for name in names:
            if of[name] and len(chosen) < count:
                chosen.append(of[name].pop())
    draw.shuffle(chosen)
    return chosen


def ordered(rows: Sequence[int], how: Order, seed: int) -> list[int]:
    """Return selected rows, the nearest first where there is a nearest, in the order of the prompt."""
    if how == "nearest_last":
        return list(rows)[::-1]
    if how == "random":
        return random.Random(seed).sample(list(rows), len(rows))
    return list(rows)


def check_apart(demonstrations: Sequence[Mapping[str, Any]], row: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Check that no demonstration is the row that is asked about.

    Raises:
        TuningError: one has the same fields.
    """
    asked = [row.get(name) for name in fields]
    if any([other.get(name) for name in fields] == asked for other in demonstrations):
        shown = ", ".join(f"{name}={str(row.get(name))[:60]!r}" for name in fields)
        raise TuningError(
            f"a demonstration is the row that is asked about ({shown}): take the test rows out of the training rows."
        )


def written(
    template: Template,
    row: Mapping[str, Any],
    answer: str | None,
    options: Sequence[str] | None = None,
) -> str:
    r"""Return a demonstration; with ``answer=None`` it shows the question alone.

    >>> written(Template("Q: {q}\nA: {answer}"), {"q": "1 + 1"}, "2")
    'Q: 1 + 1\nA: 2'
    """
    return template.prompt(row, options) if answer is None else template.render(row, answer=answer, options=options)


def context(demonstrations: Sequence[str], separator: str = "\n\n", instruction: str = "") -> str:
    r"""Return the text before the question: the instruction and the demonstrations, with a separator behind each.

    >>> context(["Q: a\nA: b"], instruction="Answer.")
    'Answer.\n\nQ: a\nA: b\n\n'
    """
    return "".join(f"{text}{separator}" for text in ([instruction] if instruction else []) + list(demonstrations))


def within(lengths: Sequence[int], budget: int) -> int:
    """Return how many of the last demonstrations fit into a budget, none of them cut.

    >>> within([5, 5, 5], 11), within([5, 5, 5], 4)
    (2, 0)
    """
    kept = used = 0
    for length in reversed(lengths):
        used += length
        if used > budget:
            break
        kept += 1
    return kept


def _check_count(rows: int, count: int) -> None:
    if not 0 <= count <= rows:
        raise TuningError(f"{count} demonstrations cannot be drawn from {rows} rows: take fewer, or give more rows.")
