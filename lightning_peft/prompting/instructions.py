"""Instruction templates: several wordings of a task, mixed as FLAN does, scored over all wordings.

Source: Wei et al. 2021 (2109.01652), section 2 and appendix: ten templates a task, up to three of which turn the task
around; examples of a task in proportion to its size, at most as if it had 3,000.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.template import Template

TEMPLATES = 10
"""How many wordings FLAN has of each task."""
CAP = 3000


@dataclass(frozen=True)
class Instructions:
    """The wordings of one task.

    >>> parts = {"task": "mood", "templates": {"ask": "{text} Good or bad? {answer}", "write": "Write a {label} text:"}}
    >>> mood = Instructions.of(parts | {"inverse": ["write"]}, count=None)
    >>> [template.name for template in mood.scored]
    ['ask']

    Args:
        task: its name.
        templates: the wordings; their names are unlike.
        words: label -> what it is called in options and answers; empty: its name.
    """

    task: str
    templates: tuple[Template, ...]
    words: Mapping[str, str]

    @classmethod
    def of(cls, parts: Mapping[str, Any], count: int | None = TEMPLATES) -> "Instructions":
        """Return the instructions that a mapping describes, such as one read from a YAML file.

        Args:
            parts: ``task``, a name; ``templates``, name -> text; ``inverse``, the names of those that turn the task
                around, which train and are not scored; ``words``, label -> what it is called.
            count: how many templates there must be; None: any number.

        Raises:
            TuningError: an entry is missing, unknown or malformed, or there are more or fewer templates.
        """
        known = ("task", "templates", "inverse", "words")
        unknown = [name for name in parts if name not in known]
        if unknown:
            close = get_close_matches(unknown[0], known, n=1)
            hint = f", did you mean {close[0]!r}" if close else ""
            raise TuningError(f"{unknown[0]!r} is no entry of instructions{hint}: take {', '.join(known)}.")
        texts, inverse = parts.get("templates"), list(parts.get("inverse") or ())
        if not isinstance(texts, Mapping) or not texts:
            raise TuningError("instructions have no templates: give templates as a mapping from names to texts.")
        task = str(parts.get("task") or "")
        if not task:
            raise TuningError("instructions have no task: give it a name.")
        for name in inverse:
            if name not in texts:
                raise TuningError(f"inverse names {name!r}, which is no template of {task}: take {', '.join(texts)}.")
        if count is not None and len(texts) != count:
            raise TuningError(f"{task} has {len(texts)} templates where {count} are asked for: write {count}.")
        templates = tuple(Template(text, str(name), name in inverse) for name, text in texts.items())
        words = {str(label): str(word) for label, word in (parts.get("words") or {}).items()}
        return cls(task, templates, words)

    @property
    def scored(self) -> tuple[Template, ...]:
        """The templates that ask for the answer."""
        return tuple(template for template in self.templates if not template.inverse)

    def named(self, name: str) -> Template:
        """Return one template.

        Raises:
            TuningError: there is none of that name.
        """
        for template in self.templates:
            if template.name == name:
                return template
        close = get_close_matches(name, self.names(), n=1)
        raise TuningError(
            f"{name!r} is no template of {self.task}: take "
            + (f"{close[0]!r}." if close else f"one of {', '.join(self.names())}.")
        )

    def names(self) -> list[str]:
        """Return the names of the templates."""
        return [template.name for template in self.templates]


class OverTemplates(NamedTuple):
    """A score over the wordings of a task: the mean is the headline; ``std`` is that of these very templates."""

    mean: float
    std: float
    min: float
    max: float
    n_templates: int


def over_templates(scores: Sequence[float]) -> OverTemplates:
    """Return mean, standard deviation, least and greatest of the scores of the templates."""
    return OverTemplates(fmean(scores), pstdev(scores), min(scores), max(scores), len(scores))


def mixing_rates(sizes: Mapping[str, int], cap: int = CAP) -> dict[str, float]:
    """Return the share of each task: in proportion to its examples, of which at most ``cap`` count.

    >>> mixing_rates({"large": 30000, "small": 1000}, cap=3000)
    {'large': 0.75, 'small': 0.25}
    """
    if cap < 1 or not sizes or min(sizes.values()) < 1:
        raise TuningError(f"cap={cap} and the sizes {dict(sizes)} leave nothing to mix: let all be 1 or more.")
    counted = {task: min(size, cap) for task, size in sizes.items()}
    total = sum(counted.values())
    return {task: count / total for task, count in counted.items()}


def mixed(sizes: Mapping[str, int], count: int, cap: int = CAP, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Yield ``count`` pairs of task and row, drawn by `mixing_rates`; a task gives all its rows before one again."""
    rates, draw = mixing_rates(sizes, cap), random.Random(seed)
    left: dict[str, list[int]] = {task: [] for task in sizes}
    for task in draw.choices(list(rates), list(rates.values()), k=count):
        if not left[task]:
            left[task] = draw.sample(range(sizes[task]), sizes[task])
        yield task, left[task].pop()
