"""The file that a requeued job goes on from is refused when it is damaged, and is left as it is for who looks at it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import TuningError
from lightning_peft.training import requeue, signals, slurm
from lightning_peft.training.checkpoint_io import AtomicCheckpointIO
from tests.damage import CHANGES, cuts, edited, flips
from tests.training.test_requeue import JOB, SignalAt, run

pytestmark = pytest.mark.filterwarnings("ignore")
OWN = "requeue-7.0-1.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a job that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("requeue")
    with pytest.MonkeyPatch.context() as patch:
        in_job(patch)
        run(folder, SignalAt("train", 4))
        signals.uninstall()
        signals._state["pid"] = 0
    assert (folder / OWN).is_file()
    return folder / OWN


def in_job(patch: pytest.MonkeyPatch, restarts: int = 0) -> None:
    for name, value in JOB.items():
        patch.setenv(name, value)
    if restarts:
        patch.setenv("SLURM_RESTART_COUNT", str(restarts))
    patch.setattr(slurm, "requeue", lambda: "")
    patch.setitem(requeue._fits, "begun", 0)


def refused(folder: Path, says: str) -> None:
    """Start the job again in a folder with a damaged file."""
    held = (folder / OWN).read_bytes()
    try:
        with pytest.MonkeyPatch.context() as patch:
            in_job(patch, restarts=1)
            with pytest.raises(TuningError, match=says):
                run(folder)
    finally:
        signals.uninstall()
        signals._state["pid"] = 0
    assert (folder / OWN).read_bytes() == held


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_changed_file_is_gone_on_from(
    whole: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edited(whole, tmp_path, change)
    refused(tmp_path, f"{OWN} is damaged")


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "lr_schedulers", "global_step", "callbacks"])
def test_what_the_run_goes_on_from_is_checked(whole: Path, tmp_path: Path, part: str) -> None:
    edited(whole, tmp_path, lambda c: c.update({part: type(c[part])()}))
    refused(tmp_path, f"{part} does not fit its checksum")


def test_no_cut_file_is_gone_on_from(whole: Path, tmp_path: Path) -> None:
    for data in cuts(whole.read_bytes()):
        (tmp_path / OWN).write_bytes(data)
        with pytest.raises(TuningError, match=rf"{OWN} is truncated or damaged .*take another copy"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / OWN, weights_only=True)
    refused(tmp_path, "is truncated or damaged")


def test_no_flipped_bit_is_gone_on_from(whole: Path, tmp_path: Path) -> None:
    known = AtomicCheckpointIO().load_checkpoint(whole, weights_only=True)
    for data in flips(whole.read_bytes(), 400):
        (tmp_path / OWN).write_bytes(data)
        try:
            held = AtomicCheckpointIO().load_checkpoint(tmp_path / OWN, weights_only=True)
        except TuningError:
            continue
        assert same(held, known)  # a bit that no reader looks at


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
