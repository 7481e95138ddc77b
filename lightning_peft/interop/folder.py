"""Reads and writes adapter folders in the format of PEFT: configuration and tensors."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lightning_peft import __version__
from lightning_peft.core.checksums import checksum
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import atomic, check_tensors, first_line, read_torch, write_safetensors
from lightning_peft.interop import adapter_config
from lightning_peft.interop.adapter import PeftAdapter

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CARD = "README.md"
HEADER = "lightning_peft"
SEALED = "checksums"
_FREE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "auto_mapping"}
"""Keys of the configuration that may be changed afterwards: they say where the base is, and not what is computed."""


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
    sealed = {SEALED: _sealed(replace(adapter, tensors=tensors))}
    header = {"format": "pt", HEADER: json.dumps(adapter.header | sealed, sort_keys=True)}
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
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            raise TuningError(
                f"{weights} is truncated or no safetensors file ({first_line(error)}): take another copy."
            ) from None
        adapter = PeftAdapter(config, tensors, header, str(folder))
        _check_header(adapter)
    elif (folder / PICKLED).is_file():
        adapter = PeftAdapter(config, read_torch(folder / PICKLED, of_others=True), {}, str(folder))
    else:
        raise TuningError(f"{folder} has neither {WEIGHTS} nor {PICKLED}: take another copy of the adapter.")
    check_adapter_tensors(adapter)
    return adapter


def check_adapter_tensors(adapter: PeftAdapter) -> None:
    """Check that an adapter holds plain, finite tensors of real numbers.

    Raises:
        TuningError: one is not.
    """
    check_tensors(adapter.tensors, adapter.source)
    for name, tensor in adapter.tensors.items():
        if tensor.is_complex():
            raise TuningError(f"{adapter.source} has {name} in {tensor.dtype}, which PEFT never writes.")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise TuningError(
                f"{adapter.source} has NaN or infinity in {name}: its run diverged, or it is damaged, so take another."
            )


def check_config(adapter: PeftAdapter) -> None:
    """Check that the configuration of an adapter of this package is the one that was written.

    Raises:
        TuningError: a key that changes what is computed was changed.
    """
    known = adapter.header.get(SEALED)
    if known is not None and known[""] != _sealed(adapter)[""]:
        raise TuningError(
            f"{adapter.source} was changed after it was exported: {adapter_config.FILE} does not fit its checksum: "
            "take another copy, or export the delta again."
        )


def _sealed(adapter: PeftAdapter) -> dict[str, str]:
    """Return checksums of the tensors, and as '' one of what of the configuration is not as by default."""
    usual = adapter_config.DEFAULTS[adapter.config["peft_type"]]  # a later version may have more keys
    used = {k: v for k, v in adapter.config.items() if k not in _FREE and (k not in usual or v != usual[k])}
    return {"": checksum(used)} | {name: checksum(tensor) for name, tensor in adapter.tensors.items()}


def _check_header(adapter: PeftAdapter) -> None:
    """Check an adapter that this package has written against its checksums; one of PEFT has none.

    Raises:
        TuningError: a tensor was changed, or its header is no header of ours.
    """
    header: Any = adapter.header
    known = header.get(SEALED, {}) if isinstance(header, dict) else None
    wrong = "" if isinstance(known, dict) else "header"
    if not wrong and not isinstance(header.get("fingerprint", ""), str):
        wrong = "fingerprint"
    if not wrong and known:
        now = _sealed(adapter)
        odd = (known.keys() ^ now.keys()) | {name for name in now if name and known.get(name) != now[name]}
        wrong = min(odd, default="") or ("header" if "" in odd else "")
    if wrong:
        raise TuningError(
            f"{adapter.source} is damaged or was changed after it was exported: its {wrong} does not fit its checksum: "
            "take another copy, or export the delta again."
        )


def writer_versions() -> dict[str, str]:
    """Return the versions of the packages that decide names and formats."""
    return {"lightning-peft": __version__, **{package: version(package) for package in ("torch", "transformers")}}
