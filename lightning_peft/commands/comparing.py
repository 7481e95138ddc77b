"""``compare``: methods on one's own task and data, each at the learning rate that is best on validation rows."""

import argparse
import hashlib
import logging
import multiprocessing
import re
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import datasets
import transformers
from rich.console import Console

from lightning_peft.commands import controls, fail, fitting, grid, using
from lightning_peft.commands.method_words import name_of
from lightning_peft.commands.trials import Result, Trial, Trials, best_scale, scales_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic
from lightning_peft.reports import comparison, overview
from lightning_peft.reports.page import page
from lightning_peft.reports.plots import plot
from lightning_peft.reports.rows import write_rows
from lightning_peft.tasks.class_scores import HeadClassification

PROBE = "LinearProbe(cache_features=True)"
WHOLE = ("--data.whole", "true")
"""What a last run adds to the configuration, as that of VPT on the 1,000 images of VTAB-1k."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Words(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        fail(f"{message}: see lightning-peft compare --help.")


def parser() -> Words:
    """Return the parser of what is not the configuration's."""
    words = Words(
        prog="lightning-peft compare",
        description="Compare methods on a task and its data. Each method's learning rates are chosen on validation "
        "rows with equal effort, by successive halving; then its seeds are scored on the test rows.",
        epilog="All other arguments are those of fit: --config mine.yaml --data.train rows.csv. Several calls with one "
        "folder, such as the tasks of a SLURM array, share the runs. A call that was killed goes on where it was.",
        allow_abbrev=False,
    )
    words.add_argument("--methods", nargs="+", required=True, help="LoRA, 'LoRA(r=4)', 'LoRA + BitFit' ...")
    words.add_argument("--models", nargs="+", help="a comparison with each of these models, and scores by their size")
    words.add_argument("--over", nargs="+", help="an argument and its values, each with a comparison: data.seed 1 2")
    words.add_argument("--seeds", type=int, default=3, help="how many seeds each method is scored with")
    words.add_argument("--rates", type=int, default=3, help="how many learning rates each method may choose from")
    words.add_argument("--budget", default=None, help="the time that all runs may take together: 90m, 2h")
    words.add_argument("--folder", type=Path, default=Path("runs/compare"), help="where runs and tables are kept")
    words.add_argument("--other", type=Path, help="a file of other texts, one a line: how much each method forgets")
    words.add_argument("--whole", action="store_true", help="train the seeds with the validation rows, too, to the end")
    words.add_argument("--controls", action="store_true", help="add each method on random weights, on shuffled labels")
    words.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    words.set_defaults(trials=None)
    return words


def compare(arguments: Sequence[str]) -> None:
    """Run what is missing, and write the table; of a grid, one for each point and one over all."""
    given, words = parser().parse_known_args(list(arguments))
    for name in ("seeds", "rates", "jobs"):
        if vars(given)[name] < 1:
            raise TuningError(f"--{name} {vars(given)[name]} is out of range: take 1 or more.")
    given.trials = given.folder / "trials"
    points = grid.points(given)
    if not points:
        compare_at(given, words)
        return
    be_silent()
    columns = []
    for point in points:
        own = argparse.Namespace(**vars(given) | {"folder": point.folder(given.folder)})
        here = [*words, *point.words]
        columns.append(point.column(fitting.size_of(here)))
        columns[-1].entries, metric = compare_at(own, here)
    told = overview.write(given.folder, columns)
    Console(soft_wrap=True, highlight=False, markup=False).print(told, end="")
    draw(given.folder, overview.result_rows(columns, metric))


def compare_at(given: argparse.Namespace, words: Sequence[str]) -> tuple[list[comparison.Entry], str]:
    """Run what is missing with one configuration, write its table, and return its entries and the score that counts."""
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=runs, args=(given, words)) for _ in range(given.jobs - 1)]
    for other in others:
        other.start()
    try:
        results, monitor = runs(given, words)
    finally:
        for other in others:
            other.join()
    entries = comparison.entries_of(results, fitting.higher_is_better(monitor))
    metric = next((one["metric"] for own in results.values() for one in own if "metric" in one), monitor)
    metric = metric.removeprefix("val_")
    comparison.write(given.folder, entries, given.seeds, {"metric": metric, "seeds": given.seeds})
    pictures = draw(given.folder, comparison.result_rows(entries, metric))
    if entries:
        with atomic(given.folder / "page.html") as temporary:
            temporary.write_text(page(comparison.rows_of(entries, given.seeds), metric, pictures), encoding="utf-8")
    _say(given.folder, entries, given.seeds, metric, [name for name, own in results.items() if not own])
    for sentence in controls.findings(results):
        Console(soft_wrap=True, highlight=False, markup=False).print(sentence)
    return entries, metric


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write rows of results anew, and draw their pictures if there is something to draw with."""
    file = folder / "results.csv"
    file.unlink(missing_ok=True)
    write_rows(file, rows)
    return plot(str(file), str(folder / "pictures")) if rows and find_spec("matplotlib") else []


def runs(given: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, list[Result]], str]:
    """Run what is missing of a comparison, and return what each method has found, and the score that counts."""
    budget = seconds_of(given.budget)
    methods = list(dict.fromkeys(name_of(word) for word in given.methods))
    be_silent()
    last = [*words, *WHOLE] if given.whole else words
    task, text = fitting.describe(last)
    if given.controls:
        controls.check_task(task)
    if isinstance(task, HeadClassification) and not any(method.startswith("LinearProbe") for method in methods):
        methods.append(name_of(PROBE))
    other = using.lines_of(given.other, "--other") if given.other else []
    identity = hashlib.sha256("\n".join([text, *other]).encode()).hexdigest()
    run = partial(_told, words, last, task.monitor, other)
    trials = Trials(given.trials or given.folder / "trials", identity, run, budget)
    higher = fitting.higher_is_better(task.monitor)
    results = {name: trials.all_of([Trial(name, 1.0, 0, 1.0, True)]) or [] for name in fitting.untrained(task)}
    for method in methods:
        scale = best_scale(trials, method, scales_of(given.rates), higher)
        for name in (method, *(controls.controls_of(method) if given.controls else ())):
            results[name] = scored(trials, name, scale, given.seeds)
    return results, task.monitor


def scored(trials: Trials, method: str, scale: float | None, seeds: int) -> list[Result]:
    """Score the seeds of a method at the learning rates chosen, if there are any; fewer where the budget ends."""
    if scale is None:
        return []
    wanted = [Trial(method, scale, seed, 1.0, True) for seed in range(1, seeds + 1)]
    trials.all_of(wanted)
    return [found for trial in wanted if (found := trials.found(trial)) is not None]


def seconds_of(budget: str | None) -> float | None:
    """Return a time such as '90m' or '2h' in seconds.

    >>> seconds_of("90m"), seconds_of("1.5h")
    (5400.0, 5400.0)

    Raises:
        TuningError: it is none.
    """
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget)
    if found is None:
        raise TuningError(f"--budget {budget!r} is no time: write it as 90s, 30m, 2h or 1d.")
    return float(found[1]) * _UNITS[found[2]]


def be_silent() -> None:
    """Let runs print no bars, hints and seeds; what goes wrong is an error."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _told(words: Sequence[str], last: Sequence[str], monitor: str, other: Sequence[str], trial: Trial) -> Result:
    what = f"{trial.method}, rates x {trial.scale:g}, seed {trial.seed}" + ("" if trial.tests else " (choosing)")
    Console(stderr=True, soft_wrap=True).print(what, highlight=False, markup=False)
    return fitting.run(last if trial.tests else words, monitor, trial, other)


def _say(folder: Path, entries: Sequence[comparison.Entry], seeds: int, metric: str, missing: list[str]) -> None:
    console = Console(highlight=False, markup=False)
    for table in comparison.tables(comparison.rows_of(entries, seeds), comparison.costs_of(entries)):
        console.print(table)
    said = f"{metric} on the test rows; {folder}/table.md, .csv and .json, costs.csv, results.csv, page.html"
    console.print(said, soft_wrap=True)
    if missing:
        said = f"the budget ended before {', '.join(missing)}: the same command with a larger --budget goes on"
        console.print(said, soft_wrap=True)
