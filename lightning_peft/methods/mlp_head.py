"""A head of k linear layers on frozen features: k - 1 times [Linear(d, d), ReLU, BatchNorm, Dropout], then Linear.

Source: the baseline MLP-k of Jia et al. 2022, arXiv 2203.12119 (VPT), whose code has ReLU before BatchNorm and, for
MLP-3, ``MLP_NUM 2``. The last layer is the one that the model has; its initial values stay unless ``head_init`` says
otherwise. New weights are Kaiming-normal over the outputs with zero biases. The statistics of the BatchNorms are part
of the delta. A model whose own head has several layers keeps them: the new ones come before the last.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.caching import CachingMethod
from lightning_peft.core.arguments import choice, natural, rate
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.features import heads
from lightning_peft.training.mixin import TunedBy


class HiddenLayers(Graft):
    """Puts ``count`` layers before the layer that gives the logits.

    Args:
        host: the layer that gives the logits.
        count: how many layers.
        dropout: rate of the dropout after each.
    """

    def __init__(self, host: nn.Linear, count: int, dropout: float) -> None:
        super().__init__()
        d = host.in_features
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(d, d, device=device_of(host)) for _ in range(count)).float()
        self.norms = nn.ModuleList(heads.RowNorm(d, device=device_of(host)) for _ in range(count)).float()
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def before(self, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features after the new layers, of the shape and dtype of ``x``, [..., d]."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            weight, bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
            x = F.dropout(norm(F.relu(F.linear(x, weight, bias))), self.dropout, self.training).to(x.dtype)  # type: ignore[arg-type]
        return x


@dataclass(eq=False, kw_only=True)
class MLPHead(CachingMethod):
    """Train a head of k linear layers, the backbone being frozen.

    Args:
        k: number of linear layers, the last one included; 1 is linear probing.
        dropout: rate of the dropout after each of the first k - 1.
        head_init: initial values of the layer that gives the logits: 'model' (as they are), 'vpt', 'mae' or 'zero'.
        cache_features: run the frozen part once for each row and train on what it gave; for data without augmentation.
        cache_limit: most memory to take for that [GiB].
    """

    k: int = natural(3, "is no number of linear layers")
    dropout: float = rate(0.1, "is no rate")
    head_init: heads.HeadInit = choice("model", "is no initial value of a head")

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "a head of k linear layers"
    paper: ClassVar[str] = "Jia et al. 2022, arXiv 2203.12119"
    advised: ClassVar[Rates] = Rates(1e-2, 3e-3, MEASURED)
    needs: ClassVar[frozenset[str]] = frozenset()
    may_change: ClassVar[frozenset[str]] = CachingMethod.may_change | {"head_init", "dropout"}

    def apply(self, model: nn.Module) -> None:
        """Freeze the backbone, add the layers and give the last one its initial values."""
        super().apply(model)
        if self.head_init != "model":
            heads.initialise(heads.last_linear(self._tuned(model), "MLPHead")[1], self.head_init)

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the layers to the one that gives the logits."""
        _, host = heads.last_linear(backbone, "MLPHead")
        self.cache(backbone)
        if self.k > 1:
            attach(host, HiddenLayers(host, self.k - 1, self.dropout), self.key)
        return ()


MLPHeadMixin = TunedBy[MLPHead]
