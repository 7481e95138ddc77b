"""Tip-Adapter: few images of each class are kept as keys, and add ``alpha exp(-beta (1 - f K^T)) V`` to the logits.

K [N, p] has the normalised features of the images, V [N, C] their classes. Without training that is all; with it
(Tip-Adapter-F) the keys are parameters, and go on from there. Both towers are frozen, so that features can be computed
once (``cache_image_features`` of the task).

Source: Zhang et al. 2021, arXiv 2111.03930, sections 3.1 and 3.2, whose alpha and beta these are. The released code
starts from others for each data set (1.17 and 1 on ImageNet) and then searches both on validation images; its keys are
means over ten augmented views of an image, and of the trained keys it takes the epoch that is best on the test images.
Here a key is one view, and both factors are arguments. The cache is filled from the training images when a fit begins
or, without training, when a data module is validated, tested or predicted, or by `fill`. It knows classes by their
numbers, and serves the classes that it was filled with alone. On the drawn shapes of docs/results.md it does not beat
CoOp: 0.778 of 16 images a class when trained, 0.753 when not, and CoOp 0.783.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.arguments import natural, positive
from lightning_peft.core.batches import entry_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.gathering import rows_in_turn
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import Rates
from lightning_peft.towers import clip
from lightning_peft.towers.deep_prompts import vision_tower
from lightning_peft.towers.shots import Shots, features_of
from lightning_peft.towers.text_towers import text_tower, two_towers
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class TipAdapter(Method):
    """Keep a few images of each class, near which others are scored higher for it; their features may be trained.

    Args:
        num_classes: how many classes there are.
        shots: how many images of each class are kept at most.
        alpha: weight of what the images add to the logits.
        beta: how fast that falls with the distance from an image.
        train_keys: train the features of the kept images (Tip-Adapter-F); without it nothing is trained.
    """

    num_classes: int = natural(10)
    shots: int = natural(16)
    alpha: float = positive(1.0, "adds nothing")
    beta: float = positive(5.5, "makes all images alike")
    train_keys: bool = True

    kind: ClassVar[str] = "head"
    trains: ClassVar[str] = "features of a few images of each class of CLIP or SigLIP, or nothing"
    paper: ClassVar[str] = "Zhang et al. 2021, arXiv 2111.03930"
    advised: ClassVar[Rates] = Rates(1e-3, 1e-2, "the authors' code, for the keys", optimizer="SGD")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"alpha", "beta"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach an empty cache to the two-tower model."""
        text_tower(backbone, type(self).__name__)
        vision_tower(backbone, type(self).__name__)
        device = device_of(backbone)
        keys = torch.zeros(self.shots * self.num_classes, clip.feature_width(backbone), device=device)
        attach(two_towers(backbone), Shots(keys, self.num_classes, self.alpha, self.beta, self.train_keys), self.key)
        return ()

    @property
    def learns(self) -> bool:
        """Whether the keys are trained."""
        return self.train_keys

    def fill(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Keep the images of batches with ``labels`` and ``pixel_values``, or ``image_features`` in their place.

        Pairs of images and labels do, too.

        Raises:
            TuningError: a label is none of the classes, or a class has more images than there is room for.
        """
        self._shots(model).keep(*self._read(model, batches))

    @torch.no_grad()
    def _read(self, model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Return the normalised features of the images, [N, p], and their labels, [N]."""
        graft, backbone = self._shots(model), self._tuned(model)
        device = graft.labels.device
        with in_eval(model):
            found = [(features_of(backbone, batch, graft).float(), entry_of(batch, "labels", 1)) for batch in batches]
        if not found:
            raise TuningError("there are no images to keep: give batches of them.")
        features, labels = (torch.cat([part.to(device) for part in each]) for each in zip(*found, strict=True))
        return F.normalize(features, dim=-1), labels

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Apply the method.

        Raises:
            TuningError: a fit would have nothing to train.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self.train_keys and not any(p.requires_grad for p in pl_module.parameters()):
            raise TuningError(
                "TipAdapter(train_keys=False) leaves nothing to train: validate, test or predict with the data module, "
                "which fills its cache."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill the cache from the training images of all processes, unless it has some."""
        super().on_train_start(trainer, pl_module)
        if self._shots(pl_module).is_empty():
            loader: Any = trainer.train_dataloader
            keys, labels = self._read(pl_module, loader)
            self._shots(pl_module).keep(rows_in_turn(keys), rows_in_turn(labels))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill the cache from the training images of the data module, unless it has some or a fit will fill it.

        Raises:
            TuningError: there is no data module, or there are several processes, which may each see all images or not.
        """
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit" or not self._shots(pl_module).is_empty():
            return
        data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        if data is None or trainer.world_size > 1:
            raise TuningError(
                "the cache has no images, and is filled from a data module in one process alone: call fill(model, "
                "batches) of the method before."
            )
        data.setup("fit")
        self.fill(pl_module, data.train_dataloader())

    on_test_start = on_predict_start = on_validation_start

    def _shots(self, model: nn.Module) -> Shots:
        return self.own_grafts(model, Shots)[0].graft


TipAdapterMixin = TunedBy[TipAdapter]
