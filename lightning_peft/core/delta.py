"""The delta: what was trained, and nothing else. Collecting it, saving it, loading it.

What is trained is what is saved: every tensor that requires gradients, with the buffers that belong to it (the
statistics of a trained BatchNorm). There is no other registry of names.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.delta_file import FORMAT, versions, write_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint_of
from lightning_peft.core.graft import graft_prefixes, grafts
from lightning_peft.core.private_torch import WRAPPERS
from lightning_peft.core.sharded import gathered, whole
from lightning_peft.core.tuning import tunings


def delta_names(module: nn.Module) -> list[str]:
    """Return the names of the delta in the state dict of ``module``, each tied tensor once.

    A graft's persistent buffers belong to it. Another buffer does when its own module trains its parameters; outside of
    the backbones, when the nearest module around it that has parameters trains one.
    """
    backbones = tuple(f"{name}." if name else "" for name, _, _ in tunings(module))
    inside_grafts = graft_prefixes(module)
    first = dict(module.named_parameters())
    every = dict(module.named_parameters(remove_duplicate=False))
    names = []
    for name in module.state_dict():
        if name in every:
            keep = name in first and first[name].requires_grad
        else:
            keep = name.startswith(inside_grafts) or _goes_along(module, name, name.startswith(backbones))
        if keep:
            names.append(name)
    return names


def collect(module: nn.Module) -> dict[str, Tensor]:
    """Return the delta of ``module`` by canonical name: the live tensors, detached."""
    names = delta_names(module)
    state = module.state_dict()
    return {canonical(name): state[name] for name in names}


def canonical(name: str) -> str:
    """Return a tensor's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return WRAPPERS.sub("", name)


def not_frozen(backbone: nn.Module) -> set[str]:
    """Return the names that a fingerprint leaves out: those of trained tensors, with all names of tied ones."""
    thawed = {n for n, p in backbone.named_parameters(remove_duplicate=False) if p.requires_grad}
    return thawed.union(delta_names(backbone))


def keep_fingerprints(module: nn.Module) -> None:
    """Compute the fingerprints of backbones now, before their weights are rounded, replaced or sharded."""
    for _, backbone, _ in tunings(module):
        if not any(p.is_meta for p in backbone.parameters()):
            fingerprint_of(backbone, not_frozen(backbone))


def metadata(module: nn.Module) -> dict[str, Any]:
    """Return the metadata of a delta file, primitives only: methods, backbones with fingerprints, versions."""
    for place in grafts(module):
        if place.graft.merged:
            raise TuningError(
                f"{place.name} is merged into the weights of {place.path}, which are not those of the backbone now: "
                "unmerge it first."
            )
    meta: dict[str, Any] = {"format": FORMAT, "versions": dict(versions())}
    meta["methods"], meta["backbones"] = [], {}
    for path, backbone, tuning in tunings(module):
        path = canonical(path)
        for method in tuning.methods.values():
            kind = type(method)
            class_path = f"{kind.__module__}.{kind.__qualname__}"
            meta["methods"].append({"class_path": class_path, "init_args": method.init_args(), "backbone": path})
        meta["backbones"][path] = _identity(backbone) | {"fingerprint": fingerprint_of(backbone, not_frozen(backbone))}
    return meta


def save_delta(module: nn.Module, path: str | Path) -> Path:
    """Write the delta of ``module`` as safetensors, its metadata in the header; the file appears whole or not at all.

    Raises:
        TuningError: the module trains nothing.
    """
    with gathered(p for p in module.parameters() if p.requires_grad):
        tensors = {name: whole(tensor).contiguous().cpu() for name, tensor in collect(module).items()}
        if not tensors:
            raise TuningError(f"{type(module).__name__} trains nothing, so it has no delta: apply a method first.")
        return write_delta(path, tensors, metadata(module))


def _goes_along(module: nn.Module, buffer: str, in_backbone: bool) -> bool:
    path = buffer.rpartition(".")[0]
    try:
        module.get_submodule(path)
    except AttributeError:  # the scales of a quantised weight lie below a parameter
        return False
    if in_backbone:
        own = [p.requires_grad for p in module.get_submodule(path).parameters(recurse=False)]
        return bool(own) and all(own)
    while path and next(module.get_submodule(path).parameters(), None) is None:
        path = path.rpartition(".")[0]
    return any(p.requires_grad for p in module.get_submodule(path).parameters())


def _identity(backbone: nn.Module) -> dict[str, Any]:
    kinds = (kind.__name__ for kind in type(backbone).__mro__)
    return {
        "class": next(name for name in kinds if not name.startswith("FSDP")),  # sharding puts a class before its own
        "name_or_path": structure.name_or_path(backbone),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "config": json.loads(json.dumps(structure.settings_of(backbone), default=str)),
    }
