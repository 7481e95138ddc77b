"""Reads what a model says of its task: that its class is for one or for none, and where its classifier is."""

import copy
import re
from typing import Any

import torch
from torch import nn

from lightning_peft.core import structure

_NAMES: dict[tuple[type, str], frozenset[str]] = {}
"""A class and a configuration -> the names of the parameters that they make."""


def is_headless(model: nn.Module) -> bool:
    """Tell whether a transformers model is one that heads are built on: its family's base model, or a Backbone."""
    from transformers import MODEL_MAPPING

    config = structure.config_of(model)
    base = MODEL_MAPPING.get(type(config), None) or ()
    return isinstance(model, base) or (structure.gives_feature_maps(model) and not is_of_a_task(model))


def is_of_a_task(model: nn.Module) -> bool:
    """Tell whether the class of a transformers model is named for a task: ``BertForTokenClassification``."""
    return any(re.search(r"For[A-Z]", kind.__name__) for kind in type(model).__mro__)


def classifiers_of(model: nn.Module) -> list[nn.Module] | None:
    """Return what the outermost modules with a ``get_classifier()`` give by it, as those of timm; None: there are none.

    https://huggingface.co/docs/timm/en/feature_extraction
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        get = structure.setting(module, "get_classifier")
        if not inside and get is not None:
            found[name] = get
    if not found:
        return None
    given = [get() for get in found.values()]
    flat = [part for one in given for part in (one if isinstance(one, (list, tuple)) else (one,))]
    return [part for part in flat if isinstance(part, nn.Module)]


def parameter_names(model: nn.Module) -> frozenset[str] | None:
    """Return the names of the parameters that a transformers model has by its configuration alone; None: unknown."""
    try:
        config = structure.config_of(model)
        return _names_by_config(type(model), config.to_json_string(use_diff=False), config)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None


def _names_by_config(kind: type[nn.Module], key: str, config: Any) -> frozenset[str]:
    if (kind, key) not in _NAMES:
        with torch.device("meta"):
            _NAMES[kind, key] = frozenset(name for name, _ in kind(copy.deepcopy(config)).named_parameters())
    return _NAMES[kind, key]
