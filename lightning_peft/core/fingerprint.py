"""A fingerprint tells one frozen backbone from another: every weight of it counts.

It has three parts, each a hash over the configuration and, of every tensor, its name, its shape and the checksum of its
values: as they are stored, rounded to bfloat16, and rounded to float16. So a copy in another precision is recognised by
the part that both have: a float16 copy has the float16 part of its float32 original.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core import placement, structure
from lightning_peft.core.checksums import sums
from lightning_peft.core.sharded import gathered
from lightning_peft.core.tuning import Tuning

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_WITHOUT_EFFECT = {  # on what the weights compute at inference
    *(structure.NAME_OR_PATH, "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type"),
}


def fingerprint(backbone: nn.Module, skip: Iterable[str] = (), instead: Mapping[str, Tensor] | None = None) -> str:
    """Return ``dtypes:stored:bfloat16:float16``: the dtypes of the floating tensors, and three hashes of a backbone.

    Args:
        backbone: on any device, sharded or not; of tensors on the meta device names and shapes alone count.
        skip: names of tensors that are left out, since they are not frozen.
        instead: values of tensors, by name, where these are not those that the backbone came with.
    """
    start = json.dumps(_function(backbone), sort_keys=True, default=str).encode()
    digests = [hashlib.sha256(start) for _ in range(1 + len(_HALVES))]
    # The scales of a quantised weight are no buffers, and change form when it is packed for a device.
    live: dict[str, Tensor] = dict(backbone.named_parameters(remove_duplicate=False))
    live |= dict(backbone.named_buffers(remove_duplicate=False))
    dtypes = set()
    for name in sorted(live.keys() & backbone.state_dict().keys() - set(skip)):
        with gathered([live[name]]):
            tensor = placement.value_of(backbone, name, (instead or {}).get(name, live[name]).detach())
            found = [(0, 0)] * len(digests) if tensor.is_meta else sums(tensor, *_HALVES.values())
        if tensor.is_floating_point():
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
        for digest, pair in zip(digests, found, strict=True):
            digest.update(f"{name}{list(tensor.shape)}{pair}".encode())
    return ":".join(["+".join(sorted(dtypes)), *(digest.hexdigest()[:32] for digest in digests)])


def same_weights(one: str, other: str) -> bool:
    """Tell whether two fingerprints are of one backbone, or of a backbone and its copy in half precision."""
    if one.count(":") != other.count(":") or ":" not in one:
        return False  # one is of another version, or none at all
    (dtype, stored, *halves), (other_dtype, other_stored, *other_halves) = one.split(":"), other.split(":")
    if dtype == other_dtype:
        return stored == other_stored
    pairs = zip(_HALVES, halves, other_halves, strict=False)
    return any(name in (dtype, other_dtype) and mine == theirs for name, mine, theirs in pairs)


def fingerprint_of(backbone: nn.Module, tuning: Tuning, skip: Callable[[], Iterable[str]]) -> str:
    """Return the fingerprint of a tuned backbone; it is frozen, so the hash is computed once.

    Args:
        backbone: the tuned backbone.
        tuning: what is trained of it; what other methods have trained in place counts as it was before.
        skip: returns the names of tensors that are left out; it is asked when the hash is computed.
    """
    whole, own = Tuning.of(backbone) or tuning, frozenset(tuning.changed())
    if own not in whole.fingerprints:
        others = {n: t for n, t in whole.originals.items() if isinstance(t, Tensor) and n not in own}
        first = {id(p): name for name, p in backbone.named_parameters()}
        every = backbone.named_parameters(remove_duplicate=False)
        instead = {name: others[first[id(p)]] for name, p in every if first[id(p)] in others}
        whole.fingerprints[own] = fingerprint(backbone, skip(), instead)
    return whole.fingerprints[own]


def _function(backbone: nn.Module) -> dict[str, Any]:
    """Return what of the configuration changes the function that the weights compute; dropout rates do not."""
    settings = structure.settings_of(backbone)
    if not settings:
        return {"class": type(backbone).__name__}
    return {k: v for k, v in settings.items() if k not in _WITHOUT_EFFECT and "drop" not in k and "attn_impl" not in k}
