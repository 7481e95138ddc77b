"""Linear probing: the backbone is frozen and the task head is trained on its features.

Source: Alain and Bengio 2016, arXiv 1610.01644; as a baseline of tuning: He et al. 2020, arXiv 1911.05722, section 4.1.
No gradient is recorded below the head, so a step costs one forward pass of the backbone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.errors import TuningError
from lightning_peft.method import Method
from lightning_peft.mixin import MethodMixin


@dataclass(eq=False, kw_only=True)
class LinearProbe(Method):
    """Train the head alone: ``logits = W f(x) + b`` with f frozen."""

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "the task head"
    paper: ClassVar[str] = "Alain and Bengio 2016, arXiv 1610.01644"

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Add nothing: the head is trained beside every method, here it stands alone."""
        lm_head = getattr(backbone, "get_output_embeddings", lambda: None)
        if lm_head() is not None and self.also_train is None:
            raise TuningError(
                f"{type(backbone).__name__} has no task head but that of a language model: take a classifier, or name "
                "what to train with also_train= (a regex)."
            )
        return ()


class LinearProbeMixin(MethodMixin):
    """For a LightningModule whose head alone is trained."""

    default_method = LinearProbe
