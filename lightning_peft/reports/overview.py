"""The table of a comparison at several points, such as models or data sets: a row a method, a column a point."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_peft.reports import comparison
from lightning_peft.reports.comparison import Entry


@dataclass
class Column:
    """A point of a grid with what its comparison has found.

    Args:
        label: what it is called.
        columns: what its rows of results say of it, such as ``{"model": "small"}``.
        group: of the points that are averaged together; '': none.
        entries: of its own table.
    """

    label: str
    columns: Mapping[str, Any]
    group: str = ""
    entries: Sequence[Entry] = field(default_factory=list)

    def scores(self, method: str) -> list[float]:
        """Return the scores of a method, by seed, or none where it has not been run."""
        return next((entry.scores for entry in self.entries if entry.method == method), [])


def table(columns: Sequence[Column]) -> list[dict[str, str]]:
    """Return the cells: means with deviations over the seeds, and the means over the points of a group and over all.

    A mean over points is there where the method was run at all of them.
    """
    methods = list(dict.fromkeys(entry.method for column in columns for entry in column.entries))
    groups = {group: [each for each in columns if each.group == group] for group in _groups(columns)}
    rows = []
    for method in methods:
        row = {"method": f"`{method}`"} | {each.label: _cell(each.scores(method)) for each in columns}
        means = groups | {"": list(columns)} if len(columns) > 1 else {}
        for group, own in means.items():
            scores = [each.scores(method) for each in own]
            row[f"mean of {group or 'all'}"] = f"{fmean(map(fmean, scores)):.3f}" if all(scores) else ""
        rows.append(row)
    return rows


def write(folder: Path, columns: Sequence[Column]) -> str:
    """Write the table as ``overview.md`` and ``overview.csv``, and return the Markdown."""
    rows = table(columns)
    if not rows:
        return ""
    text = comparison.markdown(rows)
    comparison.save(folder, {"overview.md": text, "overview.csv": comparison.sheet(rows)})
    return text


def result_rows(columns: Sequence[Column], metric: str) -> list[dict[str, Any]]:
    """Return the scores of all points as rows for pictures."""
    return [
        {"method": entry.method, "seed": result["seed"], "metric": metric, "value": result["test"], **column.columns}
        for column in columns
        for entry in column.entries
        for result in entry.results
    ]


def _groups(columns: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(column.group for column in columns if column.group))


def _cell(scores: Sequence[float]) -> str:
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{fmean(scores):.3f}{spread}" if scores else ""
