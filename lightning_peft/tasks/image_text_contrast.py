"""Contrastive learning of images and their captions, with a two-tower model (CLIP, SigLIP)."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from lightning_peft.core.errors import TuningError
from lightning_peft.core.gathering import rows_of_all
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.retrieval_metrics import CrossRecall
from lightning_peft.towers import clip
from lightning_peft.towers.contexts import context_of
from lightning_peft.towers.text_towers import positions_of, reads_end


class ImageTextContrast(Task):
    """Let images and their captions have vectors that are near, the towers being tuned by any method.

    The loss is the mean of two cross-entropies of ``exp(s) cos(f(image), g(text))``, that of the right text of each
    image and that of the right image of each text, among those of the batches of all processes; equal captions are
    right for each other. SigLIP is trained alike. The temperature s is frozen; ``also_train="logit_scale"`` of the
    method trains it. Texts are cut at the positions of the model.

    Logs ``train_loss``, and for the whole split how often the own text of an image is among the nearest, and the own
    image of a text: ``val_image_to_text_recall_at_1``, ``val_text_to_image_recall_at_1``, and at 5. The test has the
    same scores.

    Source: Radford et al. 2021, arXiv 2103.00020, section 2.3.

    Args:
        model: folder or hub id of the two-tower model.
        **kwargs: as in `Task`.
    """

    auto = AutoModel
    what = "two-tower model"
    monitor = "val_image_to_text_recall_at_1"

    def __init__(self, model: str, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.backbone = self.load()
        if not {"get_text_features", "get_image_features"} <= set(dir(self.backbone)):
            raise TuningError(
                f"{model!r} is a {type(self.backbone).__name__}, which has no two towers: give a CLIP or SigLIP model."
            )
        self.score_by({"recall": CrossRecall()})

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the features of the images and of the texts, [B, p] each."""
        images = clip.image_features(self.backbone, batch["pixel_values"])
        texts = clip.text_features(self.backbone, self._ids(batch["texts"]))
        if texts.shape != images.shape:
            raise TuningError(
                "the method makes several texts of one, or needs the image for it: take CLIPClassification."
            )
        return images, texts

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of the rows of this process."""
        images, texts = self(batch)
        keys = torch.tensor([_key(text) for text in batch["texts"]], device=images.device)
        right = (keys.unsqueeze(1) == rows_of_all(keys)).float()
        right = right / right.sum(1, keepdim=True)
        every_image, every_text = rows_of_all(images), rows_of_all(texts)
        of_images = clip.similarity(self.backbone, images, every_text)
        of_texts = clip.similarity(self.backbone, every_image, texts).t()
        return (F.cross_entropy(of_images, right) + F.cross_entropy(of_texts, right)) / 2

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the pairs of a batch to the metrics."""
        images, texts = (F.normalize(features.float(), dim=1) for features in self(batch))
        for scores in self.metrics(split):
            scores.update(images, texts)

    def rows_in(self, batch: Mapping[str, Any]) -> int:
        """Return how many pairs a batch has."""
        return len(batch["pixel_values"])

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``embedding``, the vector of each image, of length 1."""
        features = clip.image_features(self.backbone, batch["pixel_values"])
        return {"embedding": F.normalize(features.float(), dim=1).tolist()}

    def _ids(self, texts: list[str]) -> Tensor:
        """Return the ids of texts, [B, T], padded as the model was trained, with room for a context."""
        tower, context = self.backbone.text_model, context_of(self.backbone)
        limit = positions_of(tower) - (context.count if context is not None else 0)
        padding = "longest" if reads_end(tower) else "max_length"
        encoded = self.tokenizer(texts, truncation=True, max_length=limit, padding=padding, return_tensors="pt")
        ids: Tensor = encoded["input_ids"].to(self.device)
        return ids


def _key(text: str) -> int:
    """Return a number by which all processes tell a text from others."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
