"""What all tests share: as many threads as OMP_NUM_THREADS says, or one; no network, no chatter."""

import gc
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there, and for the processes that tests start

import logging
from collections.abc import Iterator
from pathlib import Path

import lightning  # noqa: F401 (sets the levels that are changed below)
import pytest
import torch

from tests import models
from tests.peft_cache import INSPECT

pytest.register_assert_rewrite("tests.contract")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    # Data loaders of sixteen rows need no worker processes.
    config.addinivalue_line("filterwarnings", r"ignore:The '\w+_dataloader' does not have many workers")
    # Where SLURM is installed, Lightning says so in every run outside of it.
    config.addinivalue_line("filterwarnings", "ignore:The `srun` command is available on your system")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Leave to the next test, and to what it starts, no seed, no rank, no master's port and no process group."""
    found = os.environ.copy()
    torch.manual_seed(0)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # what still holds the group is not left to the worker of a data loader, which would hang
    for name in os.environ.keys() - found.keys():
        del os.environ[name]
    os.environ.update(found)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small tokenizer."""
    return models.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def peft_finds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the prefix of a classifier in PEFT 0.21 see `past_key_values` where transformers 5.24 has `cache`."""
    import peft.peft_model

    monkeypatch.setattr(peft.peft_model, "inspect", INSPECT)
