"""Image classification by the names of the classes, with a two-tower model (CLIP, SigLIP)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.data.protocols import FeatureStore
from lightning_peft.tasks.base import Split
from lightning_peft.tasks.base_to_new import harmonic_mean
from lightning_peft.tasks.class_scores import likeliest
from lightning_peft.tasks.metrics import Accuracy, CrossEntropy
from lightning_peft.tasks.two_towers import TwoTowerTask
from lightning_peft.towers import clip

_PREFIXES = {"all": "test_", "base": "test_base_", "new": "test_new_"}


class CLIPClassification(TwoTowerTask):
    """Classify images by the names of the classes: zero-shot without a method, few-shot and base-to-new with one.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` and the same for the test; where the test has base and new
    classes (`CLIPData`), ``test_base_accuracy``, ``test_new_accuracy`` and their harmonic mean. Logits are fp32.

    Args:
        model: folder or hub id of the two-tower model.
        labels: names of the classes; None: those of the data.
        cache_image_features: compute the features of the training and validation images once, before the first step;
            the image side must be frozen, its images must not change at random, and the data be `CLIPData`.
        **kwargs: as in `TwoTowerTask`.
    """

    def __init__(
        self, model: str, labels: list[str] | None = None, cache_image_features: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, labels, **kwargs)
        self.cache_image_features = cache_image_features
        self.score_by({"loss": CrossEntropy(), "accuracy": Accuracy()})
        self.test_scores = nn.ModuleDict(
            {name: self.val_scores.clone(prefix=prefix) for name, prefix in _PREFIXES.items()}
        )

    def forward(self, batch: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
        """Return logits of the classes of these names, [B, C], in fp32."""
        images, names = self.features(batch), self.classes if names is None else names
        texts = self.text_features(names, images)
        if texts.ndim == 2 and len(texts) != len(names):
            raise TuningError(
                "the method makes several prompts of each class: use the task that it is for, e.g. DomainAdaptation."
            )
        return clip.similarity(self.backbone, images, texts)

    def on_fit_start(self) -> None:
        """Compute the features of the images once, if asked to.

        Raises:
            TuningError: a method changes them, or the data cannot hold them.
        """
        if not self.cache_image_features:
            return
        data = self.data
        if not isinstance(data, FeatureStore):
            raise TuningError("cache_image_features needs data that can hold features: give CLIPData.")
        if not clip.images_are_frozen(self.backbone):
            raise TuningError(
                "the method changes the features of images, so they cannot be kept: cache_image_features=False."
            )
        with in_eval(self.backbone):
            data.encode(self._encode)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch), batch["labels"])

    def score(self, batch: Mapping[str, Tensor], split: Split, number: int = 0) -> None:
        """Add a batch to the metrics of its set of classes."""
        classes = list(self.sets(self.data).values())[number] if split == "test" else self.classes
        self.metrics(split)[number].update(self(batch, classes), batch["labels"])

    def metrics(self, split: Split) -> Sequence[MetricCollection]:
        """Return the metrics of the sets of classes."""
        return [self.test_scores[name] for name in self.sets(self.data)] if split == "test" else super().metrics(split)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of a set of classes."""
        self.score(batch, "test", dataloader_idx)

    def log_scores(self, split: Split) -> None:
        """Log the scores of each set of classes, and the harmonic mean of base and new."""
        super().log_scores(split)
        if split == "test" and "new" in self.sets(self.data):
            base, new = (float(scores.compute()[f"{scores.prefix}accuracy"]) for scores in self.metrics(split))
            self.log("test_harmonic_mean", harmonic_mean(base, new))

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Return ``labels``, the name of the likeliest class of each image, and ``probabilities``, [B, C]."""
        return likeliest(self(batch), self.classes)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with self.trainer.precision_plugin.forward_context(), clip.bare_features(self.backbone):
            return clip.image_features(self.backbone, pixels.to(self.device))
