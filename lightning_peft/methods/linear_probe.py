"""Linear probing: the backbone is frozen and the task head is trained on its features.

``y = W f(x) + b`` with f frozen.

Source: Alain and Bengio 2016, arXiv 1610.01644; as a baseline of tuning: He et al. 2020, arXiv 1911.05722, section 4.1.
With ``batch_norm`` the features pass a BatchNorm without trained parameters first, as in the probes of MAE (He et al.
2022, arXiv 2111.06377; code: facebookresearch/mae ``main_linprobe.py``); its statistics are part of the delta.
No gradient is recorded below the head, so a step costs one forward pass of the backbone; with ``cache_features`` the
backbone runs once for each row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.bases.caching import CachingMethod
from lightning_peft.core import anatomy
from lightning_peft.core.arguments import choice
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.features import heads
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class LinearProbe(CachingMethod):
    """Train the head alone: ``logits = W f(x) + b`` with f frozen.

    Args:
        batch_norm: norm the features by the statistics of the batch in training, by their running means later.
        head_init: initial values of the layer that gives the logits: 'model' (as they are), 'vpt', 'mae' or 'zero'.
        cache_features: run the frozen part once for each row and train on what it gave; for data without augmentation.
        cache_limit: most memory to take for that [GiB].
    """

    batch_norm: bool = False
    head_init: heads.HeadInit = choice("model", "is no initial value of a head")

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "the task head"
    paper: ClassVar[str] = "Alain and Bengio 2016, arXiv 1610.01644"
    advised: ClassVar[Rates] = Rates(1e-2, 1e-1, MEASURED)
    needs: ClassVar[frozenset[str]] = frozenset()
    may_change: ClassVar[frozenset[str]] = CachingMethod.may_change | {"head_init"}

    def apply(self, model: nn.Module) -> None:
        """Freeze the backbone and give the head its initial values.

        Raises:
            TuningError: neither the backbone nor ``model`` around it has anything to train.
        """
        super().apply(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            kind = type(self._tuned(model)).__name__
            self.remove(model)
            raise TuningError(
                f"{kind} has no head to train: take a classifier, give the module with the head as backbone=, or name "
                "what to train with also_train= (a regex)."
            )
        if self.head_init != "model":
            heads.initialise(heads.last_linear(self._tuned(model), "LinearProbe")[1], self.head_init)

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Add nothing, or a BatchNorm before the head, which every method trains."""
        if anatomy.is_language_model(backbone) and self.also_train is None:
            raise TuningError(
                f"{type(backbone).__name__} has no task head but that of a language model: take a classifier, or name "
                "what to train with also_train= (a regex)."
            )
        if self.batch_norm or self.head_init != "model":
            heads.last_linear(backbone, f"batch_norm={self.batch_norm}, head_init={self.head_init!r}")
        self.cache(backbone)
        if self.batch_norm:
            first = next(iter(heads.head_linears(backbone).values()))
            attach(first, heads.HeadNorm(first), self.key)
        return ()


LinearProbeMixin = TunedBy[LinearProbe]
