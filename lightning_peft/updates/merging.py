"""Methods whose grafts the weights can take in for a while, as for inference, and give back."""

from torch import nn

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.folding import Folding, foldable
from lightning_peft.graft import Grafted, grafts
from lightning_peft.method import Method
from lightning_peft.training.precision import MasterWeights


class MergingMethod(Method):
    """A method with `merge` and `unmerge`; its grafts are of the kind `Folding`."""

    def merge(self, model: nn.Module) -> float:
        """Put what was trained into the weights and let the grafts rest, as for inference.

        A copy of the weights is kept, with which `unmerge` gives them back bit for bit; `lightning_peft.merge` keeps
        none. While merged, nothing can be trained or saved.

        Returns:
            The greatest rounding error of a weight as a share of its update: 0 in fp32, percents in bf16.

        Raises:
            TuningError: a weight is quantised, tied to that of another module, or changed by another method too.
        """
        return max(place.graft.merge(place.host, keep=True) for place in self._places(model))  # type: ignore[operator]

    def unmerge(self, model: nn.Module) -> None:
        """Give the weights the values that they had before `merge`, bit for bit, and let the grafts work again."""
        for place in self._own(model):
            place.graft.unmerge(place.host)  # type: ignore[operator]

    def remove(self, model: nn.Module) -> None:
        """Give the backbone back as it was before `apply`, merged or not."""
        if self.is_applied(model):
            self.unmerge(model)
        super().remove(model)

    def _own(self, model: nn.Module) -> list[Grafted]:
        backbone = select.backbone_of(model, self.backbone)
        if not self.is_applied(model):
            raise TuningError(
                f"{type(self).__name__} is not applied to this {type(backbone).__name__}: apply it first."
            )
        return [place for place in grafts(backbone) if place.name == self.name and isinstance(place.graft, Folding)]

    def _places(self, model: nn.Module) -> list[Grafted]:
        own = self._own(model)
        hosts = {id(place.host): place.path for place in own}
        for place in grafts(select.backbone_of(model, self.backbone)):
            if id(place.host) in hosts and place.name != self.name and not isinstance(place.graft, MasterWeights):
                raise TuningError(
                    f"{place.name} changes {place.path} as {type(self).__name__} does: fold both for good with "
                    "lightning_peft.merge."
                )
        foldable(select.backbone_of(model, self.backbone), name=self.name)
        return own
