"""Accuracy on the classes that a method was trained on (base) and on classes that it never saw (new).

Source: Zhou et al. 2022, arXiv 2203.05557, section 4.1. The average harmonic mean that papers print is that of the
averaged accuracies, which is more than the average of the harmonic means of the data sets: both are given.

>>> round(harmonic_mean(69.34, 74.22), 2), round(harmonic_mean(80.47, 71.69), 2)
(71.7, 75.83)
"""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from lightning_peft.core.errors import TuningError

AVERAGE = "average"


def harmonic_mean(base: float, new: float) -> float:
    """Return ``2 b n / (b + n)``, and 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def base_new_table(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each method and data set, ``base``, ``new`` and ``H``, means over the seeds, from rows of results.

    The rows are those of the metrics ``base_accuracy`` and ``new_accuracy``. A method's last entry, the average over
    its data sets, has ``H`` as the mean of those of the data sets and ``H_published`` as that of the averages.

    Raises:
        TuningError: a method has one of the two accuracies only.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row["metric"] in ("base_accuracy", "new_accuracy"):
            key = (str(row.get("method", "")), str(row.get("dataset", "")), row["metric"])
            values.setdefault(key, []).append(row["value"])
    table: list[dict[str, Any]] = []
    for method in dict.fromkeys(method for method, _, _ in values):
        own: list[dict[str, Any]] = []
        for dataset in dict.fromkeys(d for m, d, _ in values if m == method):
            try:
                base, new = (fmean(values[method, dataset, f"{part}_accuracy"]) for part in ("base", "new"))
            except KeyError as error:
                missing = error.args[0][2]
                raise TuningError(f"{method} has no {missing} on {dataset}: test it on both halves.") from None
            own.append({"method": method, "dataset": dataset, "base": base, "new": new, "H": harmonic_mean(base, new)})
        base, new = fmean(entry["base"] for entry in own), fmean(entry["new"] for entry in own)
        mean = fmean(entry["H"] for entry in own)
        average = {"method": method, "dataset": AVERAGE, "base": base, "new": new, "H": mean}
        table += [*own, {**average, "H_published": harmonic_mean(base, new)}]
    return table
