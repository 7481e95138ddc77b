"""PromptSRC: prompts in both towers as `IVLP`, kept near the frozen model by three penalties, and averaged over epochs.

With t, i the normalised features of the texts and images with prompts and t', i' those of the frozen model, t' of the
mean over several written texts of a class, the loss gains ``25 mean|t - t'| + 10 mean|i - i'| + KL(p' ‖ p) / C``, p and
p' being the softmaxes of the logits, KL a mean over the images. What is kept at the end is the average of the prompts
after each epoch, weighted by a Gaussian over the epochs.

Source: Khattak et al. 2023, arXiv 2307.06948, section 3, and its released code, whose factors these are, and whose 60
templates can be given as `words` as far as the name stands at their end, which all but two have. There the Gaussian is
(15, 1) over 20 epochs from base to new classes, as the defaults give; (30, 30) or (45, 5) over 50 with few images; and
(6, 10) over 20, with ``depth=3``, for other data sets. The average is written at the end of the last epoch, after its
validation: a checkpoint to keep is one of ``save_on_train_epoch_end=True``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.averaged import AveragedMethod
from lightning_peft.core import structure
from lightning_peft.core.arguments import bounded
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.rates import Rates
from lightning_peft.methods.ivlp import IVLP
from lightning_peft.towers.clip import similarity
from lightning_peft.towers.compared_towers import Compared, Features
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import TextContext
from lightning_peft.towers.deep_prompts import Prompts, vision_tower
from lightning_peft.towers.text_towers import text_tower, two_towers, written_ids
from lightning_peft.training.mixin import TunedBy

WRITTEN = ("a photo of a", "a photo of the", "a picture of a", "a good photo of a", "a bright photo of the")


@dataclass(eq=False, kw_only=True)
class PromptSRC(AveragedMethod, IVLP):
    """Train prompts in both towers of CLIP or SigLIP that stay near the frozen model.

    Args:
        words: what written texts of a class have before its name, each as words or as the ids of its tokens.
        text_pull: weight of the distance of the features of texts.
        image_pull: weight of the distance of the features of images.
        logit_pull: weight of the divergence of the logits.
    """

    words: list[str | list[int]] = field(default_factory=lambda: list(WRITTEN))
    text_pull: float = bounded(25.0, at_least=0)
    image_pull: float = bounded(10.0, at_least=0)
    logit_pull: float = bounded(1.0, at_least=0)

    trains: ClassVar[str] = "independent prompts in the layers of both towers, kept near the frozen model"
    paper: ClassVar[str] = "Khattak et al. 2023, arXiv 2307.06948"
    advised: ClassVar[Rates] = Rates(2.5e-3, 1e-2, "the authors' code", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = (
        IVLP.may_change | AveragedMethod.may_change | {"words", "text_pull", "image_pull", "logit_pull"}
    )

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts, and what compares each tower with the frozen one."""
        own = list(super().graft(backbone))
        model, call, features = two_towers(backbone), self.averaged(backbone).call, Features()
        texts, images = text_tower(backbone, type(self).__name__), vision_tower(backbone, type(self).__name__)
        device = next(texts.parameters()).device
        self.words = list(self._ids(backbone))
        written = [
            TextContext(torch.tensor(ids, device=device).view(1, 1, -1), ContextCall(), share_prefix=self.share_prefix)
            for ids in self._ids(backbone)
        ]
        compared = Compared(call, features, written, structure.part(model, "text_projection"))
        attach(texts, compared, f"{self.key}_compared")
        compared = Compared(call, features, [], structure.part(model, "visual_projection"))
        attach(images, compared, f"{self.key}_compared")
        return own

    def penalty(self, module: nn.Module) -> Tensor | None:
        """Return the penalties of the last batch; None where nothing has been computed since."""
        found = self.own_grafts(module, Compared)
        features, model = found[0].graft.features, two_towers(self._tuned(module))
        texts, images = features.texts, features.images
        features.texts = features.images = None
        if texts is None or images is None:
            return None
        ours, theirs = (similarity(model, images[i], texts[i]).log_softmax(1) for i in range(2))
        divergence = F.kl_div(ours, theirs, reduction="sum", log_target=True) / ours.numel()
        distances = self.text_pull * F.l1_loss(*texts) + self.image_pull * F.l1_loss(*images)
        return distances + self.logit_pull * divergence

    def averaged(self, module: nn.Module) -> Prompts:
        """Return the rows of all layers."""
        model = two_towers(self._tuned(module))
        return next(child for child in model.children() if isinstance(child, Prompts) and child.owner == self.key)

    def _ids(self, backbone: nn.Module) -> list[list[int]]:
        if not self.words:
            raise TuningError("words=[] makes no written text to stay near: give words before the name of a class.")
        found = [written_ids(backbone, each, self.tokenizer) for each in self.words]
        for each in found:
            if not each or min(each) < 0:
                raise TuningError(f"words={each!r} are neither words nor the ids of their tokens: give one of them.")
        return found


PromptSRCMixin = TunedBy[PromptSRC]
