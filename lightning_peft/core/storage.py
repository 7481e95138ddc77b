"""Writes files whole or not at all, and reads them without running anything that is in them."""

import errno
import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_peft.core.errors import TuningError

_HOST = socket.gethostname().replace(".", "-")
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.tmp")


class DiskError(TuningError):
    """A file could not be written; what was there before is whole."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it replaces ``path`` when the block ends well.

    A kill at any moment leaves the old file or the new one. Beside it, since a move between file systems is a copy.

    Raises:
        DiskError: the disk is full, too many files are open, or another error of the file system.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if not _is_of_the_disk(error):
            raise
        raise DiskError(_sentence(error, path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine have left of `atomic`.

    Args:
        folder: where they wrote.
        name: of the file that they wrote; None: any, and of any machine, for a folder that this process has for itself.
    """
    for file in folder.glob(".*.tmp"):
        parts = _TEMPORARY.fullmatch(file.name)
        if parts is None or (name is not None and not _is_of_the_dead(parts, name)):
            continue
        with suppress(OSError):  # another process was faster
            file.unlink()


def _is_of_the_dead(parts: re.Match[str], name: str) -> bool:
    if parts["name"] != name or parts["host"] != _HOST or int(parts["pid"]) == os.getpid():
        return False
    try:
        os.kill(int(parts["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def _is_of_the_disk(error: Exception) -> bool:
    texts = ("PytorchStreamWriter", "unexpected pos", "cannot be opened", "open file failed", "I/O error")
    return isinstance(error, OSError) or any(text in str(error) for text in texts)


def _sentence(error: Exception, path: Path) -> str:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
    reason = "no space left on the device, or too many open files"
    if isinstance(error, OSError) and error.errno is not None:
        reason = errno.errorcode.get(error.errno, "") + " " + (error.strerror or "")
    return (
        f"{path} could not be written ({reason}; {free / 2**20:.0f} MiB are free there), and what was there "
        "before is whole: make room, or give another folder."
    )


def read_torch(
    path: str | Path, weights_only: bool = True, map_location: Any = "cpu", of_others: bool = False
) -> dict[str, Any]:
    """Return what ``torch.save`` wrote.

    Args:
        path: the file.
        weights_only: refuse what holds more than tensors and plain values.
        map_location: as of ``torch.load``.
        of_others: it was not written by this package, so that no other checksums than those of zip are in it.

    Raises:
        TuningError: there is no such file, it is none of torch's, it is truncated or damaged, or it holds objects that
            loading would execute.
    """
    path = Path(path)
    if not path.is_file():
        raise TuningError(f"{path} is no file: give the path of a checkpoint or a delta.")
    _check_kind(path)
    if of_others:
        _check_zip(path)
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        found = re.search(r"Unsupported [^\n]*?(?= was not an allowed)", str(error))
        raise TuningError(
            f"{path} holds more than tensors and plain values, or is damaged "
            f"({found[0] if found else first_line(error)}): "
            "load it with weights_only=False only if you trust whoever wrote it."
        ) from None
    except Exception as error:  # whatever a damaged pickle makes the reader do
        raise TuningError(f"{path} is truncated or damaged ({first_line(error)}): take another copy.") from None
    if not isinstance(loaded, dict):
        raise TuningError(f"{path} holds a {type(loaded).__name__}, not a checkpoint: give the path of a checkpoint.")
    return loaded


def is_safetensors(path: Path) -> bool:
    """Tell whether a file is named as one of safetensors, or begins as one: with a length and a brace."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _check_kind(path: Path) -> None:
    """Check that a file begins as those of ``torch.save`` do, as a zip file or, in old ones, as a pickle.

    Raises:
        TuningError: it begins otherwise.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"\x80") or zipfile.is_zipfile(path):
        return
    if start[8:9] == b"{":
        raise TuningError(
            f"{path} begins as a safetensors file, which holds weights alone: load_delta reads it, and a Trainer "
            "wants the .ckpt file."
        )
    if not start or start.startswith(b"PK"):
        lacks = "its end is missing" if start else "it is empty"
        raise TuningError(f"{path} is truncated or damaged ({lacks}): take another copy.")
    raise TuningError(
        f"{path} is no checkpoint, or is damaged: it begins with {start!r} and not as what torch.save writes: give the "
        "path of a checkpoint."
    )


def _check_zip(path: Path) -> None:
    """Check the checksums of a zip file, which torch does not look at.

    Raises:
        TuningError: one is wrong.
    """
    if not zipfile.is_zipfile(path):
        return  # it is a pickle
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except Exception as error:  # whatever a damaged header makes the reader do
        raise TuningError(f"{path} is truncated or damaged ({first_line(error)}): take another copy.") from None
    if wrong is not None:
        raise TuningError(
            f"{path} is damaged: {wrong} in it does not fit its checksum: take another copy, or save it anew if it was "
            "written without checksums (torch.serialization.set_crc32_options(False))."
        )


def check_tensors(tensors: Any, source: str | Path) -> None:
    """Check that what a file holds is a dictionary of plain tensors by name.

    Raises:
        TuningError: it is not.
    """
    odd = [tensors] if not isinstance(tensors, dict) else [k for k in tensors if not isinstance(k, str)]
    if not odd:
        odd = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise TuningError(
            f"{source} is damaged: {str(odd[0])[:60]!r} stands where a plain tensor with a name should: take another "
            "copy."
        )


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_quantized


def write_safetensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes are a function of its content; the library shuffles the metadata."""
    save_file(tensors, path, metadata=metadata)
    with Path(path).open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the header must keep its place"
        file.seek(8)
        file.write(text.ljust(size))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, to be put into a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:240]
