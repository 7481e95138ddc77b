"""Folding what methods have added into the weights of the backbone."""

from collections import Counter

from torch import nn

from lightning_peft.errors import TuningError
from lightning_peft.graft import Grafted, detach, grafts
from lightning_peft.precision import MasterWeights
from lightning_peft.tuning import tunings


def merge(module: nn.Module) -> nn.Module:
    """Fold the grafts of ``module`` into the weights and forget them; what was trained in place stays as trained.

    Raises:
        TuningError: a graft cannot be folded; nothing has been changed then.
    """
    masters = [place for place in grafts(module) if isinstance(place.graft, MasterWeights)]
    for place in [*foldable(module), *masters]:
        place.graft.merge(place.host)  # type: ignore[operator]
        detach(place.host, place.name)
    for _, backbone, tuning in list(tunings(module)):
        tuning.end(backbone)
    return module


def foldable(module: nn.Module) -> list[Grafted]:
    """Return the grafts of ``module`` that methods have put there, all of which can be folded into the weights.

    Raises:
        TuningError: one cannot, or its host's weight is tied to that of another module.
    """
    places = [place for place in grafts(module) if not isinstance(place.graft, MasterWeights)]
    owners = Counter(id(p) for child in module.modules() for p in child.parameters(recurse=False))
    for place in places:
        if not hasattr(place.graft, "merge"):
            raise TuningError(
                f"{type(place.graft).__name__} at {place.path or 'the root'} computes what no weight can, so it cannot "
                "be merged: keep the delta beside the backbone."
            )
        if any(owners[id(p)] > 1 for p in place.host.parameters(recurse=False)):
            raise TuningError(
                f"the weight of {place.path} is tied to that of another module, which would change with it: "
                "keep the delta beside the backbone."
            )
    return places
