"""Reads and writes ``adapter_config.json``, with PEFT's defaults for each type of adapter.

Read by hand, so that PEFT need not be installed. Keys are sorted, and lists of names too, so that equal adapters have
equal files; PEFT writes sets in the order of their hashes.
"""

import json
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line
from lightning_peft.interop.converters import CONVERTERS
from lightning_peft.interop.schema import check_kinds, short

FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The version of PEFT whose format is written."""

_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": PEFT_VERSION,
    "revision": None,
    "task_type": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {key: value for key, value in _COMMON.items() if key not in converter.without} | dict(converter.defaults)
    for kind, converter in CONVERTERS.items()
}
"""Type of an adapter -> every key that PEFT 0.21 writes for it, with its default."""


def is_prompt(config: dict[str, Any]) -> bool:
    """Tell whether an adapter is a prompt, whose model PEFT does not wrap."""
    return CONVERTERS[config["peft_type"]].is_prompt


def full(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with all keys of its type."""
    return DEFAULTS[config["peft_type"]] | config


def dumps(config: dict[str, Any]) -> str:
    """Return the text of the file, the same for equal configurations."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json``, keys that it leaves out with their defaults.

    Raises:
        TuningError: there is no such file, it is no JSON, or it is of a type, or asks for something, unknown here.
    """
    if not path.is_file():
        below = sorted(str(each.parent) for each in path.parent.glob(f"*/{FILE}"))  # adapters that have names
        raise TuningError(
            f"{path.parent} is no adapter of PEFT, since it has no {FILE}: give the folder that has it"
            f"{f', such as {below[0]}' if below else ''}."
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise TuningError(f"{path} is no JSON ({first_line(error)}): take another copy.") from None
    return checked(given, str(path))


def checked(given: Any, source: str) -> dict[str, Any]:
    """Return a configuration with the defaults of what it leaves out.

    Raises:
        TuningError: it is of a type that is unknown here, or has a key that may change what the adapter computes.
    """
    kind = given.get("peft_type") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise TuningError(
            f"{source} has peft_type={short(kind)}, which has no twin here: import {', '.join(DEFAULTS)}."
        )
    config = full(given)
    odd = {key: value for key, value in given.items() if key not in DEFAULTS[kind] | {"peft_type": ""} and value}
    odd.pop("runtime_config", None)  # PEFT ignores it, too
    if odd:
        _check_unknown(odd, config["peft_version"], f"{source} of {kind}")
        config = {key: value for key, value in config.items() if key not in odd}
    check_kinds(config, source, CONVERTERS[kind].kinds())
    return config


def _check_unknown(odd: dict[str, Any], version: Any, source: str) -> None:
    """Warn of keys of a later version that are numbers, which say how much of something, and not that it is done.

    Raises:
        TuningError: another key is unknown, or one of a version that is known.
    """
    listed = ", ".join(f"{key}={short(value)}" for key, value in odd.items())
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in odd.values())
    newer = isinstance(version, str) and _parts(version) > _parts(PEFT_VERSION)
    if not (newer and numbers):
        by = f"which PEFT {version} may compute otherwise by" if newer else "which PEFT never writes"
        raise TuningError(
            f"{source} has {listed}, unknown to PEFT {PEFT_VERSION}, the newest that is read here, and {by}: save the "
            "adapter with that version."
        )
    rank_zero_warn(
        f"{source} has {listed}, unknown to PEFT {PEFT_VERSION}, the newest that is read here, and is read without: "
        f"PEFT {version}, which wrote it, says whether that changes what it computes."
    )


def _parts(version: str) -> tuple[int, ...]:
    """Return a version as numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
