"""Checks that the methods on one backbone do not keep each other from training, or break what another relies on."""

from collections.abc import Collection
from itertools import permutations
from typing import TYPE_CHECKING

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, grafts, overrides
from lightning_peft.core.master_weights import MasterWeights
from lightning_peft.core.stand_in import StandIn
from lightning_peft.core.tuning import Tuning

if TYPE_CHECKING:
    from lightning_peft.core.method import TuningMethod

GRADIENTS = "gradients in its blocks"
LENGTH = "sequences that keep their length"
TOKENS = "the ids of virtual tokens for itself"
FEATURES = "the features of the last block for itself"


def check_compatible(backbone: nn.Module, tuning: Tuning, off: Collection[str] = ()) -> None:
    """Check that the methods of a backbone work together, those that rest left out.

    Raises:
        TuningError: one breaks what another needs, or hides a tensor that the other trains.
    """
    active = {key: method for key, method in tuning.methods.items() if key not in off}
    for one, other in permutations(active.values(), 2):
        if lost := sorted(one.needs & other.breaks):
            raise TuningError(
                f"{type(one).__name__} needs {lost[0]}, which {type(other).__name__} does not leave to the "
                f"{type(backbone).__name__}: apply one of the two, or each to a backbone of its own{_or_switch(one)}."
            )
    trainers = {name: key for key, names in tuning.trains.items() if key in active for name in names}
    for place in grafts(backbone):
        if place.graft.owner in off:
            continue
        if isinstance(place.graft, StandIn):
            for name in place.graft.of.values():
                trainer = trainers.setdefault(name, place.graft.owner)
                if trainer != place.graft.owner:
                    _refuse_both(name, active[trainer], active[place.graft.owner])
    for path, _, name, graft in grafts(backbone):
        prefix = f"{path}." if path else ""
        hidden = sorted(trainers.keys() & {f"{prefix}{weight}" for weight in (*graft.weights, *graft.hides)})
        if hidden and not isinstance(graft, (StandIn, MasterWeights)) and graft.owner not in off:
            raise TuningError(
                f"{hidden[0]} is trained by {trainers[hidden[0]]}, but {graft.owner or name} puts another tensor in "
                "its place, so it would get no gradient: let one of the two leave it out, e.g. with exclude=."
            )
    _check_first(backbone, off)


def _check_first(backbone: nn.Module, off: Collection[str]) -> None:
    for place in grafts(backbone):
        if not place.graft.comes_first or place.graft.owner in off:
            continue
        for other in place.host.children():
            if other is place.graft:
                break
            if isinstance(other, Graft) and overrides(other, "after") and other.owner not in off:
                raise TuningError(
                    f"{other.owner} already changes the output of {place.path}, and {place.graft.owner} computes "
                    "from the weight of the layer alone: apply it first, or activate one of the two."
                )


def _refuse_both(name: str, one: "TuningMethod", other: "TuningMethod") -> None:
    raise TuningError(
        f"{one.delta} and {other.delta} both bring {name} of their own, of which one can be at work: activate one of "
        f"the two, as activate(model, {one.delta!r}), and neither by activate(model) before another is added."
    )


def _or_switch(method: "TuningMethod") -> str:
    return "" if method.name is None else f", or activate(model, {method.delta!r}) alone"
