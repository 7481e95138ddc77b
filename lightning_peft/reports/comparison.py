"""The table of a comparison: a row for each method, best first, and how far it is behind the best."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.table import Table

from lightning_peft.core.storage import atomic

KEPT = "kept on other text"
HEAD = ("method", "score", "behind the best, 95 %", "trained", "delta [bytes]", "learning rates", "seeds", KEPT)
COSTS = ("method", "seconds a run", "seconds a step", "seconds a batch of the test", "peak GPU memory [bytes]")
_SHOWN = (
    ("method", "score", "behind the best, 95 %", "seeds", KEPT),
    ("method", "trained", "delta [bytes]", "learning rates"),
)
"""What stands in which of the tables on a screen."""
_LONG = 40
"""How many characters of a method stand in one line of a screen."""
_RESAMPLES = 2000


@dataclass
class Entry:
    """A method with the results of its seeds."""

    method: str
    results: Sequence[Mapping[str, Any]]
    behind: tuple[float, float] | None = field(default=None)
    """The 95 % interval of how many rows in one the best gets right more, over the rows of the test."""

    @property
    def scores(self) -> list[float]:
        """The scores on the test rows, by seed."""
        return [float(result["test"]) for result in self.results]

    @property
    def rates(self) -> str:
        """The learning rates, as 'delta 0.002, head 0.01'."""
        return ", ".join(f"{name} {rate:.3g}" for name, rate in self.results[0]["rates"].items())


def entries_of(results: Mapping[str, Sequence[Mapping[str, Any]]], higher: bool) -> list[Entry]:
    """Return the entries of a table, best first.

    Args:
        results: method -> what its seeds have found.
        higher: whether a higher score is better.
    """
    entries = [Entry(method, own) for method, own in results.items() if own]
    entries.sort(key=lambda entry: ((-1 if higher else 1) * fmean(entry.scores), entry.method))
    hits = [_hits(entry) for entry in entries]
    for entry, own in list(zip(entries, hits, strict=True))[1:]:
        if hits[0] is not None and own is not None and len(own) == len(hits[0]):
            entry.behind = interval(hits[0] - own)
    return entries


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of paired differences, by a bootstrap over the rows.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentiles).

    >>> low, high = interval(np.array([0.0, 1.0] * 50))
    >>> bool(0.35 < low < 0.45 < 0.55 < high < 0.65)
    True
    """
    draw = np.random.default_rng(0)
    picks = draw.integers(len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), (0.025, 0.975))
    return float(low), float(high)


def rows_of(entries: Sequence[Entry], wanted: int) -> list[dict[str, str]]:
    """Return the cells of the table; ``wanted`` is how many seeds a trained method is to have.

    What is kept on other text has a column if that was asked for.
    """
    rows = [dict(zip(HEAD, _cells(entry, wanted), strict=True)) for entry in entries]
    is_asked = any(row[KEPT] for row in rows)
    return [{name: cell for name, cell in row.items() if name != KEPT or is_asked} for row in rows]


def costs_of(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Return the cells of what was measured with a clock, and of memory."""
    return [dict(zip(COSTS, _costs(entry), strict=True)) for entry in entries]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the table as Markdown."""
    head = list(rows[0]) if rows else HEAD
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)]) + "\n"


def sheet(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def tables(rows: Sequence[Mapping[str, str]], costs: Sequence[Mapping[str, str]]) -> list[Table]:
    """Return what a screen of 80 columns has room for: the scores, what is trained, and what it costs."""
    parts = [[{name: row[name] for name in names if name in row} for row in rows] for names in _SHOWN]
    shown = []
    for part in (*parts, costs):
        table = Table()
        longest = max((len(row["method"]) for row in part), default=0)
        for name in part[0] if part else ():
            table.add_column(name, overflow="fold", no_wrap=name == "method" and longest <= _LONG)
        for row in part:
            table.add_row(*(cell.strip("`") for cell in row.values()))
        shown.append(table)
    return shown


def write(folder: Path, entries: Sequence[Entry], wanted: int, about: Mapping[str, Any]) -> None:
    """Write the table as Markdown, CSV and JSON; what was measured with a clock is in a file of its own.

    Args:
        folder: where to.
        entries: of the table.
        wanted: how many seeds a trained method is to have.
        about: what the table is of.
    """
    rows = rows_of(entries, wanted)
    whole = {**about, "methods": [_plain(entry) for entry in entries]}
    texts = {"table.md": markdown(rows), "table.csv": sheet(rows), "costs.csv": sheet(costs_of(entries))}
    texts["table.json"] = json.dumps(whole, indent=1, sort_keys=True) + "\n"
    save(folder, texts)


def save(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts to files of a folder, each as a whole or not at all."""
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def result_rows(entries: Sequence[Entry], metric: str) -> list[dict[str, Any]]:
    """Return the results as rows for pictures: scores of the test, and of the validations by epoch."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        for result in entry.results:
            own = {"method": entry.method, "seed": result["seed"]}
            costs = {"trained": result["trained"], "seconds": result["seconds"]}
            rows.append({**own, "metric": metric, "value": result["test"], **costs})
            curve = [{**own, "metric": f"val_{metric}", "value": v, "epoch": i} for i, v in enumerate(result["curve"])]
            rows += curve
    return rows


def _cells(entry: Entry, wanted: int) -> list[str]:
    scores, first = entry.scores, entry.results[0]
    spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
    behind = "" if entry.behind is None else f"{entry.behind[0]:.3f} to {entry.behind[1]:.3f}"
    seeds = "" if not first["rates"] else str(len(scores)) if len(scores) == wanted else f"{len(scores)} of {wanted}"
    size = f"{first['bytes']:,}" if first["bytes"] else ""
    kept = [result["kept"] for result in entry.results if result.get("kept") is not None]
    return [
        f"`{entry.method}`",
        f"{fmean(scores):.3f}{spread}",
        behind,
        f"{first['trained']:,}",
        size,
        entry.rates,
        seeds,
        f"{fmean(kept):.3f}" if kept else "",
    ]


def _costs(entry: Entry) -> list[str]:
    seconds = fmean(result["seconds"] for result in entry.results)
    steps = max(result["steps"] for result in entry.results)
    memory = max(result["memory"] for result in entry.results)
    batches = [result["batch"] for result in entry.results if result.get("batch") is not None]
    own = f"{seconds:.1f}", f"{seconds / steps:.3f}" if steps else "", f"{min(batches):.4f}" if batches else ""
    return [entry.method, *own, str(memory)]


def _plain(entry: Entry) -> dict[str, Any]:
    first = entry.results[0]
    own = {name: first[name] for name in ("trained", "bytes", "rates", "scale")}
    kept = [result.get("kept") for result in entry.results]
    return {"method": entry.method, "scores": entry.scores, "behind": entry.behind, "kept": kept, **own}


def _hits(entry: Entry) -> np.ndarray | None:
    """Return the share of the seeds that got each row of the test right, where that is known."""
    every = [result["hits"] for result in entry.results]
    if not every[0] or len({len(hits) for hits in every}) != 1:
        return None
    shares: np.ndarray = np.mean(every, axis=0)
    return shares
