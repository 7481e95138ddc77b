"""The runs of a comparison: each is one file of a folder, so that a killed comparison goes on where it was.

Processes that share the folder share the runs: who runs one holds a lock on it, which goes with the process.
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_peft.core.storage import atomic

Result = dict[str, Any]
"""What a run has found: the score on validation rows and, of a run that scores, what the test said."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        method: as it is written, or the name of a row that trains nothing.
        scale: what the recommended learning rates are multiplied by.
        seed: of all that is random.
        share: of the training that the configuration asks for.
        tests: whether it is scored on the test rows; what chooses a rate is not.
    """

    method: str
    scale: float
    seed: int
    share: float
    tests: bool


class Trials:
    """The runs in a folder, of one configuration.

    Args:
        folder: where they are.
        identity: all that a run depends on beside what a `Trial` says.
        run: runs one.
        budget: seconds that all runs may take together; None: as many as it takes.
    """

    def __init__(self, folder: Path, identity: str, run: Callable[[Trial], Result], budget: float | None) -> None:
        self.folder = folder
        self.identity = identity
        self.run = run
        self.budget = budget
        folder.mkdir(parents=True, exist_ok=True)

    def found(self, trial: Trial) -> Result | None:
        """Return what a run has found, or None if it has not come to its end."""
        path = self._path(trial)
        return json.loads(path.read_text()) if path.is_file() else None

    def all_of(self, trials: Sequence[Trial]) -> list[Result] | None:
        """Run those that have not been run, and return what all have found, or None where the budget has no room.

        What another process runs is waited for in the end.
        """
        for waits in (False, True):
            for trial in trials:
                if self.found(trial) is not None:
                    continue
                with self._locked(trial, waits) as is_mine:
                    if not is_mine or self.found(trial) is not None:
                        continue
                    if self.budget is not None and self.spent() >= self.budget:
                        return None
                    self._run(trial)
        every = [self.found(trial) for trial in trials]
        return [one for one in every if one is not None] if None not in every else None

    def spent(self) -> float:
        """Return the seconds that all runs in the folder have taken."""
        return sum(json.loads(path.read_text())["seconds"] for path in self.folder.glob("*.json"))

    def _run(self, trial: Trial) -> None:
        start = time.perf_counter()
        found = self.run(trial)
        found = {**asdict(trial), **found, "seconds": round(time.perf_counter() - start, 3)}
        with atomic(self._path(trial)) as temporary:
            temporary.write_text(json.dumps(found))

    @contextmanager
    def _locked(self, trial: Trial, waits: bool) -> Iterator[bool]:
        """Hold the lock of a run; yield False where another process holds it."""
        with self._path(trial).with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _path(self, trial: Trial) -> Path:
        text = json.dumps([self.identity, asdict(trial)])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def best_scale(trials: Trials, method: str, scales: Sequence[float], higher: bool) -> float | None:
    """Return the factor of the learning rates that is best on validation rows, by successive halving.

    Each round keeps the better half and trains it twice as long; the last round, of two, trains half as long as the
    configuration asks for. Source: Jamieson and Talwalkar 2016, arXiv 1502.07943, algorithm 1. A draw goes to the
    factor that is nearest to 1.

    Args:
        trials: the runs.
        method: as it is written.
        scales: the factors to choose from.
        higher: whether a higher score is better.

    Returns:
        The factor, or None where the budget has no room.
    """
    left = list(scales)
    while len(left) > 1:
        share = 1.0 / len(left)
        results = trials.all_of([Trial(method, scale, 0, share, tests=False) for scale in left])
        if results is None:
            return None
        scores = {scale: result["validation"] for scale, result in zip(left, results, strict=True)}
        sign = -1 if higher else 1
        order = sorted(left, key=lambda scale: (sign * scores[scale], max(scale, 1 / scale)))
        left = order[: (len(left) + 1) // 2]
    return left[0]


def scales_of(count: int) -> list[float]:
    """Return so many factors around 1, each half a power of ten from the next.

    >>> scales_of(3)
    [1.0, 3.0, 0.3]
    >>> scales_of(1)
    [1.0]
    """
    steps = [0, *(sign * size for size in range(1, count) for sign in (1, -1))][:count]
    return [float(f"{10 ** (step / 2):.1g}") for step in steps]
