"""Reads and writes adapter folders in the format of PEFT: configuration and tensors."""

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_peft import __version__
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic, read_torch, write_safetensors
from lightning_peft.interop import adapter_config

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CARD = "README.md"
HEADER = "lightning_peft"


@dataclass
class PeftAdapter:
    """The contents of an adapter folder.

    Attributes:
        config: ``adapter_config.json``.
        tensors: its tensors, by the names of PEFT.
        header: what this package says of the adapter in the header of the file, which PEFT does not read.
        source: what it is called in errors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    header: dict[str, Any] = field(default_factory=dict)
    source: str = "the adapter"


def write(folder: Path, adapter: PeftAdapter, card: str) -> None:
    """Write an adapter; its configuration, which makes the folder an adapter, comes last.

    Raises:
        TuningError: the folder holds something else.
    """
    check_free(folder)
    tensors = {name: adapter.tensors[name].detach().cpu().contiguous() for name in sorted(adapter.tensors)}
    # One tensor under two names would be an alias, which safetensors refuses.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    header = {"format": "pt", HEADER: json.dumps(adapter.header, sort_keys=True)}
    with atomic(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, tensors, header)
    for name, text in ((CARD, card), (adapter_config.FILE, adapter_config.dumps(adapter.config))):
        with atomic(folder / name) as temporary:
            temporary.write_text(text)


def check_free(folder: Path) -> None:
    """Check that nothing but an older adapter would be overwritten.

    Raises:
        TuningError: the folder is a file, or holds something else.
    """
    if folder.is_file():
        raise TuningError(f"{folder} is a file: give a new folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / adapter_config.FILE).is_file():
        raise TuningError(f"{folder} is not empty and no adapter: give a new folder.")


def read_adapter(folder: Path) -> PeftAdapter:
    """Read an adapter. Nothing in it is executed.

    Raises:
        TuningError: it is not whole, or of a type that is unknown here.
    """
    config = adapter_config.read_config(folder / adapter_config.FILE)
    weights = folder / WEIGHTS
    if weights.is_file():
        try:
            with safe_open(weights, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise TuningError(f"{weights} is truncated or no safetensors file ({error}): take another copy.") from None
        return PeftAdapter(config, tensors, header, str(folder))
    if (folder / PICKLED).is_file():
        return PeftAdapter(config, read_torch(folder / PICKLED), {}, str(folder))
    raise TuningError(f"{folder} has neither {WEIGHTS} nor {PICKLED}: take another copy of the adapter.")


def writer_versions() -> dict[str, str]:
    """Return the versions of the packages that decide names and formats."""
    return {"lightning-peft": __version__, **{package: version(package) for package in ("torch", "transformers")}}
