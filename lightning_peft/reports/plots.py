"""Pictures of results, each drawn from rows of `lightning_peft.reports.rows` and nothing else.

They need matplotlib: ``pip install 'lightning-peft[plot]'``.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.reports.rows import Row, read_rows, write_rows
from lightning_peft.tasks.base_to_new import AVERAGE, base_new_table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#A06010")
"""Told apart by people who are colour-blind (Okabe and Ito 2008)."""
MARKERS = "osD^vPX*"


def plot(file: str, folder: str) -> list[Path]:
    """Draw every picture that the rows of a file have values for, with the rows that it shows as CSV beside it.

    Args:
        file: rows of results, as .csv or .jsonl.
        folder: where to write.

    Raises:
        TuningError: matplotlib is missing, or the rows have values for no picture.
    """
    rows = read_rows(file)
    _figure()
    drawn = []
    for name, (choose, draw) in PICTURES.items():
        chosen = [row for row in rows if choose(row)]
        if chosen:
            table = Path(folder) / f"{name}.csv"
            table.unlink(missing_ok=True)
            write_rows(table, chosen)
            drawn.append(draw(chosen, table.with_suffix(".png")))
    if not drawn:
        metrics = ", ".join(sorted({str(row["metric"]) for row in rows})) or "none"
        raise TuningError(f"{file} has rows for no picture (metrics: {metrics}): see lightning_peft.reports.plots.")
    return drawn


def accuracy_against_shots(rows: Sequence[Row], file: Path) -> Path:
    """Draw accuracy against training images of a class; without any, zero-shot, it is a star at 0."""
    datasets = _names(rows, "dataset")
    panels = [*datasets, AVERAGE] if len(datasets) > 1 else datasets
    figure, axes = _figure(len(panels))
    shots = sorted({row["shots"] for row in rows if row.get("shots")})
    place = {0: 0, **{n: i + 1 for i, n in enumerate(shots)}}
    for axis, panel in zip(axes, panels, strict=True):
        for method, style in _styles(rows):
            points = _points(rows, method, None if panel == AVERAGE else panel, "shots", default=0)
            few = {x: y for x, y in points.items() if x}
            if few:
                _line(axis, {place[x]: y for x, y in few.items()}, method, style)
            if 0 in points:
                label = method if not few else None
                axis.plot([0], [points[0][0]], "*", markersize=15, color=style["color"], label=label, clip_on=False)
        axis.set(title=panel, xlabel="training images of a class", ylabel="accuracy [%]")
        axis.set_xticks(list(place.values()), [str(n) for n in place])
        axis.set_xlim(-0.3, len(place) - 0.7)
    return _save(figure, axes, file)


def base_new_bars(rows: Sequence[Row], file: Path) -> Path:
    """Draw accuracy on base and on new classes and their harmonic mean H, in groups of bars for each method."""
    table = base_new_table(rows)
    datasets = list(dict.fromkeys(entry["dataset"] for entry in table))
    panels = datasets if len(datasets) > 2 else datasets[:1]
    figure, axes = _figure(len(panels), width=max(4.2, 1.4 * len(_names(table, "method"))))
    for axis, panel in zip(axes, panels, strict=True):
        entries = [entry for entry in table if entry["dataset"] == panel]
        for k, (part, colour) in enumerate(zip(("base", "new", "H"), COLOURS, strict=False)):
            key = "H_published" if part == "H" and panel == AVERAGE else part
            heights = [100 * entry[key] for entry in entries]
            label = part if part != "H" else "harmonic mean (of the averages)" if AVERAGE in panels else "harmonic mean"
            bars = axis.bar([i + (k - 1) * 0.27 for i in range(len(entries))], heights, 0.25, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axis.set_xticks(range(len(entries)), [entry["method"] for entry in entries])
        axis.set(title=panel, ylabel="accuracy [%]", ylim=(0, 112))
        axis.margins(x=0.08)
    return _save(figure, axes, file, grid="y")


def task_matrix(rows: Sequence[Row], file: Path) -> Path:
    """Draw A[i, t], the accuracy on task i after training on task t, for each method, mean over the seeds."""
    methods = _names(rows, "method")
    figure, axes = _figure(len(methods), width=3.6)
    for axis, method in zip(axes, methods, strict=True):
        own = [row for row in rows if row.get("method", "") == method]
        count = 1 + max(row["after"] for row in own)
        cells: dict[tuple[int, int], list[float]] = {}
        for row in own:
            cells.setdefault((row["task"], row["after"]), []).append(100 * row["value"])
        grid = [[fmean(cells[i, t]) if (i, t) in cells else float("nan") for t in range(count)] for i in range(count)]
        image = axis.imshow(grid, vmin=0, vmax=100, cmap="viridis")
        for (i, t), values in cells.items():
            value = fmean(values)
            axis.text(t, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 60 else "white")
        axis.set(title=method, xlabel="after task t", ylabel="accuracy on task i [%]")
        axis.set_xticks(range(count))
        axis.set_yticks(range(count))
        figure.colorbar(image, ax=axis, fraction=0.046)
    return _save(figure, axes, file, legend=False, grid="")


def selection_histogram(rows: Sequence[Row], file: Path) -> Path:
    """Draw how often each prompt of a pool was chosen, in each task if the rows say so."""
    methods = _names(rows, "method")
    figure, axes = _figure(len(methods), width=5.0)
    for axis, method in zip(axes, methods, strict=True):
        own = [row for row in rows if row.get("method", "") == method]
        tasks = sorted({row.get("task", 0) for row in own})
        count = 1 + max(row["prompt"] for row in own)
        below = [0.0] * count
        for task, colour in zip(tasks, _shades(len(tasks)), strict=True):
            heights = [0.0] * count
            for row in own:
                if row.get("task", 0) == task:
                    heights[row["prompt"]] += row["value"]
            total = sum(heights) or 1.0
            shares = [100 * height / total / len(tasks) for height in heights]
            label = f"task {task}" if len(tasks) > 1 else None
            axis.bar(range(count), shares, 0.8, bottom=below, color=colour, label=label, edgecolor="white", lw=0.5)
            below = [a + b for a, b in zip(below, shares, strict=True)]
        axis.set(title=method, xlabel="prompt of the pool", ylabel="share of the choices [%]")
        axis.set_xticks(range(count))
        axis.margins(x=0.02)
    return _save(figure, axes, file, grid="y")


def accuracy_against(column: str, name: str, log: bool) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws accuracy against another column of the rows, such as ``prompt_length``."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        datasets = _names(rows, "dataset")
        figure, axes = _figure(len(datasets))
        values = sorted({row[column] for row in rows})
        for axis, dataset in zip(axes, datasets, strict=True):
            for method, style in _styles(rows):
                _line(axis, _points(rows, method, dataset, column), method, style)
            if log and min(values) > 0:
                axis.set_xscale("log")
                axis.minorticks_off()
            axis.set_xticks(values, [str(value) for value in values])
            axis.set(title=dataset, xlabel=name, ylabel="accuracy [%]")
        return _save(figure, axes, file)

    return draw


def score_against(column: str, name: str) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws the scores of methods, whatever they are, against what each costs."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        figure, axes, panels = _by_metric(rows)
        for axis, (metric, own) in zip(axes, panels.items(), strict=True):
            for method, style in _styles(own):
                mine = [row for row in own if row["method"] == method]
                scores = [row["value"] for row in mine]
                spread = stdev(scores) if len(scores) > 1 else 0.0
                cost = fmean(row[column] for row in mine)
                axis.errorbar([cost], [fmean(scores)], [spread], label=method, linestyle="", capsize=3, **style)
            axis.set_xscale("symlog")  # what trains nothing is at 0
            axis.set(xlabel=name, ylabel=metric)
        return _save(figure, axes, file)

    return draw


def over_epochs(name: str, percent: bool) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws a value of each epoch of training, such as a blending weight."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        figure, axes, panels = _by_metric(rows)
        for axis, (metric, own) in zip(axes, panels.items(), strict=True):
            for method, style in _styles(own):
                _line(axis, _points(own, method, None, "epoch", scale=100 if percent else 1), method, style)
            axis.set(xlabel="epoch", ylabel=f"{name} [%]" if percent else name, title=metric)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return _save(figure, axes, file)

    return draw


def _has(metric: str, *columns: str) -> Callable[[Row], bool]:
    return lambda row: row["metric"] == metric and all(column in row for column in columns)


def _ends(endings: Iterable[str], column: str) -> Callable[[Row], bool]:
    endings = tuple(endings)
    return lambda row: str(row["metric"]).endswith(endings) and column in row


PICTURES: dict[str, tuple[Callable[[Row], bool], Callable[[Sequence[Row], Path], Path]]] = {
    "accuracy_against_shots": (_has("accuracy", "shots"), accuracy_against_shots),
    "base_new": (lambda row: row["metric"] in ("base_accuracy", "new_accuracy"), base_new_bars),
    "task_matrix": (_has("task_accuracy", "task", "after"), task_matrix),
    "selection_histogram": (_has("selection_count", "prompt"), selection_histogram),
    "accuracy_against_length": (
        _has("accuracy", "prompt_length"),
        accuracy_against("prompt_length", "prompts [tokens]", log=True),
    ),
    "accuracy_against_depth": (
        _has("accuracy", "prompt_depth"),
        accuracy_against("prompt_depth", "blocks with prompts of their own", log=False),
    ),
    "coverage": (_ends(("coverage",), "epoch"), over_epochs("target images with a pseudo label", percent=True)),
    "score_against_parameters": (lambda row: "trained" in row, score_against("trained", "trained parameters")),
    "score_against_seconds": (lambda row: "seconds" in row, score_against("seconds", "seconds of a run")),
    "learning_curves": (
        lambda row: str(row["metric"]).startswith("val_") and "epoch" in row,
        over_epochs("score on validation rows", percent=False),
    ),
    "alpha": (_ends(("alpha",), "epoch"), over_epochs("alpha", percent=False)),
}
"""Name of a picture -> which rows it shows, and how it is drawn."""


def _figure(panels: int = 1, width: float = 4.2) -> tuple[Any, list[Any]]:
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


def _by_metric(rows: Sequence[Row]) -> tuple[Any, list[Any], dict[str, list[Row]]]:
    """Return a figure with a panel for each metric, and the rows of each."""
    panels = {metric: [row for row in rows if row["metric"] == metric] for metric in _names(rows, "metric")}
    return *_figure(len(panels)), panels


def _names(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(str(row.get(column, "")) for row in rows))


def _styles(rows: Sequence[Row]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (method, {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]})
        for i, method in enumerate(_names(rows, "method"))
    ]


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.1 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def _points(
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


def _line(axis: Any, points: dict[Any, tuple[float, float]], label: str, style: dict[str, Any]) -> None:
    if not points:
        return
    x, means, spreads = list(points), [m for m, _ in points.values()], [s for _, s in points.values()]
    axis.plot(x, means, label=label, markersize=5, lw=1.6, **style)
    if any(spreads):
        low, high = ([m + sign * s for m, s in points.values()] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)


def _save(figure: Any, axes: list[Any], file: Path, legend: bool = True, grid: str = "both") -> Path:
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
