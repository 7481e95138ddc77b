"""Matches modules by the name patterns of an adapter's configuration, ours and PEFT's.

Ours are suffixes of names, the last that fits wins; PEFT's are regexes of the end of a name, the first that fits wins.
"""

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
    """Return name -> value for what is not the default, by the last part of names where that says it all."""
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
