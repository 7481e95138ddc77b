"""Data of images with captions, from folders, Parquet files or the Hugging Face hub."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.classes import check_columns
from lightning_peft.data.image_classification import ImageClassificationData
from lightning_peft.data.images import Images


class CaptionedImages(Images):
    """Images with texts: a caption, or several, of which an epoch has the next one; see `Images`.

    Args:
        images: the images.
        captions: of each image.
    """

    def __init__(self, images: Images, captions: Sequence[str | Sequence[str]]) -> None:
        super().__init__(images.rows, images.column, None, images.transform, images.seed, images.keep)
        self.captions = list(captions)

    def __getitem__(self, key: int | Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return an example as epoch 0 has it, or a batch."""
        if isinstance(key, int):
            return {**super().__getitem__(key), "texts": self.caption(0, key)}
        return {**super().__getitem__(key), "texts": [self.caption(epoch, row) for epoch, row in key]}

    def caption(self, epoch: int, row: int) -> str:
        """Return the caption of an image in an epoch."""
        own = self.captions[row]
        return own if isinstance(own, str) else own[epoch % len(own)]


class CaptionedImageData(ImageClassificationData):
    """Images with captions, for `ImageTextContrast`.

    A batch is a dict of ``pixel_values`` [B, 3, H, W] and ``texts``, a list of B captions. A folder has a file
    ``metadata.csv`` with the columns ``file_name`` and that of the captions.

    Args:
        caption: column of the captions: a text, or a list of texts, of which each epoch takes the next.
        **kwargs: as in `ImageClassificationData`, without ``label``, ``shots`` and ``classes``.
    """

    def __init__(self, caption: str = "text", **kwargs: Any) -> None:
        if odd := sorted(kwargs.keys() & {"label", "shots", "validation_shots", "classes"}):
            raise TuningError(f"{odd[0]}= is of classes, and captions are none: leave it out.")
        super().__init__(label=caption, **kwargs)

    def draw(self, rows: Dataset, shares: dict[str, float]) -> dict[str, Dataset]:
        """Draw the share of the rows, and keep their order."""
        order = np.random.default_rng(self.seed).permutation(len(rows))
        counts = [round(share * len(rows)) for share in shares.values()]
        parts = dict(zip((*shares, "train"), np.split(order, np.cumsum(counts)), strict=True))
        return {split: rows.select(np.sort(chosen)) for split, chosen in parts.items() if len(chosen)}

    def _chosen(self, rows: Dataset, split: str) -> Images:
        if split == "predict" and self.label not in rows.column_names:
            return super()._chosen(rows, split)
        check_columns(rows, split, [self.image, self.label])
        captions = rows[self.label][:]
        images = super()._chosen(rows, "predict")
        if images.rows is not None and len(images.rows) < len(rows):
            captions = images.rows[self.label][:]
        for number, caption in enumerate(captions, 1):
            texts = [caption] if isinstance(caption, str) else caption
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise TuningError(f"row {number} of {split} has {caption!r} in column {self.label!r}: give a text.")
        transformed = Images(images.rows, images.column, None, self.transform(split), self.seed, images.keep)
        return CaptionedImages(transformed, captions)
