"""What each method scores at its recommended learning rates and at others, when only ``--method`` changes.

    python -m tests.benchmarks.rates --methods LoRA BitFit --budget 30m
    python -m tests.benchmarks.rates --methods VPT --config mine.yaml --folder runs/rates_of_images

All rates of a method are multiplied by 1, 3, 0.3, 10 and 0.1. Each is run with the first seed; the recommended one, and
those within five points of the best, with the others. The score is that of the validation rows. A run is a file of the
folder, as in ``lightning-peft compare``: a killed call goes on where it was, and prints what all calls have found.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from lightning_peft.commands import fitting
from lightning_peft.commands.comparing import be_silent, seconds_of
from lightning_peft.commands.method_words import name_of
from lightning_peft.commands.trials import Trial, Trials, scales_of

CONFIG = [
    "--config",
    "quickstart",
    "--data.max_length",
    "24",
    "--data.batch_size",
    "16",
    "--trainer.max_epochs",
    "1",
    "--trainer.limit_train_batches",
    "80",
    "--trainer.accelerator",
    "cpu",
]
FAR = 0.05
"""How far behind the best with the first seed a rate may be, to be run with the others."""


def measure(trials: Trials, method: str, rates: int, seeds: int) -> dict[float, list[float]]:
    """Return, by the factor of the rates, the scores of the seeds; run what is missing and the budget has room for."""
    scales = scales_of(rates)
    first = {scale: scores_of(trials, method, scale, [1]) for scale in scales}
    best = max((found[0] for found in first.values() if found), default=0.0)
    near = [scale for scale in scales if scale == 1.0 or (first[scale] and first[scale][0] > best - FAR)]
    return first | {scale: scores_of(trials, method, scale, range(1, seeds + 1)) for scale in near}


def scores_of(trials: Trials, method: str, scale: float, seeds: Sequence[int]) -> list[float]:
    wanted = [Trial(method, scale, seed, 1.0, tests=False) for seed in seeds]
    trials.all_of(wanted)
    return [found["validation"] for trial in wanted if (found := trials.found(trial)) is not None]


def row_of(trials: Trials, method: str, found: dict[float, list[float]]) -> str:
    """Return a line of the table: the recommended rates, their score, the best other one, and how far it is above."""
    own = trials.found(Trial(method, 1.0, 1, 1.0, tests=False))
    if own is None:
        return f"| `{method}` | not run | | | |"
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in own["rates"].items())
    least = min(len(found[1.0]), 3)
    others = {scale: scores for scale, scores in found.items() if scale != 1.0 and scores}
    full = {scale: scores for scale, scores in others.items() if len(scores) >= least} or others
    best = max(full, key=lambda scale: fmean(full[scale]), default=None)
    said = "" if best is None else f"{shown(full[best])} at {best:g} times"
    above = "" if best is None else f"{100 * (fmean(full[best]) - fmean(found[1.0])):+.1f}"
    return f"| `{method}` | {rates} | {shown(found[1.0])} | {said} | {above} | {len(others) + 1} |"


def shown(scores: Sequence[float]) -> str:
    """Return the mean, with the deviation, or the number of seeds where it is one."""
    return f"{fmean(scores):.3f} ± {stdev(scores):.3f}" if len(scores) > 1 else f"{fmean(scores):.3f} (one seed)"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--budget", help="of all runs together, as 30m")
    parser.add_argument("--folder", type=Path, default=Path("runs/rates"))
    given, words = parser.parse_known_args()
    words = words or CONFIG
    be_silent()
    task, identity = fitting.describe(words)
    run = partial(fitting.run, words, task.monitor)
    trials = Trials(given.folder, identity, run, seconds_of(given.budget))
    print("| method | recommended rates | score | best other | points above | rates |\n|---|---|---|---|---:|---:|")
    for word in given.methods:
        method = name_of(word)
        print(row_of(trials, method, measure(trials, method, given.rates, given.seeds)), flush=True)


if __name__ == "__main__":
    main()
