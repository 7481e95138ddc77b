"""Writes predictions to a file that a killed run leaves whole rows in and the next run continues."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console

from lightning_peft.data.protocols import Rows, TextColumns
from lightning_peft.reports.by_delta import DELTA, ByDelta, each_alone, load_side_by_side
from lightning_peft.tasks.texts import plain
from lightning_peft.training import patches

_SKIPPED: dict[str, Any] = {}
"""What stands for the predictions of a batch whose rows are all written already."""


class PredictionWriter(BasePredictionWriter):
    """Writes the output of ``predict_step`` as JSON lines, one a row with its number, in the order of the rows.

    The text of a row stands before what is said of it, where the data say which columns hold it; scores are rounded to
    six digits, and probabilities go by the names of the classes, in their order.

    ``predict_step`` returns a mapping of things that have one entry a row, or one such thing. Each process writes as it
    goes; the first one puts the rows together in the end. A run that was killed leaves its rows beside the file; the
    next one with the same arguments of module, data and checkpoint goes on after them, with any number of processes,
    and another run begins anew.

    Args:
        file: where to write, below the trainer's ``default_root_dir`` if it is no absolute path.
        resume: whether to go on with the rows of a run that was killed.
        deltas: files of deltas of the module's backbone, which brings none itself. A row is then one of a delta, whose
            file stands in the column ``delta``; each batch is computed with one after the other.
    """

    def __init__(self, file: str = "predictions.jsonl", resume: bool = True, deltas: Sequence[str | Path] = ()) -> None:
        super().__init__(write_interval="batch")
        self.file = file
        self.resume = resume
        self.deltas = list(deltas)
        self._done: set[int] = set()
        self._texts: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load the deltas, each under a name."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and self.deltas:
            load_side_by_side(pl_module, self.deltas)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the rows of a run that was killed; batches that they fill are not predicted again."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        note, what = path.with_name(f".{path.name}.run"), _identity(trainer, pl_module, self.deltas)
        if trainer.is_global_zero and not (self.resume and note.is_file() and note.read_text() == what):
            for part in self._parts(trainer):
                part.unlink()
            note.write_text(what)
        trainer.strategy.barrier()
        written = Counter(row for part in self._parts(trainer) for row, _ in _rows(part))
        self._done = {row for row, times in written.items() if times >= max(len(self.deltas), 1)}
        trainer.strategy.barrier()  # all have read before one writes
        own = self._part(trainer)
        _end_at_whole_line(own)
        if self._done and trainer.is_global_zero:
            _say(f"{len(self._done)} predictions of an earlier run are kept")
        self._texts = _texts(getattr(trainer, "datamodule", None))
        step = partial(self._predict, trainer, pl_module.predict_step)
        patches.of_run(trainer).patch(pl_module, "predict_step", step)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch that are not written yet."""
        if prediction is _SKIPPED:
            return
        found = prediction if isinstance(prediction, ByDelta) else {None: prediction}
        lines = [line for delta, one in found.items() for line in self._lines(one, batch_indices, pl_module, delta)]
        with self._part(trainer).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _lines(
        self, prediction: Any, rows: Sequence[int] | None, module: L.LightningModule, delta: str | None
    ) -> Iterator[str]:
        """Return what is said of the rows that are not written yet, by a delta or by the module as it is."""
        columns = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
        said = plain(columns, module)
        which = {} if delta is None else {DELTA: delta}
        for row, values in zip(rows or (), zip(*said.values(), strict=True), strict=True):
            if row not in self._done:
                line = {"row": row, **which, **self._shown(row), **dict(zip(said, values, strict=True))}
                yield json.dumps(line, ensure_ascii=False) + "\n"

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the rows of all processes together."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            path, rows = self._path(trainer), {}
            for part in self._parts(trainer):
                rows.update(_rows(part))  # ranks may share a row, to be of equal length
            whole = path.with_name(f".{path.name}.whole")
            whole.write_text("".join(f"{rows[key]}\n" for key in sorted(rows, key=self._order)), encoding="utf-8")
            whole.replace(path)  # the parts go when the file is there
            for part in self._parts(trainer):
                part.unlink()
            path.with_name(f".{path.name}.run").unlink(missing_ok=True)
            _say(f"{len(rows)} predictions in {path}")

    def _order(self, key: tuple[int, str]) -> tuple[int, int]:
        row, delta = key
        files = [str(file) for file in self.deltas]
        return row, files.index(delta) if delta in files else 0

    def _predict(self, trainer: L.Trainer, step: Any, *args: Any, **kwargs: Any) -> Any:
        rows = trainer.predict_loop.current_batch_indices
        alone = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))  # else a forward is of all processes
        if alone and rows and self._done.issuperset(rows):
            return _SKIPPED
        if self.deltas:
            return each_alone(trainer.lightning_module, self.deltas, partial(step, *args, **kwargs))
        return step(*args, **kwargs)

    def _shown(self, row: int) -> dict[str, Any]:
        """Return the text of a row, by the names of its columns."""
        return {} if self._texts is None else dict(self._texts[row])

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.file

    def _part(self, trainer: L.Trainer) -> Path:
        path = self._path(trainer)
        return path.with_name(f".{path.name}.{trainer.global_rank}")

    def _parts(self, trainer: L.Trainer) -> list[Path]:
        path = self._path(trainer)
        return [part for part in path.parent.glob(f".{path.name}.*") if part.suffix.removeprefix(".").isdecimal()]


def _texts(data: Any) -> Any:
    """Return the rows to predict with the columns of their text alone, where each is one row of a batch; or None."""
    if not isinstance(data, TextColumns) or not isinstance(data, Rows) or isinstance(data.text, str):
        return None
    rows = data.rows("predict")
    return None if rows is None else rows.select_columns(list(data.text))


def _rows(part: Path) -> dict[tuple[int, str], str]:
    """Return number of a row, and its delta or '' -> line for the whole lines of a file; the last may be cut off."""
    text = part.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")[:-1]  # what follows the last line feed was not written to its end
    return {(said["row"], str(said.get(DELTA, ""))): line for line in lines for said in (json.loads(line),)}


def _end_at_whole_line(part: Path) -> None:
    content = part.read_bytes() if part.is_file() else b""
    part.write_bytes(content[: content.rfind(b"\n") + 1])


def _identity(trainer: L.Trainer, module: L.LightningModule, deltas: Sequence[str | Path]) -> str:
    """Return a hash of what the predictions depend on: arguments of module and data, and the checkpoint."""
    data = getattr(trainer, "datamodule", None)
    checkpoint = trainer.ckpt_path
    known = Path(str(checkpoint))
    parts = [
        type(module).__qualname__,
        sorted((name, repr(value)) for name, value in module.hparams.items()),
        type(data).__qualname__,
        sorted((n, repr(v)) for n, v in getattr(data, "hparams", {}).items() if n not in ("batch_size", "num_workers")),
        str(checkpoint),
        known.stat().st_mtime_ns if checkpoint and known.is_file() else None,
        [(str(delta), Path(delta).stat().st_mtime_ns) for delta in deltas],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, highlight=False)
