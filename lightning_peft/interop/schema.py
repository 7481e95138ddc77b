"""Checks what kind of value each key of ``adapter_config.json`` has, before anything is computed from it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning_peft.core.errors import TuningError


class Kind(NamedTuple):
    """A kind of value: what it is called, and what tells whether a value is one."""

    name: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _are(values: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(values, (list, tuple)) and all(map(holds, values))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_NULL = Kind("null", lambda value: value is None)
_TEXT = Kind("a text", _is_text)
_BOOL = Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = Kind("a number from 1 on", _is_count)
_SIZE = Kind("a number from 0 on", lambda value: value == 0 or _is_count(value))
_TEXTS = Kind("a list of texts", lambda value: _are(value, _is_text))
_INDICES = Kind("a number or a list of numbers", lambda value: _is_index(value) or _are(value, _is_index))
_LIST = Kind("a list of numbers", lambda value: _are(value, _is_index))
_ROWS = Kind(
    "a mapping of texts to lists of numbers",
    lambda value: isinstance(value, dict) and all(_is_text(k) and _LIST.holds(v) for k, v in value.items()),
)
_POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and 0 < value < 1e12)
_RATE = Kind("a number from 0 on and below 1", lambda value: _is_number(value) and 0 <= value < 1)
_RANKS = Kind(
    "a mapping of texts to ranks",
    lambda value: isinstance(value, dict) and all(_is_text(k) and _is_count(v) for k, v in value.items()),
)
_ALPHAS = Kind(
    "a mapping of texts to numbers above 0",
    lambda value: isinstance(value, dict) and all(_is_text(k) and _POSITIVE.holds(v) for k, v in value.items()),
)
_CLASS = Kind(
    "a mapping of texts to texts",
    lambda value: isinstance(value, dict) and all(v is None or _is_text(v) for v in value.values()),
)
_BIAS = Kind("one of none, all, lora_only", lambda value: value in ("none", "all", "lora_only"))

_NAMES = (_NULL, _TEXT, _TEXTS)
_KINDS: dict[str, tuple[Kind, ...]] = {
    "auto_mapping": (_NULL, _CLASS),
    "modules_to_save": (_NULL, _TEXTS),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_version"), (_NULL, _TEXT)),
    **dict.fromkeys(("tokenizer_name_or_path", "prompt_tuning_init", "prompt_tuning_init_text"), (_NULL, _TEXT)),
    **dict.fromkeys(("inference_mode", "fan_in_fan_out", "ensure_weight_tying", "lora_bias"), (_BOOL, _NULL)),
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "prefix_projection"), (_BOOL, _NULL)),
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), _NAMES),
    "target_parameters": (_NULL, _TEXTS),
    "layers_to_transform": (_NULL, _INDICES),
    "token_indices": (_LIST,),
    "trainable_token_indices": (_NULL, _LIST, _ROWS),
    "alpha_pattern": (_NULL, _ALPHAS),
    "rank_pattern": (_NULL, _RANKS),
    "bias": (_BIAS,),
    "init_lora_weights": (_BOOL, _TEXT, _NULL),
    "lora_alpha": (_POSITIVE,),
    "lora_dropout": (_RATE,),
    "r": (_COUNT,),
    "num_virtual_tokens": (_COUNT,),
    **dict.fromkeys(("num_layers", "num_attention_heads", "token_dim"), (_COUNT, _NULL)),
    "num_transformer_submodules": (_COUNT, _NULL),
}
"""Key -> the kinds of value that it may have; keys that are not here have any."""


BY_TYPE = {bool: _BOOL, int: _SIZE, float: Kind("a number", _is_number), str: _TEXT}
"""Type of a default -> the kind of value."""


def check_kinds(config: Mapping[str, Any], source: str, own: Mapping[str, tuple[Kind, ...]]) -> None:
    """Check the values of a configuration that has all its keys; ``own``: the kinds of keys that its type has its own.

    Raises:
        TuningError: one is of a kind that PEFT never writes.
    """
    for key, value in config.items():
        kinds = own[key] if key in own else _KINDS.get(key, ())
        if kinds and not any(kind.holds(value) for kind in kinds):
            raise TuningError(
                f"{source} has {key}={short(value)}, and PEFT writes {' or '.join(kind.name for kind in kinds)}: take "
                "another copy."
            )


def short(value: Any) -> str:
    """Return what a value looks like, of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
