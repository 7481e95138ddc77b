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

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.arguments import bounded, positive
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.rates import Rates
from lightning_peft.core.sharded import like, whole
from lightning_peft.methods.ivlp import IVLP
from lightning_peft.towers.clip import similarity
from lightning_peft.towers.context_tokens import ContextCall
from lightning_peft.towers.contexts import TextContext
from lightning_peft.towers.deep_prompts import Prompts, vision_tower
from lightning_peft.towers.text_towers import ids_of, text_tower, two_towers
from lightning_peft.training.mixin import TunedBy

WRITTEN = ("a photo of a", "a photo of the", "a picture of a", "a good photo of a", "a bright photo of the")


class Features:
    """The features of the last call with gradients, and those of the frozen model, until the penalty takes them.

    Attributes:
        texts: [C, p] each.
        images: [B, p] each.
    """

    def __init__(self) -> None:
        self.texts: tuple[Tensor, Tensor] | None = None
        self.images: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: no tensor of the last call."""
        return {"texts": None, "images": None}


class Compared(Graft):
    """Runs a tower with its prompts and, with gradients, without them, on written texts or the same images.

    Args:
        call: of the prompts.
        features: where to note what comes out.
        written: put words before the names in the texts; none: the tower is that of the images.
        projection: what the tower's output goes through; None: nothing.
    """

    projection: nn.Module | None

    def __init__(
        self, call: ContextCall, features: Features, written: list[TextContext], projection: nn.Module | None
    ) -> None:
        super().__init__()
        self.call, self.features = call, features
        vars(self)["written"] = written  # no parts of the model: they put in words that it has
        self.refer(projection=projection)

    written: list[TextContext]

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the tower's output with prompts."""
        out = forward(*args, **kwargs)
        if not self.call.active or not torch.is_grad_enabled():
            return out
        with torch.no_grad(), _without(self.call):
            if self.written:
                frozen = [self._feature(each.around(forward, host, *args, **kwargs)) for each in self.written]
                frozen_feature = torch.stack(frozen).mean(0)
            else:
                frozen_feature = self._feature(forward(*args, **kwargs))
        both = F.normalize(self._feature(out).float(), dim=-1), F.normalize(frozen_feature.float(), dim=-1)
        if self.written:
            self.features.texts = both
        else:
            self.features.images = both
        return out

    def _feature(self, out: Any) -> Tensor:
        pooled: Tensor = out.pooler_output
        return pooled if self.projection is None else self.projection(pooled)


@contextmanager
def _without(call: ContextCall) -> Iterator[None]:
    call.active = False
    try:
        yield
    finally:
        call.active = True


@dataclass(eq=False, kw_only=True)
class PromptSRC(IVLP):
    """Train prompts in both towers of CLIP or SigLIP that stay near the frozen model.

    Args:
        words: what written texts of a class have before its name, each as words or as the ids of its tokens.
        text_pull: weight of the distance of the features of texts.
        image_pull: weight of the distance of the features of images.
        logit_pull: weight of the divergence of the logits.
        mean_epoch: middle of the Gaussian that weights the epochs, counted from 1; None: three quarters of them.
        std_epochs: its standard deviation [epochs].
    """

    words: list[str | list[int]] = field(default_factory=lambda: list(WRITTEN))
    text_pull: float = bounded(25.0, at_least=0)
    image_pull: float = bounded(10.0, at_least=0)
    logit_pull: float = bounded(1.0, at_least=0)
    mean_epoch: float | None = positive(None)
    std_epochs: float = positive(1.0)

    trains: ClassVar[str] = "independent prompts in the layers of both towers, kept near the frozen model"
    paper: ClassVar[str] = "Khattak et al. 2023, arXiv 2307.06948"
    advised: ClassVar[Rates] = Rates(2.5e-3, 1e-2, "the authors' code, for SGD")
    may_change: ClassVar[frozenset[str]] = IVLP.may_change | {
        *("words", "text_pull", "image_pull", "logit_pull", "mean_epoch", "std_epochs"),
    }

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompts, and what compares each tower with the frozen one."""
        own = list(super().graft(backbone))
        model, call, features = two_towers(backbone), self._prompts(backbone).call, Features()
        texts, images = text_tower(backbone, type(self).__name__), vision_tower(backbone, type(self).__name__)
        device = next(texts.parameters()).device
        self.words = list(self._ids(backbone))  # which a file has, so that nobody needs a tokenizer to load it
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

    def weights_of_epochs(self, epochs: int) -> list[float]:
        """Return the weight of the prompts after each epoch; they add up to 1.

        Raises:
            TuningError: the Gaussian is nowhere near these epochs, or their number has no limit.
        """
        if epochs < 1:
            raise TuningError("prompts are averaged over the epochs, and their number has no limit: set max_epochs.")
        mean = 0.75 * epochs if self.mean_epoch is None else self.mean_epoch
        weights = [math.exp(-0.5 * ((e - mean) / self.std_epochs) ** 2) for e in range(1, epochs + 1)]
        if sum(weights) < 1e-6:
            raise TuningError(f"mean_epoch={mean:g} is far from the {epochs} epochs of the run: take one of them.")
        return [weight / sum(weights) for weight in weights]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the epochs can be weighted, and begin with none."""
        super().on_fit_start(trainer, pl_module)
        self._weights = self.weights_of_epochs(trainer.max_epochs or 0)
        if trainer.current_epoch == 0:
            self._sums: dict[str, Tensor] = {}
            self._summed = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the prompts after the epoch before to the average."""
        super().on_train_epoch_start(trainer, pl_module)
        self._sum(pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the average after the last epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch + 1 == len(self._weights):
            self._sum(pl_module, len(self._weights))
            with torch.no_grad():
                for name, parameter in self._prompts(pl_module).named_parameters():
                    parameter.copy_(self._sums[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average so far, for a run that resumes."""
        sums = {name: whole(each) for name, each in vars(self).get("_sums", {}).items()}
        return {"sums": sums, "summed": vars(self).get("_summed", 0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the average of a run that resumes."""
        self._sums, self._summed = dict(state_dict["sums"]), state_dict["summed"]

    @torch.no_grad()
    def _sum(self, module: nn.Module, epoch: int) -> None:
        """Add the prompts after this many epochs, unless they have been added."""
        if epoch <= self._summed:
            return
        for name, parameter in self._prompts(module).named_parameters():
            part = self._weights[epoch - 1] * parameter.detach()
            self._sums[name] = part if name not in self._sums else part + like(part, self._sums[name].to(part.device))
        self._summed = epoch

    def _prompts(self, module: nn.Module) -> Prompts:
        """Return the rows of all layers."""
        model = two_towers(self._tuned(module))
        return next(child for child in model.children() if isinstance(child, Prompts) and child.owner == self.key)

    def _ids(self, backbone: nn.Module) -> list[list[int]]:
        if not self.words:
            raise TuningError("words=[] makes no written text to stay near: give words before the name of a class.")
        found = []
        for each in self.words:
            if isinstance(each, str):
                each = ids_of(tokenizer_of(backbone, self.tokenizer, f"words={each!r}"), each)
            if not each or min(each) < 0:
                raise TuningError(f"words={each!r} are neither words nor the ids of their tokens: give one of them.")
            found.append(each)
        return found


PromptSRCMixin = TunedBy[PromptSRC]
