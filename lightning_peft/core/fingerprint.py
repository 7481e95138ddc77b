"""A hash that tells one frozen backbone from another."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.quantized import unpacked
from lightning_peft.core.sharded import gathered, whole
from lightning_peft.core.tuning import Tuning

_SAMPLE = 64
_WITHOUT_EFFECT = {  # on what the weights compute at inference
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type"),
}


def fingerprint(backbone: nn.Module, skip: Iterable[str] = ()) -> str:
    """Return a SHA-256 over the configuration and, of every tensor, its name, shape and 64 evenly spaced values.

    Values are rounded to bf16, so an fp32 and a bf16 copy of a backbone agree. One changed weight may go unseen: the
    hash tells backbones apart, it does not sign them. ``skip`` names the tensors that are not frozen.
    """
    digest = hashlib.sha256(json.dumps(_function(backbone), sort_keys=True, default=str).encode())
    # The scales of a quantised weight are no buffers, and change form when it is packed for a device.
    tensors = {
        n
        for n, _ in (
            *backbone.named_parameters(remove_duplicate=False),
            *backbone.named_buffers(remove_duplicate=False),
        )
    }
    left_out = set(skip)
    parameters = dict(backbone.named_parameters(remove_duplicate=False))
    for name, tensor in sorted(backbone.state_dict().items()):
        if name in left_out or name not in tensors:
            continue
        live = parameters.get(name, tensor)
        with gathered([live]):
            _add(digest, name, live.detach())
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}{list(tensor.shape)}".encode())
    if tensor.numel() and not tensor.is_meta:
        flat = unpacked(whole(tensor)).reshape(-1)
        places = torch.arange(_SAMPLE, device=flat.device) * (flat.numel() - 1) // (_SAMPLE - 1)
        digest.update(flat[places].to(torch.bfloat16).float().cpu().numpy().tobytes())


def fingerprint_of(backbone: nn.Module, skip: Iterable[str]) -> str:
    """Return the fingerprint of a tuned backbone; it is frozen, so the hash is computed once."""
    tuning = Tuning.of(backbone)
    if tuning is None:
        return fingerprint(backbone, skip)
    if tuning.fingerprint is None:
        tuning.fingerprint = fingerprint(backbone, skip)
    return tuning.fingerprint


def _function(backbone: nn.Module) -> dict[str, Any]:
    """Return what of the configuration changes the function that the weights compute; dropout rates do not."""
    settings = structure.settings_of(backbone)
    if not settings:
        return {"class": type(backbone).__name__}
    return {k: v for k, v in settings.items() if k not in _WITHOUT_EFFECT and "drop" not in k and "attn_impl" not in k}
