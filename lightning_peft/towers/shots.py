"""Features of a few images of each class, near which others are scored higher for it: the graft of Tip-Adapter."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.batches import entry_of, inputs_of
from lightning_peft.core.errors import TuningError
from lightning_peft.core.host_copy import ask
from lightning_peft.core.sharded import like
from lightning_peft.towers import clip
from lightning_peft.towers.feature_adapters import FeatureScores
from lightning_peft.towers.text_towers import two_towers

EMPTY = -1
"""The label of a place without an image."""


class Shots(FeatureScores):
    """The kept images.

    Args:
        keys: [N, p].
        classes: C.
        alpha: weight of the scores.
        beta: how fast they fall with the distance.
        trains: whether the keys are parameters.
    """

    labels: Tensor
    keys: Tensor
    seen: list[Tensor] | None = None
    """Set for one call, which adds the features of its images."""

    def __init__(self, keys: Tensor, classes: int, alpha: float, beta: float, trains: bool) -> None:
        super().__init__()
        self.classes, self.alpha, self.beta = classes, alpha, beta
        self.room = len(keys) // classes
        if trains:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("labels", torch.full((len(keys),), EMPTY, device=keys.device))

    def is_empty(self) -> bool:
        """Tell whether no image is kept."""
        return ask(self.labels, lambda labels: bool((labels == EMPTY).all()))

    @torch.no_grad()
    def keep(self, keys: Tensor, labels: Tensor) -> None:
        """Keep these images in place of those of before: normalised features [n, p] and labels [n].

        Raises:
            TuningError: a label is none of the classes, or a class has more images than there is room for.
        """
        given: list[int] = ask(labels, Tensor.tolist)
        for label in sorted(set(given)):
            if not 0 <= label < self.classes:
                raise TuningError(f"label {label} is none of num_classes={self.classes} classes: give as many.")
            if (count := given.count(label)) > self.room:
                raise TuningError(
                    f"class {label} has {count} images, and the cache has room for shots={self.room}: give fewer, or "
                    f"shots={count}."
                )
        self.labels.fill_(EMPTY)[: len(labels)] = labels
        self.keys.copy_(like(self.keys, F.pad(keys, (0, 0, 0, self.labels.numel() - len(keys)))))

    def scores(self, images: Tensor, classes: int) -> Tensor:
        """Return ``alpha exp(-beta (1 - f Kᵀ)) V``, [B, C].

        Raises:
            TuningError: there are other classes than those of the cache.
        """
        if self.seen is not None:
            self.seen.append(images)
            return images.new_zeros(len(images), classes)
        if classes != self.classes:
            raise TuningError(
                f"the cache has images of {self.classes} classes, and there are texts of {classes}: give those of the "
                "classes that it was filled with."
            )
        near = (self.beta * (images @ self.keys.t() - 1)).exp()
        return self.alpha * near @ F.one_hot(self.labels + 1, classes + 1)[:, 1:].to(near.dtype)


def features_of(backbone: nn.Module, batch: Any, graft: Shots) -> Tensor:
    """Return the features of the images of a batch; a model around the towers is called, which sharding needs."""
    towers, device = two_towers(backbone), graft.labels.device
    if isinstance(batch, Mapping) and "image_features" in batch:
        return clip.adapted(towers, batch["image_features"].to(device))
    if backbone is towers:
        return clip.image_features(towers, entry_of(batch, "pixel_values", 0).to(device))
    graft.seen = []
    try:
        if isinstance(batch, Mapping):
            backbone(**{name: value.to(device) for name, value in inputs_of(batch, backbone).items()})
        else:
            backbone(entry_of(batch, "pixel_values", 0).to(device))
        return torch.cat(graft.seen)
    finally:
        graft.seen = None
