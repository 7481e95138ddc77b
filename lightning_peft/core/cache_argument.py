"""Finds the cache of keys and values in a model's inputs or output, under either name that transformers gives it.

Argument and output field are called `cache` since transformers 5.24, and were `past_key_values` before. Until 5.40 a
model renames the old name inside its ``forward``, where a graft around it does not see that:
https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/utils/generic.py (``ModelOutput``).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("cache", "past_key_values")
"""The names, the newest first. No other file writes them."""
_OF_ATTENTIONS = (*NAMES, "past_key_value", "layer_past")


def name_in(forward: Callable[..., Any]) -> str | None:
    """Return the name by which a model's ``forward`` takes its cache, or None: it takes none."""
    takes = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in takes), None)


def argument_of(attention: Callable[..., Any]) -> str | None:
    """Return the name by which the ``forward`` of an attention takes the cache of its model, or None."""
    takes = inspect.signature(attention).parameters
    return next((name for name in _OF_ATTENTIONS if name in takes), None)


def cache_in(values: Mapping[str, Any]) -> Any:
    """Return the cache among a model's inputs by name, or in its output, or None."""
    return next((values[name] for name in NAMES if values.get(name) is not None), None)


def with_cache(inputs: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """Return a model's inputs with this cache, called ``name``, in place of any other."""
    return {key: value for key, value in inputs.items() if key not in NAMES} | {name: cache}
