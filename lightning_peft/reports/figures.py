"""The parts of a picture of results: panels, a style for each method, means over seeds with their spread, and saving.

They need matplotlib: ``pip install 'lightning-peft[plot]'``.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.reports.rows import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#A06010")
"""Told apart by people who are colour-blind (Okabe and Ito 2008)."""
MARKERS = "osD^vPX*"


def figure(panels: int = 1, width: float = 4.2) -> tuple[Any, list[Any]]:
    """Return a figure of so many panels, each ``width`` inches wide, and its panels.

    Raises:
        TuningError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TuningError("pictures need matplotlib, which is not there: pip install 'lightning-peft[plot]'.") from None
    columns = min(panels, 4)
    lines = -(-panels // columns)
    figure = Figure(figsize=(width * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def by_metric(rows: Sequence[Row]) -> tuple[Any, list[Any], dict[str, list[Row]]]:
    """Return a figure with a panel for each metric, and the rows of each."""
    panels = {metric: [row for row in rows if row["metric"] == metric] for metric in names(rows, "metric")}
    return *figure(len(panels)), panels


def names(rows: Sequence[Row], column: str) -> list[str]:
    """Return the values of a column, each once, in their order."""
    return list(dict.fromkeys(str(row.get(column, "")) for row in rows))


def styles(rows: Sequence[Row]) -> list[tuple[str, dict[str, Any]]]:
    """Return the methods of the rows, each with a colour and a marker; where colours come again, markers do not."""
    return [
        (method, {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]})
        for i, method in enumerate(names(rows, "method"))
    ]


def shades(count: int) -> list[Any]:
    """Return so many shades of one scale of colours."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.1 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def points(
    rows: Sequence[Row], method: str, dataset: str | None, column: str, default: Any = None, scale: float = 100
) -> dict[Any, tuple[float, float]]:
    """Return x -> mean and standard deviation over seeds; where ``dataset`` is None, of the means over data sets."""
    values: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        if str(row.get("method", "")) == method and dataset in (None, str(row.get("dataset", ""))):
            by_seed = values.setdefault(row.get(column, default), {})
            by_seed.setdefault(row.get("seed"), []).append(scale * row["value"])
    found = {x: [fmean(own) for own in by_seed.values()] for x, by_seed in values.items()}
    return {x: (fmean(v), stdev(v) if len(v) > 1 else 0.0) for x, v in sorted(found.items())}


def line(axis: Any, points: dict[Any, tuple[float, float]], label: str, style: dict[str, Any]) -> None:
    """Draw a line through means, with their spread as a band."""
    if not points:
        return
    x, means, spreads = list(points), [m for m, _ in points.values()], [s for _, s in points.values()]
    axis.plot(x, means, label=label, markersize=5, lw=1.6, **style)
    if any(spreads):
        low, high = ([m + sign * s for m, s in points.values()] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def save(figure: Any, axes: list[Any], file: Path, legend: bool = True, grid: str = "both") -> Path:
    """Write a figure with its legend to a file, and return that."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(axis=grid, alpha=0.3)
            axis.set_axisbelow(True)
    if legend:
        named = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if named:
            columns = max(1, int(figure.get_figwidth() / 1.6))
            figure.legend(named.values(), named, loc="outside lower center", ncols=min(columns, len(named)), fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return file
