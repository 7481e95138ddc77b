"""Pictures of results, each drawn from rows of `lightning_peft.reports.rows` and nothing else.

They need matplotlib: ``pip install 'lightning-peft[plot]'``.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from lightning_peft.core.errors import TuningError
from lightning_peft.reports import figures
from lightning_peft.reports.rows import Row, read_rows, write_rows
from lightning_peft.tasks.base_to_new import AVERAGE, base_new_table


def plot(file: str, folder: str) -> list[Path]:
    """Draw every picture that the rows of a file have values for, with the rows that it shows as CSV beside it.

    Args:
        file: rows of results, as .csv or .jsonl.
        folder: where to write.

    Raises:
        TuningError: matplotlib is missing, or the rows have values for no picture.
    """
    rows = read_rows(file)
    figures.figure()
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
    datasets = figures.names(rows, "dataset")
    panels = [*datasets, AVERAGE] if len(datasets) > 1 else datasets
    figure, axes = figures.figure(len(panels))
    shots = sorted({row["shots"] for row in rows if row.get("shots")})
    place = {0: 0, **{n: i + 1 for i, n in enumerate(shots)}}
    for axis, panel in zip(axes, panels, strict=True):
        for method, style in figures.styles(rows):
            points = figures.points(rows, method, None if panel == AVERAGE else panel, "shots", default=0)
            few = {x: y for x, y in points.items() if x}
            if few:
                figures.line(axis, {place[x]: y for x, y in few.items()}, method, style)
            if 0 in points:
                label = method if not few else None
                axis.plot([0], [points[0][0]], "*", markersize=15, color=style["color"], label=label, clip_on=False)
        axis.set(title=panel, xlabel="training images of a class", ylabel="accuracy [%]")
        axis.set_xticks(list(place.values()), [str(n) for n in place])
        axis.set_xlim(-0.3, len(place) - 0.7)
    return figures.save(figure, axes, file)


def base_new_bars(rows: Sequence[Row], file: Path) -> Path:
    """Draw accuracy on base and on new classes and their harmonic mean H, in groups of bars for each method."""
    table = base_new_table(rows)
    datasets = list(dict.fromkeys(entry["dataset"] for entry in table))
    panels = datasets if len(datasets) > 2 else datasets[:1]
    figure, axes = figures.figure(len(panels), width=max(4.2, 1.4 * len(figures.names(table, "method"))))
    for axis, panel in zip(axes, panels, strict=True):
        entries = [entry for entry in table if entry["dataset"] == panel]
        for k, (part, colour) in enumerate(zip(("base", "new", "H"), figures.COLOURS, strict=False)):
            key = "H_published" if part == "H" and panel == AVERAGE else part
            heights = [100 * entry[key] for entry in entries]
            label = part if part != "H" else "harmonic mean (of the averages)" if AVERAGE in panels else "harmonic mean"
            bars = axis.bar([i + (k - 1) * 0.27 for i in range(len(entries))], heights, 0.25, color=colour, label=label)
            axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axis.set_xticks(range(len(entries)), [entry["method"] for entry in entries])
        axis.set(title=panel, ylabel="accuracy [%]", ylim=(0, 112))
        axis.margins(x=0.08)
    return figures.save(figure, axes, file, grid="y")


def task_matrix(rows: Sequence[Row], file: Path) -> Path:
    """Draw A[i, t], the accuracy on task i after training on task t, for each method, mean over the seeds."""
    methods = figures.names(rows, "method")
    figure, axes = figures.figure(len(methods), width=3.6)
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
    return figures.save(figure, axes, file, legend=False, grid="")


def selection_histogram(rows: Sequence[Row], file: Path) -> Path:
    """Draw how often each prompt of a pool was chosen, in each task if the rows say so."""
    methods = figures.names(rows, "method")
    figure, axes = figures.figure(len(methods), width=5.0)
    for axis, method in zip(axes, methods, strict=True):
        own = [row for row in rows if row.get("method", "") == method]
        tasks = sorted({row.get("task", 0) for row in own})
        count = 1 + max(row["prompt"] for row in own)
        below = [0.0] * count
        for task, colour in zip(tasks, figures.shades(len(tasks)), strict=True):
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
    return figures.save(figure, axes, file, grid="y")


def scores_along(
    column: str, name: str, log: bool, tick: Callable[[float], str] = str
) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws scores against another column of the rows, such as ``prompt_length``."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        panels: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            panels.setdefault((str(row.get("dataset", "")), str(row["metric"])), []).append(row)
        figure, axes = figures.figure(len(panels))
        values = sorted({row[column] for row in rows})
        for axis, ((dataset, metric), own) in zip(axes, panels.items(), strict=True):
            percent = metric.endswith("accuracy")
            for method, style in figures.styles(rows):
                line = figures.points(own, method, None, column, scale=100 if percent else 1)
                figures.line(axis, line, method, style)
            if log and min(values) > 0:
                axis.set_xscale("log")
                axis.minorticks_off()
            axis.set_xticks(values, [tick(value) for value in values])
            axis.set(title=dataset, xlabel=name, ylabel=f"{metric} [%]" if percent else metric)
        return figures.save(figure, axes, file)

    return draw


def score_against(column: str, name: str) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws the scores of methods, whatever they are, against what each costs."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        figure, axes, panels = figures.by_metric(rows)
        for axis, (metric, own) in zip(axes, panels.items(), strict=True):
            for method, style in figures.styles(own):
                mine = [row for row in own if row["method"] == method]
                scores = [row["value"] for row in mine]
                spread = stdev(scores) if len(scores) > 1 else 0.0
                cost = fmean(row[column] for row in mine)
                axis.errorbar([cost], [fmean(scores)], [spread], label=method, linestyle="", capsize=3, **style)
            axis.set_xscale("symlog")  # what trains nothing is at 0
            axis.set(xlabel=name, ylabel=metric)
        return figures.save(figure, axes, file)

    return draw


def over_epochs(name: str, percent: bool) -> Callable[[Sequence[Row], Path], Path]:
    """Return a function that draws a value of each epoch of training, such as a blending weight."""

    def draw(rows: Sequence[Row], file: Path) -> Path:
        figure, axes, panels = figures.by_metric(rows)
        for axis, (metric, own) in zip(axes, panels.items(), strict=True):
            for method, style in figures.styles(own):
                figures.line(
                    axis, figures.points(own, method, None, "epoch", scale=100 if percent else 1), method, style
                )
            axis.set(xlabel="epoch", ylabel=f"{name} [%]" if percent else name, title=metric)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return figures.save(figure, axes, file)

    return draw


def _has(metric: str, *columns: str) -> Callable[[Row], bool]:
    return lambda row: row["metric"] == metric and all(column in row for column in columns)


def _is_score_with(column: str) -> Callable[[Row], bool]:
    """Tell the scores of a whole run that have a column from what is of one epoch, task or prompt of it."""
    return lambda row: column in row and not {"epoch", "task", "prompt"} & row.keys()


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g}"


def _ends(endings: Iterable[str], column: str) -> Callable[[Row], bool]:
    endings = tuple(endings)
    return lambda row: str(row["metric"]).endswith(endings) and column in row


PICTURES: dict[str, tuple[Callable[[Row], bool], Callable[[Sequence[Row], Path], Path]]] = {
    "accuracy_against_shots": (_has("accuracy", "shots"), accuracy_against_shots),
    "base_new": (lambda row: row["metric"] in ("base_accuracy", "new_accuracy"), base_new_bars),
    "task_matrix": (_has("task_accuracy", "task", "after"), task_matrix),
    "selection_histogram": (_has("selection_count", "prompt"), selection_histogram),
    "accuracy_against_length": (
        _is_score_with("prompt_length"),
        scores_along("prompt_length", "prompts [tokens]", log=True),
    ),
    "accuracy_against_depth": (
        _is_score_with("prompt_depth"),
        scores_along("prompt_depth", "blocks with prompts of their own", log=False),
    ),
    "score_against_size": (
        _is_score_with("backbone_parameters"),
        scores_along("backbone_parameters", "parameters of the model [millions]", log=True, tick=_millions),
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
