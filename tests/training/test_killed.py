"""What a killed run leaves behind, and what a file system refuses: a whole file at any moment, and one sentence."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft import LoRA, TuningError
from lightning_peft.core.storage import _HOST, atomic
from lightning_peft.training.checkpoint_io import AtomicCheckpointIO
from tests import killing
from tests.modules import Tuned, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:This process .* is multi-threaded",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What a run that nothing kills ends with."""
    return killing.fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", [3, 11, 30, 47])
def test_killed_at_a_call_of_a_save(number: int, whole: dict[str, torch.Tensor]) -> None:
    assert killing.attempt(whole, killing.at_call(number)) == "killed"


def test_killed_in_the_middle_of_a_file(whole: dict[str, torch.Tensor]) -> None:
    assert killing.attempt(whole, killing.at_bytes(20000)) == "killed"


@pytest.mark.slow
def test_killed_at_any_call_of_a_save(whole: dict[str, torch.Tensor]) -> None:
    outcomes = [killing.attempt(whole, killing.at_call(number)) for number in range(1, 100, 2)]
    assert set(outcomes) <= {"killed", "ended before"}


def left_over(folder: Path, name: str, pid: int) -> Path:
    """Return a temporary file as a process of this number leaves it."""
    file = folder / f".{name}.{_HOST}.{pid}.tmp"
    file.write_bytes(b"half")
    return file


def test_the_next_save_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, living = left_over(tmp_path, "a.ckpt", ended.pid), left_over(tmp_path, "a.ckpt", os.getppid())
    another = left_over(tmp_path, "b.ckpt", ended.pid)
    with atomic(tmp_path / "a.ckpt") as temporary:
        temporary.write_bytes(b"whole")
    assert (dead.exists(), living.exists(), another.exists()) == (False, True, True)


def test_the_next_run_removes_all_that_is_left_in_its_folder(tmp_path: Path) -> None:
    mine = left_over(tmp_path, "step=9.ckpt", 1)
    other = tmp_path / ".notes.tmp"
    other.touch()
    trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path)).fit(Tuned(), loader("bert"))
    assert (mine.exists(), other.exists()) == (False, True)


def test_the_lock_of_a_folder_ends_with_an_exception(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert (tmp_path / ".in-use").is_file()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, LoRA(r=2), ModelCheckpoint(tmp_path), Fails()).fit(Tuned(), loader("bert"))
    assert not (tmp_path / ".in-use").exists()


def test_too_many_open_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    io = AtomicCheckpointIO()
    io.save_checkpoint({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(TuningError, match=r"a.ckpt could not be written .*what was there before is whole"):
            io.save_checkpoint({"a": torch.zeros(2)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["a"].tolist() == [1, 1]


def test_a_folder_that_vanishes_is_made_again_unless_a_file_stands_there(tmp_path: Path) -> None:
    io, folder = AtomicCheckpointIO(), tmp_path / "runs"
    io.save_checkpoint({"a": 1}, folder / "a.ckpt")
    shutil.rmtree(folder)
    io.save_checkpoint({"a": 2}, folder / "a.ckpt")
    assert torch.load(folder / "a.ckpt", weights_only=True) == {"a": 2}
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(TuningError, match=r"a.ckpt could not be written \(E.*give another folder"):
        io.save_checkpoint({"a": 3}, folder / "a.ckpt")
