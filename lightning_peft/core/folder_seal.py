"""Checksums of the files of a checkpoint that is a folder, so that none is read that has changed.

A folder of ``torch.distributed.checkpoint`` holds pickles, which its reader would execute; see `plain_values`.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic

FILE = "checksums.json"
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_CLASSES = {
    "torch.distributed.checkpoint.metadata",  # has nothing but dataclasses and enumerations
    *("torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "collections.OrderedDict"),
}
"""What the metadata of a folder are made of:
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/metadata.py,
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/filesystem.py,
https://github.com/pytorch/pytorch/blob/v2.13.0/torch/serialization.py
"""


def digests(folder: Path, share: int = 0, of: int = 1) -> dict[str, str]:
    """Return name -> SHA-256 of the files of a folder, of those that fall to one of several processes."""
    found = {}
    for name in _names(folder)[share::of]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def seal_folder(folder: Path, parts: Sequence[Mapping[str, str]]) -> None:
    """Write the checksums of all files, those that each process has computed."""
    every = {name: digest for part in parts for name, digest in part.items()}
    with atomic(folder / FILE) as temporary:
        temporary.write_text(json.dumps(every, indent=0, sort_keys=True))


def check_folder(folder: Path) -> None:
    """Check the files of a folder against the checksums in it, if it has some.

    Raises:
        TuningError: a file has changed, is gone, or has been added.
    """
    if not (folder / FILE).is_file():
        return
    try:
        known = json.loads((folder / FILE).read_text())
    except (ValueError, RecursionError, OSError):
        known = None
    now = digests(folder)
    odd = [FILE] if not isinstance(known, dict) else [name for name in now if known.get(name) != now[name]]
    odd += sorted(known.keys() - now.keys()) if isinstance(known, dict) else []
    if odd:
        raise TuningError(
            f"{folder} lacks a part or is damaged ({odd[0]} does not fit its checksum): take another copy."
        )


class _Plain(pickle.Unpickler):
    """Knows the classes of metadata, and no function."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that metadata are made of."""
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        own = module in _CLASSES and (name[:1].isupper() or name == "_MEM_FORMAT_ENCODING")
        if is_dtype or (own and "." not in name) or f"{module}.{name}" in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@contextmanager
def plain_values(folder: Path) -> Iterator[None]:
    """Let no reader of a folder of ``torch.distributed.checkpoint`` execute what is in it.

    Its metadata are looked through first; of the values beside the tensors, which its planner loads as pickles, torch
    then takes plain ones alone:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/default_planner.py

    Raises:
        pickle.UnpicklingError: the metadata name something else than metadata do.
    """
    with (folder / ".metadata").open("rb") as file:
        _Plain(file).load()
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return sorted(path.relative_to(folder).as_posix() for path in files)
