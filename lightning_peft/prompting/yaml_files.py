"""Reads a mapping from a YAML file, without evaluating anything."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_peft.core.errors import TuningError


def read_mapping(path: Path, entries: str) -> dict[str, Any]:
    """Return what a YAML file holds.

    Args:
        path: of the file.
        entries: what it must have, for the error.

    Raises:
        TuningError: it is no YAML, or no mapping.
    """
    try:
        parts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TuningError(f"{path} is no YAML file ({str(error).splitlines()[0]}): mend it.") from None
    if not isinstance(parts, dict):
        raise TuningError(f"{path} holds no mapping: give it {entries}.")
    return parts
