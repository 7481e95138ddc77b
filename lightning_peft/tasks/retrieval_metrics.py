"""Metrics of embeddings over the rows of all processes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

_ROWS = 1024
"""How many anchors are compared with all texts at once."""


class Recall(Metric):
    """How often the text that belongs to an anchor is among the k nearest of all, of vectors of length 1.

    A text that is as near as others counts as the nearest of them.

    Args:
        at: the numbers k.
    """

    full_state_update = False
    higher_is_better = True
    anchors: list[Tensor]
    positives: list[Tensor]

    def __init__(self, at: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.at = tuple(at)
        self.add_state("anchors", [], "cat")
        self.add_state("positives", [], "cat")

    def update(self, anchors: Tensor, positives: Tensor) -> None:
        """Add anchors and their texts, [B, d] each."""
        self.anchors.append(anchors.detach().float())
        self.positives.append(positives.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Return ``recall_at_K`` for each number."""
        return self.between(dim_zero_cat(self.anchors), dim_zero_cat(self.positives))

    def between(self, anchors: Tensor, positives: Tensor) -> dict[str, Tensor]:
        """Return ``recall_at_K`` of these rows."""
        nearer = []
        for start in range(0, len(anchors), _ROWS):
            likeness = anchors[start : start + _ROWS] @ positives.T
            own = likeness.diagonal(start).unsqueeze(1)
            # A text that occurs twice has the same vector up to rounding.
            nearer.append((likeness > own + 1e-6).sum(1))
        ranks = torch.cat(nearer)
        return {f"recall_at_{k}": (ranks < k).float().mean() for k in self.at}


class CrossRecall(Recall):
    """`Recall` of the text of an image among texts, and of the image of a text among images."""

    def compute(self) -> dict[str, Tensor]:
        """Return ``image_to_text_recall_at_K`` and ``text_to_image_recall_at_K`` for each number."""
        images, texts = dim_zero_cat(self.anchors), dim_zero_cat(self.positives)
        both = {"image_to_text": self.between(images, texts), "text_to_image": self.between(texts, images)}
        return {f"{way}_{name}": value for way, found in both.items() for name, value in found.items()}


class Spearman(Metric):
    """The rank correlation of cosines, or other numbers, and scores."""

    full_state_update = False
    higher_is_better = True
    pairs: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", [], "cat")

    def update(self, cosines: Tensor, scores: Tensor) -> None:
        """Add cosines and scores, [B] each."""
        self.pairs.append(torch.stack([cosines.detach().float(), scores.float()], 1))

    def compute(self) -> Tensor:
        """Return the correlation."""
        cosines, scores = dim_zero_cat(self.pairs).T
        return spearman_corrcoef(cosines, scores)
