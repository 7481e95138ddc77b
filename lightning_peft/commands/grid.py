"""``compare --models`` and ``--over``: a comparison at each point of a grid, in one table with its pictures."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_peft.core.errors import TuningError
from lightning_peft.data.image_sets import image_sets, members
from lightning_peft.reports.overview import Column

MODEL = "model.model"


@dataclass(frozen=True)
class Point:
    """A point of a grid.

    Args:
        values: argument of the configuration -> its value here.
        labels: the same, with values as short as they can be told apart.
    """

    values: tuple[tuple[str, str], ...]
    labels: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """What it is called in a table."""
        return ", ".join(label for _, label in self.labels)

    @property
    def words(self) -> list[str]:
        """The arguments that make the configuration that of this point."""
        return [word for name, value in self.values for word in (f"--{name}", value)]

    @property
    def group(self) -> str:
        """The group of the data set, where the point has one of those that are averaged in groups."""
        known = [image_sets()[value].group for _, value in self.values if value in image_sets()]
        return next(filter(None, known), "")

    def folder(self, root: Path) -> Path:
        """Return where its own table is."""
        return root / self.label.replace(", ", "_").replace("/", "-")

    def column(self, parameters: int) -> Column:
        """Return the column of its results; ``parameters`` are those of the frozen model."""
        told = {("model" if name == MODEL else name): label for name, label in self.labels}
        others = ", ".join(label for name, label in self.labels if name != MODEL)
        found = {**told, "backbone_parameters": parameters} | ({"dataset": others} if others else {})
        return Column(self.label, found, self.group)


def points(given: argparse.Namespace) -> list[Point]:
    """Return the points of the grid that the arguments of ``compare`` ask for; none: there is no grid.

    Raises:
        TuningError: ``--over`` has no values, or one twice.
    """
    axes: list[tuple[str, list[str]]] = [(MODEL, given.models)] if given.models else []
    if given.over:
        name, *values = given.over
        if not values:
            raise TuningError(f"--over {name} names no values: write --over {name} ONE ANOTHER.")
        axes.append((name, [each for value in values for each in members(value)]))
    for name, values in axes:
        if len(set(values)) < len(values):
            raise TuningError(f"{name} has a value twice in {', '.join(values)}: name each once.")
    if not axes:
        return []
    grid = itertools.product(*([(name, value, short) for value, short in _short(values)] for name, values in axes))
    return [Point(tuple((n, v) for n, v, _ in one), tuple((n, s) for n, _, s in one)) for one in grid]


def _short(values: Sequence[str]) -> list[tuple[str, str]]:
    """Return each value with its last part, or with itself where the last parts are not told apart."""
    last = [Path(value).name or value for value in values]
    return list(zip(values, last if len(set(last)) == len(last) else values, strict=True))
