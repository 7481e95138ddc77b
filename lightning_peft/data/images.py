"""The PyTorch dataset of images that are decoded and transformed on access, and its batch sampler."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.data.batches import Batches

if TYPE_CHECKING:
    from lightning_peft.data.image_transforms import ImageTransform


class Images(TorchDataset[dict[str, Tensor]]):
    """Images that are decoded and prepared when they are asked for.

    An index gives one example, a list of pairs ``(epoch, index)`` a batch.

    Args:
        rows: their column ``column`` holds undecoded images.
        column: the column of the image.
        labels: numbers of the classes, or None.
        transform: from an image to its pixels.
        seed: of the random changes.
        keep: keep the pixels where nothing about them is random.
    """

    def __init__(
        self,
        rows: Dataset | None,
        column: str,
        labels: np.ndarray | None,
        transform: "ImageTransform | None",
        seed: int,
        keep: bool,
    ) -> None:
        self.rows = rows
        self.column = column
        self.labels = labels
        self.transform = transform
        self.seed = seed
        self.keep = keep and transform is not None and not transform.augment
        self._kept: dict[int, Tensor] = {}

    def without_labels(self) -> "Images":
        """Return the same images, of no known class."""
        return Images(self.rows, self.column, None, self.transform, self.seed, self.keep)

    @classmethod
    def none(cls) -> "Images":
        """Return no images."""
        return cls(None, "", None, None, 0, False)

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.rows) if self.rows is not None else 0

    def __getitem__(self, key: int | Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return an example as epoch 0 has it, or a batch."""
        if isinstance(key, int):
            return {name: value[0] for name, value in self[[(0, key)]].items()}
        batch = {"pixel_values": torch.stack([self.pixels(row, epoch) for epoch, row in key])}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[[row for _, row in key]].astype("int64"))
        return batch

    def pixels(self, row: int, epoch: int = 0) -> Tensor:
        """Return one image as the epoch has it, [3, H, W]."""
        from lightning_peft.data.image_transforms import decode

        if row in self._kept:
            return self._kept[row]
        assert self.rows is not None
        assert self.transform is not None
        draw = np.random.default_rng((self.seed, epoch, row)) if self.transform.augment else None
        pixels = self.transform(decode(self.rows[row][self.column], row + 1), draw)
        if self.keep:
            self._kept[row] = pixels
        return pixels

    def select(self, indices: Sequence[int] | np.ndarray) -> "Images":
        """Return some of the images."""
        assert self.rows is not None
        labels = None if self.labels is None else self.labels[np.asarray(indices)]
        return Images(self.rows.select(indices), self.column, labels, self.transform, self.seed, self.keep)


class EpochBatches(Batches):
    """Batches whose rows come with the epoch, which worker processes would not know otherwise."""

    def __iter__(self) -> Iterator[Any]:
        """Yield batches as lists of ``(epoch, row)``."""
        for batch in super().__iter__():
            yield [(self.epoch, row) for row in batch]
