"""Full fine-tuning: every parameter of the backbone is trained. The baseline, with the interface of the methods.

Source: Devlin et al. 2019, arXiv 1810.04805, section 3.2. Its delta is the whole model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_peft.core.errors import TuningError
from lightning_peft.core.rates import EVERYTHING, Rates
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class FullFineTuning(Method):
    """Train everything.

    Args:
        backbone_mode: whether dropout of the backbone is active in training.
        keep_fp32: False, since fp32 copies of everything are what ``precision='bf16-mixed'`` is.
    """

    backbone_mode: Literal["train", "eval"] = "train"
    keep_fp32: bool = False

    kind: ClassVar[str] = "all"
    trains: ClassVar[str] = "every parameter: the baseline"
    paper: ClassVar[str] = "Devlin et al. 2019, arXiv 1810.04805"
    advised: ClassVar[Rates] = EVERYTHING
    keeps_originals: ClassVar[bool] = False

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Return the names of all parameters."""
        if self.keep_fp32:
            raise TuningError(
                "keep_fp32=True is for methods that train little: give FullFineTuning an fp32 backbone and the Trainer "
                "precision='bf16-mixed'."
            )
        return [name for name, p in backbone.named_parameters() if p.is_floating_point()]


FullFineTuningMixin = TunedBy[FullFineTuning]
