"""Checks that the delta of a file fits a module: its methods, its backbone, its tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.delta import collect, metadata
from lightning_peft.core.delta_file import plain
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import same_weights
from lightning_peft.core.run import ATTRIBUTE, Run, below_backbones, canonical, own_tunings, run_of
from lightning_peft.core.select import near


def fitted(
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
        check_backbones(meta["backbones"], ours["backbones"], source)
    for path, backbone, tuning in own_tunings(module):
        start = f"{canonical(path)}." if path else ""
        below = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        for method in tuning.methods.values():
            method.expect(backbone, below)
    state = {canonical(name): tensor for name, tensor in module.state_dict().items()}
    live = collect(module)
    others = _check_names(module, tensors, live, state, meta, source)
    _check_forms(tensors, state, meta, source)
    parameters = {canonical(name) for name, _ in module.named_parameters()}
    if broken := [n for n, t in tensors.items() if n in parameters and not t.isfinite().all()]:
        raise TuningError(f"{source} has NaN or infinity in {broken[0]}: its run diverged, so take an earlier file.")
    if others:  # they are of the delta from now on
        run = run_of(module) or vars(module).setdefault(ATTRIBUTE, Run())
        run.outside |= others
    return tensors


def method_names(module: nn.Module) -> str:
    """Return the classes of the methods that are applied to the backbones in ``module``, for a sentence."""
    return " + ".join(type(m).__name__ for _, _, tuning in own_tunings(module) for m in tuning.methods.values())


def check_backbones(saved: Mapping[str, Any], here: Mapping[str, Any], source: str) -> None:
    """Check that the backbones of a file are those of a module, by the metadata of both.

    Raises:
        TuningError: one is another.
    """
    for path, theirs in saved.items():
        mine = here.get(path)
        if mine is None or not same_weights(mine["fingerprint"], theirs["fingerprint"]):
            raise TuningError(
                f"{source} was trained on {_call(theirs)}, not on {_call(mine)} as it is here: load that backbone."
            )


def _check_names(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    source: str,
) -> set[str]:
    """Check that a file has the tensors of the delta; return what else it has, outside of backbones, that had moved.

    What the file's run has neither trained nor moved is as it was built: the module may train it, and the file lack it.
    """
    run, below = run_of(module), below_backbones(module)
    moved = run.outside if run is not None else set()
    if missing := sorted(live.keys() - tensors.keys() - (set(meta["left_out"]) - moved)):
        raise TuningError(
            f"{source} lacks {len(missing)} of {len(live)} tensors of the delta, e.g. {missing[0]}: "
            "it was saved by another version of this module, or is not whole."
        )
    others = {name for name in tensors.keys() - live.keys() if name in state and not below(name)}
    if unexpected := sorted(tensors.keys() - live.keys() - others):
        raise TuningError(
            f"{source} has {len(unexpected)} tensors that this module does not train, e.g. {unexpected[0]}"
            f"{near(unexpected[0], live)}."
        )
    return others


def _check_forms(
    tensors: Mapping[str, Tensor], live: Mapping[str, Tensor], meta: Mapping[str, Any], source: str
) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != live[name].shape:
            raise TuningError(
                f"{source} has {name} of shape {list(tensor.shape)}, this module of {list(live[name].shape)}: "
                f"build it as it was saved, {_describe(meta)}."
            )
        if tensor.is_floating_point() != live[name].is_floating_point():
            raise TuningError(
                f"{source} has {name} in {tensor.dtype}, this module in {live[name].dtype}: build it as it was saved."
            )


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
        (canonical(path), f"{type(m).__module__}.{type(m).__qualname__}", m.name): m
        for path, _, tuning in own_tunings(module)
        for m in tuning.methods.values()
    }
    saved = {(m["backbone"], m["class_path"], m["init_args"].get("name")): m["init_args"] for m in meta["methods"]}
    if applied.keys() != saved.keys():
        here = method_names(module) or "no method"
        raise TuningError(f"{source} was trained with {_describe(meta)}, but {here} is applied here: apply the same.")
    for key, init_args in saved.items():
        method, now = applied[key], applied[key].init_args()
        for name in sorted(init_args.keys() & now.keys() - method.may_change):
            if plain(init_args[name]) != plain(now[name]):
                raise TuningError(
                    f"{source} was trained with {name}={init_args[name]!r} of {type(method).__name__}, "
                    f"which is {now[name]!r} here: give it the same value."
                )


def _describe(meta: Mapping[str, Any]) -> str:
    return " + ".join(m["class_path"].rpartition(".")[2] for m in meta["methods"])


def _call(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return "no tuned backbone"
    name = f" {identity['name_or_path']!r}" if identity["name_or_path"] else ""
    weights = identity["fingerprint"].partition(":")[2][:12]
    return f"{identity['class']}{name} ({identity['parameters']:,} parameters, {weights})"
