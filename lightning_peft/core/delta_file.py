"""Writes and reads delta files and their metadata, checked against checksums and without running code in them.

The metadata names the methods with their arguments, the backbones with their fingerprints, the versions, and a checksum
of each tensor, of all else that the file holds, and of the metadata itself.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft import __version__
from lightning_peft.core import verified
from lightning_peft.core.checksums import checksum, has_parts
from lightning_peft.core.errors import TuningError
from lightning_peft.core.name_lists import is_packed
from lightning_peft.core.sharded import is_folder, read_folder
from lightning_peft.core.storage import atomic, check_tensors, is_safetensors, read_torch

META = "lightning_peft"
FORMAT = 2
IN_FOLDER = "delta.safetensors"
"""The delta among the files of a checkpoint that DeepSpeed has written."""
CLASS_PATH = "_class_path"
"""The hyper-parameter by which Lightning's command line keeps the class of a module, or of its data.

https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/saving.py
"""
MATCHED = "matched"
"""The entry of a method with the names that its patterns have matched, so that a pattern of a file need not be run."""
_SEALED, _CHECKED = "checksums", "checked"
_SCHEMA: dict[str, type] = {
    "format": int,
    "versions": dict,
    "methods": list,
    "backbones": dict,
    "left_out": list,
    _SEALED: dict,
}
_METHOD: dict[str, type] = {"class_path": str, "init_args": dict, "backbone": str}
_BACKBONE: dict[str, type] = {"class": str, "name_or_path": str, "parameters": int, "config": dict, "fingerprint": str}
_CHECKSUMS: dict[str, type] = {"tensors": dict, "rest": dict}
_RESUME: dict[str, type] = {"mid_epoch": bool, "random": list}
_RANDOM: dict[str, type] = {"torch": Tensor, "numpy": list, "python": list}
_LIGHTNING: dict[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "hyper_parameters": Mapping,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""What a Trainer's checkpoint may hold beside the metadata."""


def seal(meta: dict[str, Any], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with the checksums of what a file is about to hold; every rank must call it.

    Args:
        meta: of the delta.
        checkpoint: ``state_dict`` with the tensors of the delta, and what else the file holds, by key.
    """
    tensors = {name: checksum(tensor) for name, tensor in checkpoint["state_dict"].items()}
    rest = {k: checksum(v) for k, v in checkpoint.items() if k not in ("state_dict", META) and not has_parts(v)}
    sealed = meta | {_SEALED: {"tensors": tensors, "rest": rest}}
    return sealed | {"seal": checksum(sealed)}


def write_delta(path: str | Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write tensors as safetensors, with the metadata in the header; the file appears whole or not at all."""
    header = {"format": "pt", META: json.dumps(seal(plain(meta), {"state_dict": tensors}))}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=header)
    return Path(path)


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a delta file. Nothing in it is executed.

    Raises:
        TuningError: there is no such file, it is damaged, or it is no delta.
    """
    _check_no_adapter(Path(path))
    inside = Path(path) / IN_FOLDER
    path = inside if inside.is_file() else path
    checkpoint = _read_safetensors(Path(path)) if is_safetensors(Path(path)) else read_checkpoint(path)
    return checkpoint["state_dict"], meta_of(checkpoint, str(path))


def read_checkpoint(path: str | Path, weights_only: bool = True, map_location: Any = "cpu") -> dict[str, Any]:
    """Return a checkpoint, a file or a folder of parts; one that holds a delta is checked against its checksums.

    Raises:
        TuningError: there is no such file, it is damaged, or loading would execute something.
    """
    checkpoint = read_folder(path) if is_folder(path) else read_torch(path, weights_only, map_location)
    return _checked(checkpoint, path) if META in checkpoint else checkpoint


def meta_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the metadata of a loaded checkpoint, after checking that nothing has changed since it was written.

    Raises:
        TuningError: it is a full checkpoint, damaged, or of a format that this version does not know.
    """
    meta = checkpoint.get(META)
    if meta is None:
        count = len(checkpoint.get("state_dict", checkpoint))
        raise TuningError(
            f"{source} holds no delta but a full checkpoint ({count} tensors): "
            "turn it into one with lightning_peft.convert(module, full, delta)."
        )
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        known = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise TuningError(
            f"{source} has delta format {known!r}, this version reads {FORMAT}: take the version that wrote it."
        )
    if not meta.get(_CHECKED):
        try:
            _check_schema(checkpoint, meta, source)
            _check_seal(checkpoint, meta, source)
            held = {key: kind for key, kind in _LIGHTNING.items() if key in checkpoint}
            _check_types("the file", checkpoint, held, source)
        except RecursionError:
            raise TuningError(f"{source} is damaged: it nests deeper than any delta: take another copy.") from None
    return {key: value for key, value in meta.items() if key != _CHECKED}


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """Return the versions of the packages that a delta depends on."""
    return (*((p, version(p)) for p in ("torch", "lightning", "transformers")), ("lightning-peft", __version__))


def _checked(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what was read of a file with a note that it has been checked, which a file cannot say of itself."""
    if isinstance(checkpoint[META], dict):
        checkpoint[META].pop(_CHECKED, None)
    return checkpoint | {META: meta_of(checkpoint, str(path)) | {_CHECKED: True}}


def _check_schema(checkpoint: Mapping[str, Any], meta: Mapping[str, Any], source: str) -> None:
    """Check that the metadata are of the types that they have when they are written, and all weights plain tensors.

    Raises:
        TuningError: one is of another type.
    """
    _check_types("the metadata", meta, _SCHEMA, source)
    rows: list[tuple[str, Any, dict[str, type]]] = [("a method", entry, _METHOD) for entry in meta["methods"]]
    rows += [("a backbone", entry, _BACKBONE) for entry in meta["backbones"].values()]
    rows += [("the checksums", meta[_SEALED], _CHECKSUMS)]
    if "resume" in meta:
        rows.append(("what it resumes from", meta["resume"], _RESUME))
    for what, entry, schema in rows:
        _check_types(what, entry, schema, source)
    for entry in meta["methods"]:
        _check_matched(entry, source)
    for entry in meta.get("resume", {}).get("random", []):
        _check_types("a random state", entry, _RANDOM, source)
    check_tensors(checkpoint.get("state_dict", {}), source)


def _check_matched(entry: Mapping[str, Any], source: str) -> None:
    matched = entry.get(MATCHED, {})
    if not isinstance(matched, dict) or not all(
        isinstance(entry["init_args"].get(name), str) and is_packed(names) for name, names in matched.items()
    ):
        raise TuningError(
            f"{source} is damaged: {str(matched)[:60]!r} is not the names that patterns of {entry['class_path']} have "
            "matched: take another copy."
        )


def _check_types(what: str, entry: Any, schema: Mapping[str, type], source: str) -> None:
    for key, kind in schema.items():
        value = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TuningError(
                f"{source} is damaged: {key!r} of {what} is {str(value)[:60]!r}, not of type {kind.__name__}: take "
                "another copy."
            )


def _check_seal(checkpoint: Mapping[str, Any], meta: Mapping[str, Any], source: str) -> None:
    given = {key: value for key, value in meta.items() if key not in ("seal", _CHECKED)}
    sealed, tensors = meta[_SEALED], checkpoint.get("state_dict", {})
    changed = [] if meta.get("seal") == checksum(given) else ["the metadata"]
    if not changed:
        changed = sorted(tensors.keys() ^ sealed["tensors"].keys())
        changed += [name for name, tensor in tensors.items() if checksum(tensor) != sealed["tensors"].get(name)]
        changed += [k for k, known in sealed["rest"].items() if k in checkpoint and checksum(checkpoint[k]) != known]
    if changed:
        raise TuningError(
            f"{source} is damaged or was changed after it was written: {changed[0]} does not fit its checksum: take "
            "another copy."
        )


def _check_no_adapter(path: Path) -> None:
    """See that a path is not what PEFT loads, which `export` writes too.

    Raises:
        TuningError: it is the folder of an adapter, or the file of its tensors.
    """
    folder = path if path.is_dir() else path.parent
    is_it = path.is_dir() or path.name == "adapter_model.safetensors"
    if is_it and (folder / "adapter_config.json").is_file():
        raise TuningError(
            f"{path} is an adapter of Hugging Face PEFT: make a delta of it by lightning-peft import {folder} FILE."
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TuningError(f"{path} is no file: give the path of a delta.")
    try:
        opened = verified.stamp(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        meta = json.loads(header[META]) if META in header else None
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise TuningError(f"{path} is truncated or no safetensors file ({error}): take another copy.") from None
    if meta is None:
        raise TuningError(f"{path} is a safetensors file but no delta of lightning_peft: its header lacks {META!r}.")
    checkpoint = {"state_dict": tensors, META: meta}
    if verified.is_whole(path, opened):
        return checkpoint | {META: meta | {_CHECKED: True}}
    checkpoint = _checked(checkpoint, path)
    verified.remember(path, opened)
    return checkpoint


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back, so that a tuple is a list."""
    return json.loads(json.dumps(value))
