"""A file is compared with its checksums once, and again as soon as anything of it may have changed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, TuningError, save_delta
from lightning_peft.core import delta_file, verified
from lightning_peft.core.delta_file import read_delta


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what grows by one for each time that a file is compared with its checksums."""
    found: list[str] = []
    check = delta_file._check_seal

    def counted(checkpoint, meta, source: str) -> None:
        found.append(source)
        check(checkpoint, meta, source)

    monkeypatch.setattr(delta_file, "_check_seal", counted)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    LoRA(r=2, target_modules=["0"]).apply(model)
    return save_delta(model, tmp_path / "delta.safetensors")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_file_that_is_read_again_is_compared_once(
    file: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_SETTLED", -1)
    first, again = read_delta(file), read_delta(file)
    assert len(compared) == 1
    assert first[1] == again[1]
    assert all(torch.equal(tensor, again[0][name]) for name, tensor in first[0].items())


def test_a_file_of_the_same_place_and_times_that_was_written_to_is_compared_again(
    file: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_SETTLED", -1)
    read_delta(file)
    times = file.stat()
    flip(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(TuningError, match="does not fit its checksum: take another copy"):
            read_delta(file)
    assert len(compared) == 3
    shutil.copy2(file, file.with_suffix(".copy"))
    flip(file)
    read_delta(file)
    file.with_suffix(".copy").replace(file)
    with pytest.raises(TuningError, match="does not fit its checksum"):
        read_delta(file)


def test_a_file_that_was_just_written_is_compared_each_time(file: Path, compared: list[str]) -> None:
    for _ in range(3):
        read_delta(file)
    assert len(compared) == 3


def test_no_more_files_are_remembered_than_there_is_room_for(
    file: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_SETTLED", -1)
    monkeypatch.setattr(verified, "_MOST", 1)
    verified._WHOLE.clear()
    other = Path(shutil.copy(file, file.with_name("other.safetensors")))
    for each in (file, other, other, file):
        read_delta(each)
        assert len(verified._WHOLE) == 1
    assert len(compared) == 3
