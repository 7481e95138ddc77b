"""Checksums of the files of a checkpoint that is a folder, so that none is read that has changed.

A folder of ``torch.distributed.checkpoint`` or of DeepSpeed holds pickles, which their readers would execute.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic

FILE = "checksums.json"


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


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return sorted(path.relative_to(folder).as_posix() for path in files)
