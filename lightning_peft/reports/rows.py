"""Results as rows: method, data set, seed, shots, metric, value, and what else says where a value stands (epoch, task).

Tables and pictures are made from rows, which stay beside them as CSV or JSON lines, so that runs of different days and
machines make one picture.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic
from lightning_peft.core.tuning import tunings

COLUMNS = ("method", "dataset", "seed", "shots", "metric", "value")
Row = dict[str, Any]


class ResultRows(L.Callback):
    """Appends the scores of a test, and the ``result_rows()`` of the module and its methods, to a file.

    The module's ``result_rows()`` takes no argument, that of a callback takes the module.

    Args:
        file: CSV (.csv) or JSON lines (.jsonl), below the trainer's ``default_root_dir`` if it is no absolute path.
        method: what to call the method; None: the names of the classes.
        epoch_metrics: names of logged values to write after each epoch of training, too, with ``epoch``.
        extra: further columns, such as ``{"prompt_length": 8}``.
    """

    def __init__(
        self,
        file: str = "results.csv",
        method: str | None = None,
        epoch_metrics: list[str] | None = None,
        extra: dict[str, str | int | float] | None = None,
    ) -> None:
        if Path(file).suffix not in (".csv", ".jsonl"):
            raise TuningError(f"file={file!r} has an ending that is not known: take .csv or .jsonl.")
        self.file = file
        self.method = method
        self.epoch_metrics = epoch_metrics or []
        self.extra = extra or {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the values of the epoch."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rows = [
            {"metric": name, "value": logged[name], "epoch": trainer.current_epoch}
            for name in self.epoch_metrics
            if name in logged
        ]
        self._write(trainer, pl_module, rows)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the rows of the module; check that the values of epochs were logged.

        Raises:
            TuningError: one was not.
        """
        missing = [name for name in self.epoch_metrics if name not in trainer.callback_metrics]
        if missing:
            known = ", ".join(trainer.callback_metrics) or "nothing"
            raise TuningError(f"epoch_metrics has {missing[0]!r}, which was never logged (but {known}): leave it out.")
        own = getattr(pl_module, "result_rows", None)
        rows = list(own()) if own is not None else []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            theirs = getattr(callback, "result_rows", None)
            if theirs is not None and callback is not self and theirs is not own:
                rows += theirs(pl_module)
        self._write(trainer, pl_module, rows)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores of the test, without ``test_`` before their names."""
        scores = {n.removeprefix("test_"): v for n, v in trainer.callback_metrics.items() if n.startswith("test_")}
        self._write(trainer, pl_module, [{"metric": name, "value": float(value)} for name, value in scores.items()])

    @rank_zero_only
    def _write(self, trainer: L.Trainer, module: L.LightningModule, rows: list[Row]) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        parts = [getattr(data, part, None) for part in ("data", "source", "target")]
        parts = [part for part in parts if isinstance(part, L.LightningDataModule)] or [data]  # some are made of others
        names = [type(method).__name__ for _, _, tuning in tunings(module) for method in tuning.methods.values()]
        common = {
            "method": self.method or " + ".join(names) or "none",
            "dataset": " to ".join(type(part).__name__ for part in parts) if data is not None else "",
            "seed": getattr(parts[0], "seed", ""),
            "shots": getattr(parts[0], "shots", None) or "",
            **self.extra,
        }
        if rows:
            write_rows(Path(trainer.default_root_dir) / self.file, [{**common, **row} for row in rows])


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add rows, which may have columns of their own, to a file of CSV or JSON lines; it appears whole or not at all."""
    path = Path(path)
    every = [*(read_rows(path) if path.is_file() else []), *rows]
    names = list(dict.fromkeys([*COLUMNS, *(name for row in every for name in row)]))
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(row)) + "\n" for row in every)
        else:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(every)
    return path


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a file of CSV or JSON lines; numbers are numbers, and empty cells are left out.

    Raises:
        TuningError: there is no such file, or its rows have no metric and value.
    """
    path = Path(path)
    if not path.is_file():
        raise TuningError(f"{path} is no file: give rows as .csv or .jsonl.")
    with path.open(newline="") as file:
        if path.suffix == ".jsonl":
            raw: list[Row] = [json.loads(line) for line in file if line.strip()]
        else:
            raw = list(csv.DictReader(file))
    rows = [{name: _number(value) for name, value in row.items() if value not in ("", None)} for row in raw]
    for number, row in enumerate(rows, 1):
        if "metric" not in row or not isinstance(row.get("value"), (int, float)):
            raise TuningError(f"row {number} of {path} has no metric with a number as its value: mend it.")
    return rows


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
