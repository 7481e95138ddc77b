"""Writes predictions to a file that a killed run leaves whole rows in and the next run continues."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from rich.console import Console

from lightning_peft.data.protocols import Rows, TextColumns
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
    """

    def __init__(self, file: str = "predictions.jsonl", resume: bool = True) -> None:
        super().__init__(write_interval="batch")
        self.file = file
        self.resume = resume
        self._done: set[int] = set()
        self._texts: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the rows of a run that was killed; batches that they fill are not predicted again."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        note, what = path.with_name(f".{path.name}.run"), _identity(trainer, pl_module)
        if trainer.is_global_zero and not (self.resume and note.is_file() and note.read_text() == what):
            for part in self._parts(trainer):
                part.unlink()
            note.write_text(what)
        trainer.strategy.barrier()
        self._done = {row for part in self._parts(trainer) for row in _rows(part)}
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
        columns = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
        said = plain(columns, pl_module)
        lines = [
            json.dumps({"row": row, **self._shown(row), **dict(zip(said, values, strict=True))}, ensure_ascii=False)
            + "\n"
            for row, values in zip(batch_indices or (), zip(*said.values(), strict=True), strict=True)
            if row not in self._done
        ]
        with self._part(trainer).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the rows of all processes together."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            path, rows = self._path(trainer), {}
            for part in self._parts(trainer):
                rows.update(_rows(part))  # ranks may share a row, to be of equal length
            whole = path.with_name(f".{path.name}.whole")
            whole.write_text("".join(f"{rows[row]}\n" for row in sorted(rows)), encoding="utf-8")
            whole.replace(path)  # the parts go when the file is there
            for part in self._parts(trainer):
                part.unlink()
            path.with_name(f".{path.name}.run").unlink(missing_ok=True)
            _say(f"{len(rows)} predictions in {path}")

    def _predict(self, trainer: L.Trainer, step: Any, *args: Any, **kwargs: Any) -> Any:
        rows = trainer.predict_loop.current_batch_indices
        alone = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))  # else a forward is of all processes
        if alone and rows and self._done.issuperset(rows):
            return _SKIPPED
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


def _rows(part: Path) -> dict[int, str]:
    """Return row number -> line for the whole lines of a file; the last one may be cut off."""
    text = part.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")[:-1]  # what follows the last line feed was not written to its end
    return {json.loads(line)["row"]: line for line in lines}


def _end_at_whole_line(part: Path) -> None:
    content = part.read_bytes() if part.is_file() else b""
    part.write_bytes(content[: content.rfind(b"\n") + 1])


def _identity(trainer: L.Trainer, module: L.LightningModule) -> str:
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
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, highlight=False)
