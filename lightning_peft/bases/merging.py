"""Methods whose grafts can be merged into the weights, as for inference, and unmerged again."""

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.folding import Folding, foldable
from lightning_peft.core.graft import Grafted, grafts
from lightning_peft.training.method import Method


class MergingMethod(Method):
    """A method with `merge` and `unmerge`; its grafts are of the kind `Folding`."""

    def merge(self, model: nn.Module) -> float:
        """Merge what was trained into the weights and switch the grafts off, as for inference.

        A copy of the weights is kept, with which `unmerge` gives them back bit for bit; `lightning_peft.merge` keeps
        none. While merged, nothing can be trained or saved.

        Returns:
            The greatest rounding error of a weight as a share of its update: 0 in fp32, percents in bf16.

        Raises:
            TuningError: a weight is quantised, tied to that of another module, or changed by another method too.
        """
        return max(place.graft.merge(place.host, keep=True) for place in self._places(model))

    def unmerge(self, model: nn.Module) -> None:
        """Give the weights the values that they had before `merge`, bit for bit, and switch the grafts on again."""
        for place in self.own_grafts(model, Folding):
            place.graft.unmerge(place.host)

    def remove(self, model: nn.Module) -> None:
        """Give the backbone back as it was before `apply`, merged or not."""
        if self.is_applied(model):
            self.unmerge(model)
        super().remove(model)

    def _places(self, model: nn.Module) -> list[Grafted[Folding]]:
        own = self.own_grafts(model, Folding)
        hosts = {id(place.host): place.path for place in own}
        for place in grafts(self._tuned(model)):
            if id(place.host) in hosts and place.graft.owner not in (self.key, ""):
                raise TuningError(
                    f"{place.graft.owner} changes {place.path} as {type(self).__name__} does: fold both for good with "
                    "lightning_peft.merge."
                )
        foldable(self._tuned(model), owner=self.key)
        return own
