"""Check and measure this package on a GPU in one call of at most nine minutes, from the tree as it is.

    python examples/gpu_checks.py [--only 7 8] [--seconds 500] [--sizes tiny] > table.md

The rows run in their order, what may be wrong before what is measured. Each line of the Markdown table is printed
when it is known, and `docs/gpu.md` takes it as it is. Rows 2 and 6 take the methods from the tests, whose packages
they need. A case that fails stops no other: its line says where, and the whole of it is printed beside the table, to
stderr. A row that does not fit into the time that is left is named and left out, and one that takes twice its time is
cut off. Weights are random. The exit code is the number of rows that failed. ``--sizes tiny`` runs all of it on a
CPU, in less than a minute of its time.
"""

import argparse
import gc
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins; row 4 is deterministic
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from gpu import checks, figures
from gpu.models import Line, Setup

ROWS = {
    1: (30, checks.one_step),
    2: (80, checks.every_method_in_every_precision),
    3: (20, checks.start_remove_merge),
    4: (40, checks.resume),
    5: (25, checks.prefixes),
    6: (30, checks.synchronizes_nothing),
    7: (60, figures.short_texts),
    8: (60, figures.long_texts),
    9: (70, figures.large_model),
    10: (90, figures.compiled),
    11: (25, figures.strategies),
    12: (15, figures.experts),
    13: (20, figures.images),
}
"""The number of a row -> how long it takes on an H100-class card [s], and the function that yields its cases."""


class Over(BaseException):
    """A row takes too long. No exception, so that a case cannot take it for a failure of its own."""


def show(row: int, case: str, line: Line) -> None:
    """Print one line of the table."""
    figures = [line.milliseconds, line.peak, line.tokens]
    cells = [row, case, line.verdict, *("" if f is None else f"{f:,.4g}" for f in figures), line.note]
    print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |", flush=True)


def failed(error: Exception) -> Line:
    """Return the line of an error, with the end of its traceback; all of it goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return Line("FAILED", note=f"{type(error).__name__} at {where}: {error}"[:400])


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Over` when the time is up, as soon as Python runs."""

    def stop(*_: object) -> None:
        raise Over

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(row: int, setup: Setup) -> bool:
    """Run the cases of a row, print their lines as they come, and tell whether all went well."""
    seconds, function = ROWS[row]
    went, case = True, function.__name__
    limit = min(2 * seconds, setup.left()) if setup.gpu else setup.left()
    try:
        with at_most(limit):
            for case, check in function(setup):
                line = _line_of(check)
                show(row, case, line)
                went &= line.verdict != "FAILED"
                if setup.gpu:
                    gc.collect()
                    torch.cuda.empty_cache()
    except Over:
        show(row, f"{case} and the rest", Line("left out", note=f"cut off after {limit:.0f} s"))
    except Exception as error:
        show(row, case, failed(error))
        went = False
    return went


def _line_of(check: Callable[[], Line]) -> Line:
    try:
        return check()
    except Exception as error:
        return failed(error)


def quiet() -> None:
    """Let nothing be printed beside the table but errors."""
    transformers.utils.logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, choices=list(ROWS), help="the numbers of the rows to run")
    parser.add_argument("--seconds", type=float, default=520, help="when to stop [s]")
    parser.add_argument("--sizes", choices=["full", "tiny"], default="full")
    options = parser.parse_args()
    setup = Setup(options.sizes == "tiny", time.monotonic() + options.seconds)
    quiet()
    print(f"{setup.describe()}\n\n| row | case | held | ms | MiB | tokens/s | note |\n|{'---|' * 7}", flush=True)
    wrong = 0
    for row, (seconds, function) in ROWS.items():
        if options.only and row not in options.only:
            continue
        if setup.left() < (0 if setup.tiny else seconds):
            show(row, function.__name__, Line("left out", note=f"{setup.left():.0f} s are left of {seconds} s"))
        else:
            wrong += not run(row, setup)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
