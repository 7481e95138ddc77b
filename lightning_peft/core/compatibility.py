"""Checks that the methods on one backbone do not keep each other from training, or break what another relies on."""

from itertools import permutations

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import grafts
from lightning_peft.core.tuning import Tuning

GRADIENTS = "gradients in its blocks"
LENGTH = "sequences that keep their length"
TOKENS = "the ids of virtual tokens for itself"
FEATURES = "the features of the last block for itself"


def check_compatible(backbone: nn.Module, tuning: Tuning) -> None:
    """Check that the methods of a backbone work together.

    Raises:
        TuningError: one breaks what another needs, or hides a tensor that the other trains.
    """
    for one, other in permutations(tuning.methods.values(), 2):
        if lost := sorted(one.needs & other.breaks):
            raise TuningError(
                f"{type(one).__name__} needs {lost[0]}, which {type(other).__name__} does not leave to the "
                f"{type(backbone).__name__}: apply one of the two, or each to a backbone of its own."
            )
    trained = tuning.trained_in_place()
    for path, _, name, graft in grafts(backbone):
        prefix = f"{path}." if path else ""
        if hidden := sorted(trained & {f"{prefix}{weight}" for weight in graft.weights}):
            trainer = next(n for n, names in tuning.trains.items() if hidden[0] in names)
            raise TuningError(
                f"{hidden[0]} is trained by {trainer}, but {graft.owner or name} puts another tensor in its place, so "
                "it would get no gradient: let one of the two leave it out, e.g. with exclude=."
            )
