"""The delta: what was trained, and nothing else. Collecting, saving, checking and loading it.

What is trained is what is saved: every tensor that requires gradients, with the buffers that belong to it (the
statistics of a trained BatchNorm). There is no other registry of names.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint_of
from lightning_peft.core.graft import graft_prefixes, grafts
from lightning_peft.core.select import near
from lightning_peft.core.sharded import gathered, is_folder, like, read_folder, whole
from lightning_peft.core.storage import atomic, read_torch
from lightning_peft.core.tuning import tunings

META = "lightning_peft"
FORMAT = 1
IN_FOLDER = "delta.safetensors"
"""The delta among the files of a checkpoint that DeepSpeed has written."""
_WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


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
    return _WRAPPERS.sub("", name)


def not_frozen(backbone: nn.Module) -> set[str]:
    """Return the names of what a fingerprint leaves out: what is trained, under the names of tied weights, too."""
    thawed = {n for n, p in backbone.named_parameters(remove_duplicate=False) if p.requires_grad}
    return thawed.union(delta_names(backbone))


def keep_fingerprints(module: nn.Module) -> None:
    """Let the fingerprints of backbones be computed now, before their weights are rounded, replaced or sharded."""
    for _, backbone, _ in tunings(module):
        if not any(p.is_meta for p in backbone.parameters()):
            fingerprint_of(backbone, not_frozen(backbone))


def metadata(module: nn.Module) -> dict[str, Any]:
    """Return what a delta file says of itself, primitives only: methods, backbones with fingerprints, versions."""
    for place in grafts(module):
        if place.graft.merged:
            raise TuningError(
                f"{place.name} is merged into the weights of {place.path}, which are not those of the backbone now: "
                "unmerge it first."
            )
    meta: dict[str, Any] = {"format": FORMAT, "versions": dict(_versions())}
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
        header = {"format": "pt", META: json.dumps(metadata(module))}
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata=header)
    return Path(path)


def load_delta(module: nn.Module, path: str | Path, allow_other_backbone: bool = False) -> None:
    """Read a delta file (safetensors or a checkpoint) into ``module``, whose methods must be those of the file.

    Everything is checked before the first tensor changes.

    Raises:
        TuningError: the file is no whole delta, or was made for another backbone, method or set of tensors.
    """
    tensors, meta = read_delta(path)
    tensors = check(module, tensors, meta, str(path), allow_other_backbone)
    state = module.state_dict()
    live = {canonical(name): state[name] for name in delta_names(module)}
    with torch.no_grad():
        for name, tensor in tensors.items():
            live[name].copy_(like(live[name], tensor))


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a delta file. Nothing in it is executed.

    Raises:
        TuningError: there is no such file, it is damaged, or it is no delta.
    """
    inside = Path(path) / IN_FOLDER
    path = inside if inside.is_file() else path
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(Path(path))
    checkpoint = read_folder(path) if is_folder(path) else read_torch(path)
    return checkpoint.get("state_dict", {}), meta_of(checkpoint, str(path))


def meta_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the metadata of a loaded checkpoint.

    Raises:
        TuningError: it is a full checkpoint, or of a format that this version does not know.
    """
    meta = checkpoint.get(META)
    if meta is None:
        count = len(checkpoint.get("state_dict", checkpoint))
        raise TuningError(
            f"{source} holds no delta but a full checkpoint ({count} tensors): "
            "turn it into one with lightning_peft.convert(module, full, delta)."
        )
    if meta.get("format") != FORMAT:
        raise TuningError(f"{source} has delta format {meta.get('format')}, this version reads {FORMAT}: update it.")
    return dict(meta)


def check(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    source: str,
    allow_other_backbone: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of a file under the names that ``module`` has for them, after checking that they fit.

    Raises:
        TuningError: other methods or arguments, another backbone, missing or unexpected tensors, other shapes.
    """
    ours = metadata(module)
    tensors, meta = _rebase(dict(tensors), dict(meta), ours)
    _check_methods(module, meta, source)
    if not allow_other_backbone:
        for path, theirs in meta["backbones"].items():
            mine = ours["backbones"].get(path)
            if mine is None or mine["fingerprint"] != theirs["fingerprint"]:
                raise TuningError(
                    f"{source} was trained on {_call(theirs)}, not on {_call(mine)} as it is here: load that backbone."
                )
    for path, backbone, tuning in tunings(module):
        start = f"{canonical(path)}." if path else ""
        below = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        for method in tuning.methods.values():
            method.expect(backbone, below)
    live = collect(module)
    if missing := sorted(live.keys() - tensors.keys()):
        raise TuningError(
            f"{source} lacks {len(missing)} of {len(live)} tensors of the delta, e.g. {missing[0]}: "
            "it was saved by another version of this module, or is not whole."
        )
    if unexpected := sorted(tensors.keys() - live.keys()):
        raise TuningError(
            f"{source} has {len(unexpected)} tensors that this module does not train, e.g. {unexpected[0]}"
            f"{near(unexpected[0], live)}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != live[name].shape:
            raise TuningError(
                f"{source} has {name} of shape {list(tensor.shape)}, this module of {list(live[name].shape)}: "
                f"build it as it was saved, {_describe(meta)}."
            )
    return tensors


def complete(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a full state dict: the delta, and references to the live frozen tensors, so that strict loading passes."""
    state = dict(module.state_dict())
    return {name: tensors.get(canonical(name), live) for name, live in state.items()}


def convert(module: nn.Module, full: str | Path, delta: str | Path) -> Path:
    """Turn a full checkpoint of ``module`` (method applied, as when it was written) into a delta file.

    Raises:
        TuningError: the file lacks a tensor of the delta, or its frozen tensors are not those of ``module``.
    """
    checkpoint = read_torch(full)
    tensors = checkpoint.get("state_dict", checkpoint)
    state, names = module.state_dict(), set(delta_names(module))
    for name, live in state.items():
        if name not in tensors:
            raise TuningError(f"{full} lacks {name}{near(name, tensors)}: give the module that it is a checkpoint of.")
        if name not in names and not torch.equal(tensors[name].to(live), live):
            raise TuningError(
                f"{full} changed {name}, which {_methods(module)} freezes: only a tuned model is a delta."
            )
    module.load_state_dict(tensors)
    return save_delta(module, delta)


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((package, version(package)) for package in ("torch", "lightning", "transformers", "lightning-peft"))


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
    config = getattr(backbone, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    kinds = (kind.__name__ for kind in type(backbone).__mro__)
    return {
        "class": next(name for name in kinds if not name.startswith("FSDP")),  # sharding puts a class before its own
        "name_or_path": getattr(config, "_name_or_path", ""),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "config": json.loads(json.dumps(settings, default=str)),
    }


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise TuningError(f"{path} is no file: give the path of a delta.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise TuningError(f"{path} is truncated or no safetensors file ({error}): take another copy.") from None
    if META not in header:
        raise TuningError(f"{path} is a safetensors file but no delta of lightning_peft: its header lacks {META!r}.")
    return tensors, meta_of({META: json.loads(header[META])}, str(path))


def _rebase(
    tensors: dict[str, Tensor], meta: dict[str, Any], ours: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename what one backbone trained to the place that this module keeps its one backbone in."""
    if len(meta["backbones"]) != 1 or len(ours["backbones"]) != 1:
        return tensors, meta
    (old,), (new,) = meta["backbones"], ours["backbones"]
    if old == new:
        return tensors, meta
    before, after = f"{old}." if old else "", f"{new}." if new else ""
    tensors = {after + n.removeprefix(before) if n.startswith(before) else n: t for n, t in tensors.items()}
    methods = [method | {"backbone": new} for method in meta["methods"]]
    return tensors, meta | {"backbones": {new: meta["backbones"][old]}, "methods": methods}


def _check_methods(module: nn.Module, meta: Mapping[str, Any], source: str) -> None:
    applied = {
        (canonical(path), f"{type(m).__module__}.{type(m).__qualname__}"): m
        for path, _, tuning in tunings(module)
        for m in tuning.methods.values()
    }
    saved = {(m["backbone"], m["class_path"]): m["init_args"] for m in meta["methods"]}
    if applied.keys() != saved.keys():
        here = _methods(module) or "no method"
        raise TuningError(f"{source} was trained with {_describe(meta)}, but {here} is applied here: apply the same.")
    for key, init_args in saved.items():
        method, now = applied[key], applied[key].init_args()
        for name in sorted(init_args.keys() & now.keys() - method.may_change):
            if _plain(init_args[name]) != _plain(now[name]):
                raise TuningError(
                    f"{source} was trained with {name}={init_args[name]!r} of {type(method).__name__}, "
                    f"which is {now[name]!r} here: give it the same value."
                )


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back, so that a tuple is a list."""
    return json.loads(json.dumps(value))


def _methods(module: nn.Module) -> str:
    return " + ".join(type(m).__name__ for _, _, tuning in tunings(module) for m in tuning.methods.values())


def _describe(meta: Mapping[str, Any]) -> str:
    return " + ".join(m["class_path"].rpartition(".")[2] for m in meta["methods"])


def _call(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "no tuned backbone"
    name = f" {identity['name_or_path']!r}" if identity["name_or_path"] else ""
    return f"{identity['class']}{name} ({identity['parameters']:,} parameters, {identity['fingerprint'][:12]})"
