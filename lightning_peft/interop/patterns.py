"""Matches modules by the name patterns of an adapter's configuration, ours and PEFT's.

Ours are suffixes of names, the last that fits wins; PEFT's are regexes of the end of a name, the first that fits wins.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_peft.core import select
from lightning_peft.core.pattern import pattern
from lightning_peft.interop.names import compact


def spread(suffixes: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    """Return module -> its value, by our patterns: suffixes, later ones win."""
    values = dict.fromkeys(names, default)
    for suffix, chosen in select.match(values, list(suffixes)).items():
        values.update(dict.fromkeys(chosen, suffixes[suffix]))
    return values


def common(values: Mapping[str, Any], default: Any) -> Any:
    """Return the default if something has it, else the most frequent value, the least of several."""
    counts = Counter(values.values())
    return default if default in counts else min(counts, key=lambda value: (-counts[value], value))


def number(value: float) -> float:
    """Return a whole number as an integer, as PEFT's own files have it."""
    return int(value) if float(value).is_integer() else value


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return our patterns of values: for what is not the default, by the last part of names where that says it all.

    Where a name ends as another one does, all are there, the longer ones later, so that these win.
    """
    found = _compact_pattern(values, default)
    if spread(found, values, default) == dict(values):
        return found
    return {name: number(values[name]) for name in sorted(values, key=len)}


def their_pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return PEFT's patterns of values, which say the same in any order, since it sorts them when it saves.

    Where a name ends as another one does, each is tied to the beginning.
    """
    found = _compact_pattern(values, default)
    if all(_unanimous(found, name, default) == {value} for name, value in values.items()):
        return found
    return {f"^{re.escape(name)}": number(value) for name, value in values.items() if value != default}


def _unanimous(patterns: Mapping[str, Any], name: str, default: Any) -> set[Any]:
    return {value for key, value in patterns.items() if value_of({key: value}, name, None) is not None} or {default}


def _compact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in sorted({value for value in values.values() if value != default}):
        chosen = [name for name in values if values[name] == value]
        found.update(dict.fromkeys(compact(chosen, values), number(value)))
    return found


def value_of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of a module as PEFT finds it: the first key that, as a regex, matches the end of its name."""
    for key, value in (patterns or {}).items():
        if pattern(rf"(.*\.)?({key})$").match(name):
            return value
    return default


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether PEFT would wrap the module of this name (``check_target_module_exists`` there)."""
    saved = config["modules_to_save"] or []
    if any(pattern(rf"(^|.*\.){module}($|\..*)").match(name) for module in saved) or selects(
        config.get("exclude_modules") or [], name
    ):
        return False
    if not selects(config["target_modules"] or [], name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or isinstance(config["target_modules"], str):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := pattern(rf"(?:^|.*?\.){p}\.(\d+)\.").match(name))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def selects(patterns: Any, name: str) -> bool:
    """Tell whether PEFT's regex matches a name, or one of its suffixes ends it."""
    if isinstance(patterns, str):
        return pattern(patterns).fullmatch(name)
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)
