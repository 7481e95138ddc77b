"""The delta: what was trained, and nothing else. Collecting it, saving it, loading it.

What is trained is what is saved, as the records of `run` say it, with the buffers that belong to it (the statistics of
a trained BatchNorm). There is no other registry of names.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.delta_file import FORMAT, MATCHED, versions, write_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint_of
from lightning_peft.core.graft import graft_prefixes, grafts
from lightning_peft.core.name_lists import packed
from lightning_peft.core.pruned import check_pruned, live_name, parameter_of
from lightning_peft.core.run import (
    below_backbones,
    canonical,
    own_tunings,
    run_of,
    selected,
    trained,
    trained_names,
    unwrapped,
)
from lightning_peft.core.sharded import gathered, whole
from lightning_peft.core.tuning import Tuning, chosen, tunings

if TYPE_CHECKING:
    from lightning_peft.core.method import TuningMethod


def delta_names(module: nn.Module) -> list[str]:
    """Return the names of the delta in the state dict of ``module``, each tied tensor once.

    A graft's persistent buffers belong to it. Another buffer does when its own module trains its parameters; outside of
    the backbones, when the nearest module around it that has parameters trains one, and when it has moved in the run.
    """
    names, run, below = trained_names(module), run_of(module), below_backbones(module)
    moved = run.outside if run is not None else set()
    own = [path for path, _, _ in own_tunings(module)]
    others = tuple(f"{path}." for path, _, _ in tunings(module) if path not in own)
    resting = {
        f"{path}.{place.full_name}.".lstrip(".")
        for path, backbone, tuning in own_tunings(module)
        for place in {*grafts(backbone)} - {*tuning.grafts(backbone)}
    }
    prefixes = (prefix for prefix in graft_prefixes(module) if prefix not in resting)
    in_grafts = tuple(prefix for prefix in prefixes if not prefix.startswith(others))
    first = dict(module.named_parameters())
    every = dict(module.named_parameters(remove_duplicate=False))
    found = []
    for name in module.state_dict():
        if name in every:
            keep = name in first and canonical(name) in names
        else:
            keep = (
                name.startswith(in_grafts)
                or canonical(name) in moved
                or parameter_of(canonical(name)) in names
                or _goes_along(module, name, names, below(name))
            )
        if keep:
            found.append(name)
    return found


def collect(module: nn.Module) -> dict[str, Tensor]:
    """Return the delta of ``module`` by canonical name: the live tensors, detached."""
    module = unwrapped(module)
    names = delta_names(module)
    state = module.state_dict()
    return {canonical(name): state[name] for name in names}


def left_out(module: nn.Module, names: Collection[str]) -> list[str]:
    """Return the canonical names of the tensors outside of the tuned backbones that are not of the delta."""
    below, inside = below_backbones(module), set(names)
    return sorted(canonical(name) for name in module.state_dict() if not below(name) and name not in inside)


def not_frozen(backbone: nn.Module, tuning: Tuning) -> set[str]:
    """Return the names of what a fingerprint leaves out: grafts, what is trained, under the names of tied weights, too.

    Args:
        backbone: the tuned backbone.
        tuning: what is trained of it.
    """
    live, inside = dict(backbone.named_parameters()), graft_prefixes(backbone)
    changed = {live_name(name, live) for name in tuning.changed()}
    ids = {id(p) for name, p in backbone.named_parameters() if name in changed}
    names = {n for n, p in backbone.named_parameters(remove_duplicate=False) if id(p) in ids}
    state = backbone.state_dict()
    along = {n for n in state if n not in names and _goes_along(backbone, n, changed, in_backbone=True)}
    along |= {n for n in state if parameter_of(n) in names}
    return names | along.union(name for name in state if name.startswith(inside))


def keep_fingerprints(module: nn.Module) -> None:
    """Let the fingerprints of backbones be computed now, before their weights are rounded, replaced or sharded."""
    for _, backbone, tuning in own_tunings(module):
        if not any(p.is_meta for p in backbone.parameters()):
            fingerprint_of(backbone, tuning, partial(not_frozen, backbone, tuning))


def metadata(module: nn.Module, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the metadata of a delta file, primitives only: methods, backbones with fingerprints, versions.

    Args:
        module: holds one or more tuned backbones.
        names: those of the delta, where they have been found already.

    Raises:
        TuningError: a graft is merged, or a weight that was trained in place rests.
    """
    for place in grafts(module):
        if place.graft.merged:
            raise TuningError(
                f"{place.name} is merged into the weights of {place.path}, which are not those of the backbone now: "
                "unmerge it first."
            )
    meta: dict[str, Any] = {"format": FORMAT, "versions": dict(versions())}
    meta["methods"], meta["backbones"], meta["left_out"] = [], {}, []
    meta["left_out"] = left_out(module, delta_names(module) if names is None else names)
    for path, backbone, tuning in own_tunings(module):
        check_pruned(backbone, trained(backbone))
        path = canonical(path)
        meta["methods"] += [
            _said_of(method, tuning.matched.get(key, {}), path) | ({"apart": True} if key in tuning.apart else {})
            for key, method in tuning.methods.items()
        ]
        if resting := sorted(tuning.trained_in_place() & tuning.parked.keys()):
            raise TuningError(
                f"{resting[0]} has its base value while the method that trained it rests: let it compute first, by "
                "activate(model, ...) or after muted()."
            )
        meta["backbones"][path] = identity_of(backbone, tuning)
    return meta


def save_delta(module: nn.Module, path: str | Path, *names: str) -> Path:
    """Write the delta of ``module`` as safetensors, its metadata in the header; the file appears whole or not at all.

    Args:
        module: holds one or more tuned backbones.
        path: the file to write.
        names: of the deltas that are wanted; none: all that are trained.

    Raises:
        TuningError: the module trains nothing, or has no delta of a name.
    """
    module = unwrapped(module)
    if (run := run_of(module)) is not None:
        run.note_moved(module)
    with ExitStack() as stack:
        if names:
            stack.enter_context(selected(module, set().union(*(keys for _, _, keys in chosen(module, names)))))
        stack.enter_context(gathered(trained(module).values()))
        tensors = {name: whole(tensor).contiguous().cpu() for name, tensor in collect(module).items()}
        if not tensors:
            raise TuningError(f"{type(module).__name__} trains nothing, so it has no delta: apply a method first.")
        return write_delta(path, tensors, metadata(module))


def _said_of(method: "TuningMethod", matched: Mapping[str, list[str]], path: str) -> dict[str, Any]:
    """Return what a delta file says of a method: its class and arguments, and the names that its patterns matched."""
    kind = type(method)
    said = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": method.init_args(), "backbone": path}
    return said | ({MATCHED: {name: packed(names) for name, names in matched.items()}} if matched else {})


def _goes_along(module: nn.Module, buffer: str, trained: set[str], in_backbone: bool) -> bool:
    path = buffer.rpartition(".")[0]
    try:
        owner = module.get_submodule(path)
    except AttributeError:  # the scales of a quantised weight lie below a parameter
        return False
    if in_backbone:
        own = [_is_of(trained, path, name) for name, _ in owner.named_parameters(recurse=False)]
        return bool(own) and all(own)
    while path and next(module.get_submodule(path).parameters(), None) is None:
        path = path.rpartition(".")[0]
    return any(_is_of(trained, path, name) for name, _ in module.get_submodule(path).named_parameters())


def _is_of(names: set[str], path: str, name: str) -> bool:
    return canonical(f"{path}.{name}".lstrip(".")) in names


def identity_of(backbone: nn.Module, tuning: Tuning) -> dict[str, Any]:
    """Return what a delta file says of a backbone: class, origin, size, configuration, and fingerprint.

    Args:
        backbone: the tuned backbone.
        tuning: what is trained of it.
    """
    kinds = (kind.__name__ for kind in type(backbone).__mro__)
    return {
        "class": next(name for name in kinds if not name.startswith("FSDP")),  # sharding puts a class before its own
        "name_or_path": structure.name_or_path(backbone),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "config": json.loads(json.dumps(structure.settings_of(backbone), default=str)),
        "fingerprint": fingerprint_of(backbone, tuning, partial(not_frozen, backbone, tuning)),
    }
