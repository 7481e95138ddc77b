"""A node that lacks the model ends the job on all nodes, and says what it lacks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import ROOT
from tests.models import tiny
from tests.processes import free_port

pytestmark = pytest.mark.slow
TRAINER = {"accelerator": "cpu", "num_nodes": 2, "devices": 1, "strategy": "ddp", "max_steps": 2, "logger": "false"}


def start(rank: int, port: str, cache: Path, folder: Path) -> "subprocess.Popen[str]":
    """Start one of two processes that no agent watches, with a hub cache of its own."""
    world = {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": 1}
    own = {name: str(value) for name, value in (world | meet | {"HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": 1}).items()}
    words = ["--model", "TextClassification", "--model.model", "made/bert", "--data", "tests.slurm.job.Rows"]
    words += ["--method", "LoRA", "--trainer.enable_checkpointing", "false", "--trainer.default_root_dir", str(folder)]
    words += [word for name, value in TRAINER.items() for word in (f"--trainer.{name}", str(value))]
    command = [Path(sys.executable).parent / "lightning-peft", "fit", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("lacking", [0, 1])
def test_all_ranks_end_and_name_the_one_that_lacks_the_model(lacking: int, tmp_path: Path) -> None:
    snapshot = tmp_path / "full/models--made--bert/snapshots/abc"
    tiny("bert").save_pretrained(snapshot)
    (tmp_path / "full/models--made--bert/refs").mkdir()
    (tmp_path / "full/models--made--bert/refs/main").write_text("abc")
    (tmp_path / "empty").mkdir()
    caches = [tmp_path / ("empty" if rank == lacking else "full") for rank in range(2)]
    port = free_port()
    ranks = [start(rank, port, caches[rank], tmp_path) for rank in range(2)]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=200)  # DDP would wait for half an hour
            assert rank.returncode == 2
            last = said.strip().splitlines()[-1]
            assert last.startswith(f"rank {lacking} on ")
            assert "no text classifier can be made of 'made/bert'" in last
            assert last.endswith("what a login node downloads into an HF_HOME on the shared disk, all nodes have.")
            assert "Traceback" not in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


_WAITING = """
import datetime, os, sys, time
import torch
from lightning_peft.commands import sentence
from lightning_peft.training import slurm
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
if os.environ["RANK"] == "1":
    time.sleep(float(sys.argv[1]))
    os._exit(0)
try:
    torch.distributed.all_reduce(torch.ones(1))
except Exception as error:
    print(f"{slurm.rank_and_node()}: {sentence(error)}")
"""


@pytest.mark.parametrize("seconds", [0, 5], ids=["died", "stands still"])
def test_a_rank_that_is_left_alone_says_who_it_is(seconds: int) -> None:
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _WAITING, str(seconds)],
            cwd=ROOT,
            env=common | {"RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [rank.communicate(timeout=100) for rank in ranks]
    said = (
        f"rank 0 on {socket.gethostname()}: waits for a rank that has died or stands still, the one that does not say"
    )
    assert printed[0][0].startswith(said), printed
