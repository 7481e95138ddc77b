"""Reads and writes ``adapter_config.json``, with PEFT's defaults for each type of adapter and its names of tasks.

Read by hand, so that PEFT need not be installed. Keys are sorted, and lists of names too, so that equal adapters have
equal files; PEFT writes sets in the order of their hashes.
"""

import json
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.storage import first_line
from lightning_peft.core.task_class import is_headless
from lightning_peft.interop.schema import check_kinds, short
from lightning_peft.interop.twins import TWINS, kinds_of

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
_PROMPT: dict[str, Any] = _COMMON | {
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": None,
    "token_dim": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": _COMMON
    | {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    },
    "IA3": _COMMON
    | {
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "target_modules": None,
    },
    "PROMPT_TUNING": _PROMPT
    | {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    },
    "P_TUNING": _PROMPT
    | {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    },
    "TRAINABLE_TOKENS": {key: value for key, value in _COMMON.items() if key != "modules_to_save"}
    | {"init_weights": True, "target_modules": None, "token_indices": []},
    "PREFIX_TUNING": _PROMPT | {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False},
    **{name: _COMMON | dict(twin.defaults) for name, (_, twin) in TWINS.items()},
}
"""Type of an adapter -> every key that PEFT 0.21 writes for it, with its default."""

_PROMPT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task of an adapter -> the class of transformers that builds its model."""


def is_prompt(config: dict[str, Any]) -> bool:
    """Tell whether an adapter is a prompt, whose model PEFT does not wrap."""
    return config["peft_type"] in _PROMPT_TYPES


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a transformers model, or None: it has none for it."""
    from transformers.models.auto import modeling_auto

    for task, mapping in _TASKS.items():
        if type(model).__name__ in set(getattr(modeling_auto, mapping).values()):
            return task
    return None


def prompt_task_of(model: nn.Module) -> str | None:
    """Return PEFT's name for the task of a model that has a prompt, which may be one without a head."""
    bare = structure.is_pretrained(model) and structure.base_model_of(model) is model and is_headless(model)
    return task_of(model) or ("FEATURE_EXTRACTION" if bare else None)


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
    check_kinds(config, source, kinds_of(kind))
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
