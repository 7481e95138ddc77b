"""PEFT 0.21 finds the cache of a classifier by its name before transformers 5.24."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a forward pass with `past_key_values` where it has `cache`."""
    found = inspect.signature(function)
    names = {"cache": "past_key_values"} if "past_key_values" not in found.parameters else {}
    return found.replace(parameters=[p.replace(name=names.get(p.name, p.name)) for p in found.parameters.values()])


INSPECT = SimpleNamespace(signature=signature)
"""What takes the place of ``inspect`` in ``peft.peft_model`` (``_prefix_tuning_forward``):
https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py"""
