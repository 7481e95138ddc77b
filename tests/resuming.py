"""Draws runs, saves each at every moment, resumes from every file, and compares with the run that was not interrupted.

python -m tests.resuming --runs 40 prints a table. In it a resume is exact (the difference of weights, moments, losses,
metrics and counters is 0.0), or it has said in a sentence why it is not, or it differs silently, which is a failure.
"""

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_peft import collect
from tests import resuming_runs
from tests.resuming_runs import Drawn

SAID = ("does not resume exactly", "is not what it was in the run", "worker processes that persist")
HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)
"""Where a file is written by a callback."""
ENDS = (
    "data",
    "on_train_batch_start",
    "training_step",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "validation_step",
    "on_validation_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
)
"""Where a run ends by an exception, of which a callback writes a file."""


class SaveEverywhere(Checkpoint):
    """Writes a file in each hook of `HOOKS`, as a ModelCheckpoint or a user's own callback would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.losses = folder, [], []

    def save(self, trainer: L.Trainer, hook: str) -> None:
        if trainer.sanity_checking:
            return
        file = self.folder / f"{len(self.files):03d}-{hook}.ckpt"
        trainer.save_checkpoint(file)
        self.files.append(file)


def _saving(hook: str) -> Any:
    return lambda self, trainer, *args: self.save(trainer, hook)


for _hook in HOOKS:
    setattr(SaveEverywhere, _hook, _saving(_hook))


class PlannedError(RuntimeError):
    """What ends a run."""


class EndAt(L.Callback):
    """Ends a run at the n-th time that it comes to a place of `ENDS`, by an exception, Ctrl-C or SIGTERM."""

    def __init__(self, place: str, left: int, how: str) -> None:
        self.place, self.left, self.how = place, left, how

    def reach(self, place: str) -> None:
        if place != self.place:
            return
        self.left -= 1
        if self.left == 0:
            if self.how == "SIGTERM":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise KeyboardInterrupt if self.how == "Ctrl-C" else PlannedError(place)


def _reaching(place: str) -> Any:
    return lambda self, trainer, *args: None if trainer.sanity_checking else self.reach(place)


for _place in ENDS:
    if _place.startswith("on_"):
        setattr(EndAt, _place, _reaching(_place))


@dataclass
class Outcome:
    """What a run has come to."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    rest: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    error: str = ""


def fit(drawn: Drawn, *callbacks: L.Callback, ckpt_path: Path | None = None, seed: int = 3) -> Outcome:
    """Train as drawn, and return what has come out."""
    L.seed_everything(seed, verbose=False)
    module, outcome = resuming_runs.module_of(drawn), Outcome()
    end = next((c for c in callbacks if isinstance(c, EndAt)), None)
    module.reach = end.reach if end is not None else lambda place: None
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("always")
        trainer = resuming_runs.trainer_of(drawn, Path(folder), *callbacks)
        train, validation = resuming_runs.loaders_of(drawn, module)
        try:
            trainer.fit(module, train, validation, ckpt_path=ckpt_path)
        except (PlannedError, SystemExit, L.pytorch.utilities.exceptions.SIGTERMException):
            outcome.error = "ended"
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)
    outcome.said = [str(w.message) for w in caught if any(words in str(w.message) for words in SAID)]
    outcome.losses = module.losses
    outcome.tensors = {name: tensor.detach().clone() for name, tensor in collect(module).items()}
    for i, optimizer in enumerate(trainer.optimizers):
        for k, state in optimizer.state_dict()["state"].items():
            outcome.tensors |= {f"{i}.{k}.{n}": t.clone() for n, t in state.items() if isinstance(t, Tensor)}
    outcome.rest = resuming_runs.counters(trainer)
    return outcome


def difference(whole: Outcome, resumed: Outcome) -> str:
    """Say in what two runs differ; '': in nothing."""
    if resumed.error:
        return resumed.error
    if whole.tensors.keys() != resumed.tensors.keys():
        return f"other tensors: {sorted(whole.tensors.keys() ^ resumed.tensors.keys())[:3]}"
    for name, tensor in whole.tensors.items():
        other = resumed.tensors[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name} is {other.dtype} of shape {list(other.shape)}"
        if not torch.equal(tensor, other):
            return f"{name} by {float((tensor.double() - other.double()).abs().max()):.2g}"
    if resumed.losses and whole.losses[-len(resumed.losses) :] != resumed.losses:
        return "losses"
    if not resumed.losses:
        return ""  # it was at its end, and nothing has been counted
    return next((f"{k}: {v} is {resumed.rest.get(k)}" for k, v in whole.rest.items() if resumed.rest.get(k) != v), "")


@dataclass
class Row:
    """One resume: the run, where the file is from, whether it said something, and the difference."""

    run: str
    point: str
    said: bool
    difference: str

    @property
    def verdict(self) -> str:
        if not self.difference:
            return "exact, and said a doubt" if self.said else "exact"
        return "said" if self.said else "SILENT"


def resumes(drawn: Drawn, folder: Path, most: int, ends: int) -> Iterator[Row]:
    """Yield a row for each file of a drawn run.

    Args:
        drawn: the run.
        folder: of the files.
        most: how many of the files that callbacks write are resumed from.
        ends: how many runs are ended by an exception.
    """
    rng = random.Random(str(drawn))
    whole, saving = fit(drawn), SaveEverywhere(folder)
    saved = fit(drawn, saving)
    yield Row(str(drawn), "saving changes nothing", False, difference(whole, saved))
    files = saving.files if len(saving.files) <= most else sorted(rng.sample(saving.files, most))
    points = [(file.stem, file, None) for file in files]
    for i in range(ends):
        place, how = rng.choice(ENDS), rng.choice(("exception", "Ctrl-C", "SIGTERM"))
        end, name = EndAt(place, rng.randint(1, 6), how), f"end{i}"
        ended = fit(drawn, end, OnExceptionCheckpoint(folder, name))
        if (folder / f"{name}.ckpt").is_file():
            points.append((f"{how} in {place}", folder / f"{name}.ckpt", ended))
        elif ended.error not in ("", "ended"):
            yield Row(str(drawn), f"{how} in {place}", False, ended.error)
    for point, file, _ in points:
        resumed = fit(drawn, ckpt_path=file, seed=77)
        yield Row(str(drawn), point, bool(resumed.said), difference(whole, resumed))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--points", type=int, default=9, help="files of callbacks that are resumed from, of each run")
    parser.add_argument("--ends", type=int, default=4, help="runs that an exception ends, of each run")
    options = parser.parse_args()
    verdicts: Counter[str] = Counter()
    for number in range(options.first, options.first + options.runs):
        drawn, begun, own = resuming_runs.draw(number), time.perf_counter(), Counter[str]()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(sys.stdout):
            for row in resumes(drawn, Path(folder), options.points, options.ends):
                own[row.verdict] += 1
                if row.verdict != "exact":
                    print(f"    {row.verdict}: {row.point}: {row.difference}", flush=True)
        print(f"{number:3d} {drawn} {dict(own)} {time.perf_counter() - begun:.1f} s", flush=True)
        verdicts += own
    print(f"{sum(verdicts.values())} points:", dict(verdicts))


if __name__ == "__main__":
    main()
