"""CLIP-Adapter: a bottleneck on the features of images, or of texts, blended with the features: ``a A(f) + (1 - a) f``.

``A(f) = ReLU(W2 ReLU(W1 f))`` with W1 [p / 4, p] and W2 [p, p / 4]; both towers are frozen, so that the features of the
images can be computed once (``cache_image_features`` of the task).

Source: Gao et al. 2021, arXiv 2110.04544, section 3.2, and its released code: no biases, a = 0.2 for images. The paper
finds the image adapter alone best, which is the default; ``text_ratio`` adds one for texts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.arguments import bounded, natural
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import SHAPES, Rates
from lightning_peft.towers.clip import feature_width
from lightning_peft.towers.deep_prompts import vision_tower
from lightning_peft.towers.feature_adapters import FeatureAdapter, image_end, text_end
from lightning_peft.towers.text_towers import text_tower
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class BlendedBottleneck(FeatureAdapter):
    """Blends features with what a bottleneck makes of them.

    Args:
        width: p, of the features.
        inner: width of the bottleneck.
        ratio: a, the share of what the bottleneck gives.
        device: of the parameters.
    """

    def __init__(self, width: int, inner: int, ratio: float, device: torch.device) -> None:
        super().__init__()
        self.ratio = ratio
        self.down = nn.Linear(width, inner, bias=False, device=device, dtype=torch.float32)
        self.up = nn.Linear(inner, width, bias=False, device=device, dtype=torch.float32)

    def adapted(self, features: Tensor) -> Tensor:
        """Return ``a ReLU(W2 ReLU(W1 f)) + (1 - a) f``, [B, p]."""
        hidden = F.linear(features, self.down.weight.to(features.dtype)).relu()
        changed = F.linear(hidden, self.up.weight.to(features.dtype)).relu()
        return (self.ratio * changed + (1 - self.ratio) * features).to(features.dtype)


@dataclass(eq=False, kw_only=True)
class ClipAdapter(Method):
    """Train a bottleneck on the features of CLIP or SigLIP.

    Args:
        ratio: share of the image adapter in the features; 0: there is none.
        text_ratio: share of the text adapter; 0: there is none.
        reduction: how many times narrower the bottleneck is than the features.
    """

    ratio: float = bounded(0.2, "is no share", at_least=0, at_most=1)
    text_ratio: float = bounded(0.0, "is no share", at_least=0, at_most=1)
    reduction: int = natural(4)

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "a bottleneck on the features of CLIP or SigLIP"
    paper: ClassVar[str] = "Gao et al. 2021, arXiv 2110.04544"
    advised: ClassVar[Rates] = Rates(2e-1, 1e-2, SHAPES, optimizer="SGD")

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the bottlenecks to what gives the features."""
        text_tower(backbone, type(self).__name__)
        vision_tower(backbone, type(self).__name__)
        if not self.ratio and not self.text_ratio:
            raise TuningError("ratio=0 and text_ratio=0 leave nothing to train: give one of them a share.")
        end, width = image_end(backbone), feature_width(backbone)
        if self.reduction > width:
            raise TuningError(f"reduction={self.reduction} leaves nothing of {width} features: take {width} at most.")
        for host, ratio in ((end, self.ratio), (text_end(backbone), self.text_ratio)):
            if ratio:
                attach(host, BlendedBottleneck(width, width // self.reduction, ratio, device_of(host)), self.key)
        return ()


ClipAdapterMixin = TunedBy[ClipAdapter]
