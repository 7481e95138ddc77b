"""Checks, before anything is written, that a server (vLLM) can read an adapter.

vLLM reads ``r``, ``lora_alpha``, ``use_rslora``, ``target_modules`` and the tensors; what it does not read it would
leave out silently. Its checks are in ``vllm/lora/peft_helper.py``, its ranks in ``vllm/config/lora.py``.
"""

from typing import Any

from lightning_peft.core.errors import TuningError
from lightning_peft.interop.adapter import PeftAdapter

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM may be; an adapter's own rank may be anything up to it."""

PROFILES = ("vllm",)


def known(profile: str | None) -> None:
    """Check that there is such a profile.

    Raises:
        TuningError: there is none.
    """
    if profile is not None and profile not in PROFILES:
        raise TuningError(f"{profile!r} is no server that is known: take one of {', '.join(PROFILES)}.")


def check_profile(profile: str | None, adapter: PeftAdapter) -> None:
    """Check that a server of this profile can read the adapter.

    Raises:
        TuningError: it cannot; the message names everything that stands against it, and what to change.
    """
    if profile is None:
        return
    faults = _vllm(adapter.config, adapter)
    if faults:
        raise TuningError(f"vLLM cannot serve this adapter: {'; '.join(faults)}.")


def flags(adapter: PeftAdapter) -> str:
    """Return the arguments of ``vllm serve`` that the adapter needs."""
    rank = next(rank for rank in VLLM_RANKS if adapter.config["r"] <= rank)
    return f"--enable-lora --max-lora-rank {rank}"


def _vllm(config: dict[str, Any], adapter: PeftAdapter) -> list[str]:
    if config["peft_type"] != "LORA":
        return [f"it is a {config['peft_type']} adapter, and only LoRA is served: train with LoRA, or merge"]
    faults = []
    if config["modules_to_save"]:
        saved = ", ".join(config["modules_to_save"])
        faults.append(f"{saved} would have to replace modules of the model: exclude= them in training, or merge")
    if config["use_dora"]:
        faults.append("it is DoRA: train with use_dora=False, or merge")
    if config["trainable_token_indices"]:
        faults.append("it has trained rows of the word table: train without TrainableTokens, or merge")
    if config["bias"] != "none":
        faults.append(f"it has trained biases (bias={config['bias']!r}): train with bias='none'")
    faults += [
        f"it has a {key}, and one rank and alpha are read for all layers: train without"
        for key in ("rank_pattern", "alpha_pattern")
        if config[key]
    ]
    if config["r"] > VLLM_RANKS[-1]:
        faults.append(f"r={config['r']} is above {VLLM_RANKS[-1]}, the highest rank: lower r")
    if any(".lora_embedding_" in name for name in adapter.tensors):
        faults.append("it tunes an embedding: leave that out of target_modules")
    if any(tensor.ndim != 2 for name, tensor in adapter.tensors.items() if ".lora_" in name):
        faults.append("it tunes a convolution: leave that out of target_modules")
    return faults
