"""Kills runs with SIGKILL while they save, at each call of the system and at random moments, and resumes them.

python -m tests.killing --random 100 prints what came of it. After a kill a whole file must be there from the first save
on, and the run that resumes from the newest one must end as the run that was not killed, bit for bit.
"""

import argparse
import os
import random
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, collect
from lightning_peft.core.delta_file import read_checkpoint
from tests.modules import Tuned, loader, trainer

CALLS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "replace"), (Path, "open"), (Path, "unlink"), (Path, "mkdir"), (torch, "save"), (Path, "glob"),
)  # fmt: skip
"""What a save asks of the system, by the function that asks."""


def fit(folder: Path, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    """Train six steps, write a file after each over the one before, and return the delta."""
    torch.manual_seed(3)
    module = Tuned(dropout=0.1)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    run = trainer(folder, LoRA(r=2, dropout=0.1), saving, max_epochs=2, enable_checkpointing=True)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")
        run.fit(module, loader("bert", shuffle=True), loader("bert", rows=4), ckpt_path=ckpt_path)
    return {name: tensor.detach().clone() for name, tensor in collect(module).items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: a forked process has none of the others of OpenMP, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def killed(folder: Path, prepare: Callable[[], None], seconds: float | None = None) -> bool:
    """Run `fit` in a process of its own that is killed; tell whether it was."""
    child = os.fork()
    if child == 0:
        prepare()
        fit(folder)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def at_call(number: int) -> Callable[[], None]:
    """Return what makes a process kill itself just before or after its n-th call of `CALLS`."""
    left = [number]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            die()
            result = function(*args, **kwargs)
            die()
            return result

        return call

    def prepare() -> None:
        for owner, name in CALLS:
            setattr(owner, name, wrapped(getattr(owner, name)))

    return prepare


def at_bytes(count: int) -> Callable[[], None]:
    """Return what makes the system kill a process that writes a file longer than this."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))

    return prepare


def check(folder: Path, whole: dict[str, torch.Tensor]) -> str:
    """Resume from the newest file, and say what is wrong; '': nothing."""
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    for file in files:
        read_checkpoint(file)
    ended = fit(folder, files[-1] if files else None)
    if list(folder.glob(".*.tmp")):
        return "a temporary file is left"
    return "" if all(torch.equal(whole[name], ended[name]) for name in whole) else f"differs from {files[-1:]}"


def attempt(whole: dict[str, torch.Tensor], prepare: Callable[[], None], seconds: float | None = None) -> str:
    """Kill a run and resume it; return 'killed', 'ended before', or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        was_killed = killed(Path(folder), prepare, seconds)
        return check(Path(folder), whole) or ("killed" if was_killed else "ended before")


def main() -> None:
    """Kill at each call, at numbers of bytes and at random moments, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--calls", type=int, default=400, help="the most calls to kill at")
    options = parser.parse_args()
    table: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        whole = fit(Path(folder))
        length = time.perf_counter() - begun
    for number in range(1, options.calls + 1):
        outcome = attempt(whole, at_call(number))
        table["call", outcome] += 1
        if outcome == "ended before":
            break
    for count in range(0, 60000, 6000):
        table["bytes", attempt(whole, at_bytes(count))] += 1
    rng = random.Random(0)
    while table["moment", "killed"] < options.random:
        table["moment", attempt(whole, lambda: None, rng.uniform(0, length))] += 1
    for (kind, outcome), times in sorted(table.items()):
        print(f"{kind:8} {outcome:40} {times}")


if __name__ == "__main__":
    main()
