"""The findings of a check: one line each, with the remedy where one fails."""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Column, Table

from lightning_peft.reports.memory import Memory
from lightning_peft.reports.parameters import size


class Finding(NamedTuple):
    """One line of the table: what was checked, whether it passes, what was found, and the remedy if it does not."""

    what: str
    passes: bool
    seen: str
    remedy: str = ""


def fits(rank: Memory, ranks: int) -> list[Finding]:
    """Return the memory of each process as a finding: whether it fits its GPU, where there is one."""
    what = f"memory of each of {ranks} processes" if ranks > 1 else "memory of the process"
    seen = f"{size(rank.total)}: {rank}"
    if not torch.cuda.is_available():
        return [Finding(what, True, seen)] if ranks > 1 else []
    there = torch.cuda.get_device_properties(0).total_memory
    remedy = "smaller batches, activation checkpointing, a sharded strategy or more processes"
    return [Finding(what, rank.total <= there, f"{seen}, of {size(there)}", remedy)]


def resumes(gpu: bool, deterministic: bool, ranks: int) -> Finding:
    """Return whether a run that is resumed ends bit for bit as an uninterrupted one, which fails nothing."""
    if not gpu:
        seen = "bit for bit, with as many threads"
    elif deterministic:
        seen = "bit for bit as far as torch knows of its kernels, on the same card"
    else:
        seen = "up to rounding: GPU kernels add in any order, unless --trainer.deterministic true"
    return Finding("resuming", True, f"{seen}, with {ranks} ranks" if ranks > 1 else seen)


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table, with a remedy where one fails."""
    shown = Table("", "check", Column("seen", overflow="fold"), title="Before training", title_justify="left")
    for finding in findings:
        mark = "[green]pass[/]" if finding.passes else "[bold red]FAIL[/]"
        seen = finding.seen if finding.passes else f"{finding.seen}: {finding.remedy}"
        shown.add_row(mark, finding.what, seen.replace("[", r"\["))
    return shown


def writable(folder: Path, needed: int) -> Finding:
    """Return whether a folder can be written to and has room for a file of this size [bytes], as a finding."""
    import os
    import shutil

    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    passes = os.access(there, os.W_OK) and free > 3 * needed
    return Finding("checkpoints can be written", passes, f"{folder}, {size(free)} free", "give another dirpath")
