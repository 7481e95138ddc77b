"""``combine``: one delta file of several."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_peft.core.errors import TuningError
from lightning_peft.deltas.combine import combine
from lightning_peft.deltas.merging_rules import How


def run_combine(arguments: Sequence[str]) -> None:
    """Run the command with the arguments that follow it."""
    parser = ArgumentParser(prog="lightning-peft combine", description="Make one delta of several.")
    parser.add_argument("files", nargs="+", help="deltas with their weights, FILE=WEIGHT ..., and the file to write")
    parser.add_argument("--how", choices=get_args(How), default="linear", help="the rule: see docs/deltas.md")
    parser.add_argument(
        "--backbone", type=str | None, default=None, help="folder or hub id of the backbone; what the first delta names"
    )
    parser.add_argument("--r", type=int | None, default=None, help="rank of what comes out; the greatest that goes in")
    parser.add_argument("--density", type=float, default=1.0, help="the share of entries that ties and dare keep")
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops")
    chosen = parser.parse_args(list(arguments)).as_dict()
    *inputs, out = chosen.pop("files")
    if Path(out).suffix != ".safetensors":
        raise TuningError(f"{out} is to be a delta, the last of the files: give it the suffix .safetensors.")
    files, weights = zip(*map(_weighted, inputs), strict=True) if inputs else ((), ())
    combine(files, weights, out, chosen.pop("how"), **chosen)
    Console(soft_wrap=True).print(f"{len(files)} deltas combined in {out}: lightning-peft info {out} shows it.")


def _weighted(entry: str) -> tuple[str, float]:
    file, _, weight = entry.rpartition("=")
    try:
        return file, float(weight)
    except ValueError:
        raise TuningError(f"{entry!r} has no weight: write FILE=WEIGHT, as in films.ckpt=0.7.") from None
