"""PEFT 0.21 finds the cache of keys and values by the name that transformers had for it before 5.24."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft.peft_model
import pytest


@pytest.fixture(autouse=True)
def the_old_name_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the prefix of a classifier see `past_key_values` where `cache` is; transformers renames it in the call.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py (``_prefix_tuning_forward``)
    """

    def signature(function: Callable[..., Any]) -> inspect.Signature:
        found = inspect.signature(function)
        names = {"cache": "past_key_values"} if "past_key_values" not in found.parameters else {}
        return found.replace(parameters=[p.replace(name=names.get(p.name, p.name)) for p in found.parameters.values()])

    monkeypatch.setattr(peft.peft_model, "inspect", SimpleNamespace(signature=signature))
