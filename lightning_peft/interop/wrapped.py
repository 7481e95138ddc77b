"""Converts full Lightning checkpoints of modules that PEFT has wrapped to deltas.

Such a checkpoint holds the whole base beside the adapter, with names like
``net.base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight``. What it does not hold is the
configuration of the adapter, without which alpha, say, is unknown.
"""

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.delta import save_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.select import backbone_of, near
from lightning_peft.core.storage import check_tensors, read_torch
from lightning_peft.interop import adapter_config
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.folder import check_adapter_tensors
from lightning_peft.interop.load import apply_adapter
from lightning_peft.interop.names import BASE_LAYER, PREFIX, PROMPT_PREFIX, Names, strip

_START = re.compile(r"^(?P<outer>.*?)(?P<key>base_model\..+|prompt_encoder\..+)$")


def convert_wrapped(
    model: nn.Module,
    full: str | Path,
    delta: str | Path,
    config: str | Path | Mapping[str, Any],
    adapter: str = "default",
) -> Path:
    """Turn a full checkpoint of a module wrapped by PEFT into a delta of ``model``, to which the method is applied.

    Args:
        model: the plain base model, with the weights that the checkpoint has.
        full: the checkpoint, of a Trainer or a state dict.
        delta: the file to write.
        config: the adapter's configuration: ``adapter_config.json``, the folder that has it, or
            ``LoraConfig(...).to_dict()``.
        adapter: PEFT's name of the adapter in the module.

    Raises:
        TuningError: the checkpoint holds no module of PEFT, its base is not ``model``, or tensors are missing.
    """
    base, read_adapter = read_wrapped(full, config, adapter)
    load_wrapped(model, base, read_adapter)
    return save_delta(model, delta)


def read_wrapped(
    full: str | Path, config: str | Path | Mapping[str, Any], adapter: str = "default"
) -> tuple[dict[str, Tensor], PeftAdapter]:
    """Return the tensors of the base by their names in the model, and the adapter; see `convert_wrapped`."""
    checkpoint = read_torch(full, of_others=True)
    settings = _config(config)
    tensors = checkpoint.get("state_dict", checkpoint)
    check_tensors(tensors, full)
    base, own = _sorted(_of_one(tensors, adapter), adapter, settings, str(full))
    found = PeftAdapter(settings, own, source=str(full))
    check_adapter_tensors(found)
    return base, found


def load_wrapped(model: nn.Module, base: Mapping[str, Tensor], adapter: PeftAdapter) -> TuningMethod:
    """Apply an adapter to ``model``, whose weights must be those of ``base``."""
    _check_base(base, Names(backbone_of(model)), adapter.source)
    return apply_adapter(model, adapter, allow_other_base=True)


def _of_one(tensors: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Return the tensors without those of other adapters, whose names stand where this one has its own."""
    parts = {name: name.split(".") for name in tensors}
    places = {each[i - 1] for each in parts.values() for i in (len(each) - 2, len(each) - 1) if each[i] == adapter}
    others = {each[i + 1] for each in parts.values() for i in range(len(each) - 1) if each[i] in places} - {adapter}
    return {name: tensor for name, tensor in tensors.items() if others.isdisjoint(parts[name][-2:])}


def _sorted(
    tensors: Mapping[str, Tensor], adapter: str, config: Mapping[str, Any], source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the base by their names in the model, and those of the adapter by their names in a file."""
    prefix = PROMPT_PREFIX if adapter_config.is_prompt(dict(config)) else PREFIX
    bias = config.get("bias", "none")
    base: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    outer: set[str] = set()
    for name, tensor in tensors.items():
        found = _START.match(name)
        if found is None:
            continue
        outer.add(found["outer"])
        key = found["key"]
        if key.startswith("prompt_encoder."):
            if key == f"prompt_encoder.{adapter}.embedding.weight":
                own["prompt_embeddings"] = tensor
            continue
        saved = f".modules_to_save.{adapter}."
        if ".original_module." in key:
            base[strip(key.replace(".original_module.", "."), prefix)[0]] = tensor
        elif saved in key:
            own[key.replace(saved, ".")] = tensor
        elif ".modules_to_save." not in key and ".trainable_tokens_original." not in key:
            parts = key.split(".")
            if adapter in parts[-2:]:
                name = ".".join(part for part in parts if part != adapter)
                own[name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name] = tensor
            elif key.endswith(".bias") and (bias == "all" or (bias == "lora_only" and parts[-2] == BASE_LAYER)):
                own[key] = tensor
            else:
                base[strip(key.replace(".token_adapter.", "."), prefix)[0]] = tensor
    if not base or not own:
        raise TuningError(
            f"{source} holds no module wrapped by PEFT with an adapter {adapter!r} (names with base_model.): for other "
            "full checkpoints use lightning_peft.convert."
        )
    if len(outer) > 1:
        raise TuningError(f"{source} holds {len(outer)} modules wrapped by PEFT: save them one by one.")
    return base, own


def _check_base(base: Mapping[str, Tensor], names: Names, source: str) -> None:
    """Check that the frozen tensors of the checkpoint are those of the model."""
    for name, tensor in base.items():
        live = names.tensors.get(name)
        if live is None:
            raise TuningError(f"{source} has {name}, which this model lacks{near(name, names.tensors)}.")
        if live.shape != tensor.shape or not torch.equal(live.detach().cpu(), tensor.to(live.dtype)):
            raise TuningError(f"{source} has another {name} than this model: give the base that was wrapped.")


def _config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        kind = plain.get("peft_type")
        plain["peft_type"] = kind.value if isinstance(kind, Enum) else kind
        return adapter_config.checked(plain, "the configuration")
    path = Path(config)
    return adapter_config.read_config(path / adapter_config.FILE if path.is_dir() else path)
