"""Runs a module of the tests in an interpreter of its own, whose ranks Lightning or torchrun starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L

from tests.fresh import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_module(module: str, *arguments: str | Path, folder: Path, before: tuple[str, ...] = ()) -> None:
    """Run ``python BEFORE -m MODULE ARGUMENTS`` in ``folder``; a failure shows what the ranks have printed."""
    own = {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *before, "-m", module, *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def quiet_trainer(folder: Path, devices: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a Trainer of one process or several, which writes nothing of its own."""
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def leave(scores: dict[str, Any] | None, folder: str) -> None:
    """Write what the first rank has found; the others have None."""
    if scores is not None:
        Path(folder, "two.json").write_text(json.dumps(scores))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
