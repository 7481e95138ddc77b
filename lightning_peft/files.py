"""Files: written whole or not at all, read without running anything that is in them, found in installed packages."""

import importlib.util
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_peft.errors import TuningError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it replaces ``path`` when the block ends well.

    A kill at any moment leaves the old file or the new one. Beside it, since a move between file systems is a copy.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_torch(path: str | Path, weights_only: bool = True, map_location: Any = "cpu") -> dict[str, Any]:
    """Return what ``torch.save`` wrote.

    Raises:
        TuningError: there is no such file, it is truncated or damaged, or it holds objects that loading would execute.
    """
    path = Path(path)
    if not path.is_file():
        raise TuningError(f"{path} is no file: give the path of a checkpoint or a delta.")
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise TuningError(
            f"{path} holds more than tensors and plain values, or is damaged ({_first(error)}): "
            "load it with weights_only=False only if you trust whoever wrote it."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise TuningError(f"{path} is truncated or damaged ({_first(error)}): take another copy.") from None
    if not isinstance(loaded, dict):
        raise TuningError(f"{path} holds a {type(loaded).__name__}, not a checkpoint: give the path of a checkpoint.")
    return loaded


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


def load_tokenizer(backbone: nn.Module, name: str | None, reason: str) -> Any:
    """Return the tokenizer of a folder or hub id, or else the one that lies beside the backbone's weights.

    Raises:
        TuningError: none is found; ``reason`` says what it was wanted for.
    """
    from transformers import AutoTokenizer

    place = name or getattr(getattr(backbone, "config", None), "_name_or_path", "")
    if not place:
        raise TuningError(f"{reason} needs the words of the model: give tokenizer= (a folder or hub id).")
    try:
        return AutoTokenizer.from_pretrained(resolve(place))
    except (OSError, ValueError) as error:
        raise TuningError(f"no tokenizer at {place!r} ({_first(error)}): give tokenizer=.") from None


def resolve(name: str) -> str:
    """Return a folder or hub id as it is, and for ``package://NAME/FOLDER`` the folder in that installed package.

    Raises:
        TuningError: there is no such package or folder.
    """
    if not name.startswith("package://"):
        return name
    package, _, folder = name.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package)
    places = [Path(place) / folder for place in (spec.submodule_search_locations or ())] if spec is not None else []
    for place in places:
        if place.is_dir():
            return str(place)
    raise TuningError(f"{name} names no folder of an installed package: pip install {package.replace('_', '-')}.")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from telling, while it loads a model, that the head is new."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:120]
