"""Turns any change of weights into a LoRA."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import foldable, folded_values
from lightning_peft.core.run import unwrapped
from lightning_peft.core.select import backbone_of
from lightning_peft.core.stand_in import trained_parameter
from lightning_peft.core.tuning import Tuning
from lightning_peft.deltas.low_rank_sums import part_of
from lightning_peft.deltas.merging_rules import factors_of_rank
from lightning_peft.methods.lora import LoRA
from lightning_peft.updates.layout import Layout
from lightning_peft.updates.low_rank_layers import CONVOLUTIONS, GRAFTS
from lightning_peft.updates.targets import Target, all_targets


@torch.no_grad()
def to_lora(model: nn.Module, r: int, name: str | None = None) -> dict[str, float]:
    """Put a LoRA in the place of the deltas at work: the nearest update of rank r for each matrix that they change.

    Args:
        model: a backbone, or a module with one.
        r: rank of the updates.
        name: of the new delta.

    Returns:
        For each matrix, the norm of what rank r has no room for as a share of that of the change.

    Raises:
        TuningError: no delta is at work, or one changes what is no matrix: biases, or what no weight can take in;
            nothing has changed then.
    """
    if r < 1:
        raise TuningError(f"r={r} is no rank: take 1 or more.")
    backbone = backbone_of(unwrapped(model), None)
    tuning = Tuning.of(backbone)
    at_work = [] if tuning is None else [key for key in tuning.methods if key not in tuning.switch.off]
    if tuning is None or not at_work:
        raise TuningError(f"no delta is at work on this {type(backbone).__name__}: apply or activate one.")
    changed = _changed(backbone, tuning)
    heads = {n: changed[n] for n in anatomy.head_names(backbone) if n in changed}
    changes = _changes(backbone, {n: pair for n, pair in changed.items() if n not in heads})
    for key in at_work:
        tuning.undo(backbone, key)
    method = _method(changes, r, name)
    method.apply(backbone)
    for own, (_, after) in heads.items():
        path, _, leaf = own.rpartition(".")
        trained_parameter(backbone.get_submodule(path), leaf, method.key).copy_(after)
    return {own: _put(target, change, method.key) for own, (target, change) in changes.items()}


def _changes(backbone: nn.Module, changed: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Target, Tensor]]:
    """Return the matrices whose values before and after are given, by name, each with its change.

    Raises:
        TuningError: one is no matrix of a layer, or there is none.
    """
    found, _ = all_targets(backbone, tuple(GRAFTS))
    by_name = {_weight_name(backbone, target): (own, target) for own, target in found.items()}
    if other := sorted(n for n in changed if n not in by_name):
        raise TuningError(
            f"{other[0]} is no matrix of a layer, so no LoRA can take in its change: keep the delta, or merge it."
        )
    if not changed:
        raise TuningError(
            f"the deltas at work on this {type(backbone).__name__} change no matrix, so there is no LoRA of it."
        )
    return {by_name[n][0]: (by_name[n][1], after - before) for n, (before, after) in changed.items()}


def _changed(backbone: nn.Module, tuning: Tuning) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each tensor of the backbone that the deltas at work change: before and after."""
    first = {id(p): name for name, p in backbone.named_parameters()}
    parameters = dict(backbone.named_parameters())
    before = {n: t for n, t in tuning.originals.items() if isinstance(t, Tensor) and n not in tuning.parked}
    if lost := sorted(tuning.trained_in_place() - before.keys() - tuning.parked.keys()):
        raise TuningError(f"{lost[0]} was trained in place and no copy of it was kept, so its change is not known.")
    found = {n: (t.to(parameters[n].device), parameters[n].detach()) for n, t in before.items()}
    places = foldable(backbone)
    for host in dict.fromkeys(place.host for place in places):
        for leaf, after in folded_values(host, [place.graft for place in places if place.host is host]).items():
            name = first[id(host.get_parameter(leaf))]
            found[name] = (found[name][0] if name in found else host.get_parameter(leaf).detach(), after)
    return {n: pair for n, pair in found.items() if not torch.equal(pair[0].to(pair[1].dtype), pair[1])}


def _weight_name(backbone: nn.Module, target: Target) -> str:
    parameter = target.host.get_parameter(target.weight or "weight")
    return next(name for name, p in backbone.named_parameters() if p is parameter)


def _method(changes: Mapping[str, tuple[Target, Tensor]], r: int, name: str | None) -> LoRA:
    limits = {own: _limit(target, change) for own, (target, change) in changes.items()}
    small = {own: limit for own, limit in limits.items() if limit < r}
    r = min(r, max(limits.values()))
    return LoRA(
        r=r,
        alpha=float(r),
        target_modules="|".join(map(re.escape, changes)),
        rank_pattern={own: limit for own, limit in small.items() if limit != r},
        alpha_pattern={own: float(limit) for own, limit in small.items() if limit != r},
        name=name,
    )


def _limit(target: Target, change: Tensor) -> int:
    """Return the greatest rank that a LoRA may have there; of a convolution that is less than its kernel could."""
    return min(change.shape[:2] if isinstance(target.host, CONVOLUTIONS) else _matrix(target, change).shape[-2:])


def _matrix(target: Target, change: Tensor) -> Tensor:
    """Return a change as [..., out, in]; a kernel as [out, in * prod(kernel)]."""
    if target.weight is not None:
        return Layout.of(target.host, target.weight).matrix(change)
    if isinstance(target.host, CONVOLUTIONS):
        return change.flatten(1)
    return change if isinstance(target.host, nn.Linear) else change.t()


def _put(target: Target, change: Tensor, key: str) -> float:
    """Give an update the values nearest to a change; return the share of the change that is lost."""
    new, matrix = part_of(target, key), _matrix(target, change).float()
    a, b = factors_of_rank(matrix, new.rank)
    new.A.copy_(a.view(new.A.shape))
    new.B.copy_((b / new.scale).view(new.B.shape))
    return float((matrix - b @ a).norm() / matrix.norm())
