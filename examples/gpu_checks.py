"""Check and measure this package on a GPU in one call of at most nine minutes; no installed package is needed.

    python examples/gpu_checks.py [--only 7 8] [--seconds 500] [--sizes tiny] > table.md

The rows run in their order, what may be wrong before what is measured. Each line of the Markdown table is printed when
it is known, and `docs/gpu.md` takes it as it is. A row that does not fit into the time that is left is named and left
out. Weights are random. The exit code is the number of rows that failed. ``--sizes tiny`` runs all of it on a CPU, in
less than a minute of its time.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu import checks, figures
from gpu.models import Line, Setup

ROWS = {
    1: (30, checks.one_step),
    2: (60, checks.every_method_in_every_precision),
    3: (20, checks.start_remove_merge),
    4: (40, checks.resume),
    5: (25, checks.prefixes),
    6: (20, checks.synchronizes_nothing),
    7: (60, figures.short_texts),
    8: (60, figures.long_texts),
    9: (70, figures.large_model),
    10: (90, figures.compiled),
    11: (25, figures.strategies),
    12: (15, figures.experts),
    13: (20, figures.images),
}
"""The number of a row -> how long it takes on an H100-class card [s], and the function that yields its lines."""


def show(row: int, line: Line) -> None:
    """Print one line of the table."""
    figures = [line.milliseconds, line.peak, line.tokens]
    cells = [row, line.case, line.verdict, *("" if f is None else f"{f:,.4g}" for f in figures), line.note]
    print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |", flush=True)


def run(row: int, setup: Setup) -> bool:
    """Run a row, print its lines as they come, and tell whether all went well; an error is a line, too."""
    went = True
    try:
        lines: Iterator[Line] = ROWS[row][1](setup)
        for line in lines:
            show(row, line)
            went &= line.verdict != "FAILED"
            if setup.over():
                show(row, Line("the rest", "left out", note="the time is over"))
                break
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        show(row, Line(ROWS[row][1].__name__, "FAILED", note=f"{type(error).__name__} at {where}: {error}"[:300]))
        went = False
    gc.collect()
    if setup.gpu:
        torch.cuda.empty_cache()
    return went


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, choices=list(ROWS), help="the numbers of the rows to run")
    parser.add_argument("--seconds", type=float, default=520, help="when to stop [s]")
    parser.add_argument("--sizes", choices=["full", "tiny"], default="full")
    options = parser.parse_args()
    setup = Setup(options.sizes == "tiny", time.monotonic() + options.seconds)
    print(f"{setup.describe()}\n\n| row | case | held | ms | MiB | tokens/s | note |\n|{'---|' * 7}", flush=True)
    failed = 0
    for row, (seconds, function) in ROWS.items():
        if options.only and row not in options.only:
            continue
        if setup.left() < (0 if setup.tiny else seconds):
            show(row, Line(function.__name__, "left out", note=f"{setup.left():.0f} s are left of {seconds} s"))
        else:
            failed += not run(row, setup)
    sys.exit(failed)


if __name__ == "__main__":
    main()
