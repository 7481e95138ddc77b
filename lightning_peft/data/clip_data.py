"""Data for CLIP classifiers: base-to-new splits of the classes, and image features computed once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.image_data import ImageData
from lightning_peft.data.module import DataArguments


class CLIPData(DataArguments):
    """The images of ``data`` for `CLIPClassification`: all classes, or the base classes to train and the new ones, too.

    With ``base_to_new`` the first half of the classes (the larger one of an odd number) is trained, and the test scores
    the base classes among themselves and then the new ones among themselves (Zhou et al. 2022, arXiv 2203.05557).

    Args:
        data: the images.
        base_to_new: train half of the classes and test both halves.
        processor: passed on to ``data`` where that has none.
    """

    def __init__(self, data: ImageData, base_to_new: bool = False, processor: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["data"])
        if base_to_new and data.classes != "all":
            raise TuningError(
                f"base_to_new halves the classes, of which classes={data.classes!r} takes one half: ask for 'all'."
            )
        if processor is not None and data.processor is None:
            data.processor = processor
        self.base_to_new = base_to_new
        self.data = data.part("base") if base_to_new else data
        self.tested = {"base": self.data, "new": data.part("new")} if base_to_new else {"all": data}
        self._features: dict[str, ImageFeatures] = {}

    @property
    def label_names(self) -> list[str]:
        """The names of the classes that are trained, in the order of their numbers in a batch."""
        return self.data.label_names

    @property
    def template(self) -> str | None:
        """The text of a class, where the images have one of their own."""
        return self.data.template

    @property
    def test_sets(self) -> dict[str, list[str]]:
        """The sets of classes that the test scores, 'all', or 'base' and 'new', with their names."""
        return {name: data.label_names for name, data in self.tested.items()}

    def encode(self, encoder: Callable[[Tensor], Tensor]) -> None:
        """Let batches hold ``image_features`` in place of pixels, until the next `setup`.

        Args:
            encoder: from pixels [B, 3, H, W] to features [B, p], the same each time.

        Raises:
            TuningError: the training images change at random, so that their features cannot be kept.
        """
        if self.data.augment:
            raise TuningError(
                f"augment={list(self.data.augment)} changes the training images at random, so their features cannot be "
                "kept: give augment=[] or cache_image_features=False."
            )
        for split in ("train", "validation"):
            images = self.data.images(split)
            size, found = self.data.batch_size, []
            for start in range(0, len(images), size):
                pixels = [images.pixels(row) for row in range(start, min(start + size, len(images)))]
                found.append(encoder(torch.stack(pixels)).float().cpu())
            if found:
                assert images.labels is not None
                self._features[split] = ImageFeatures(torch.cat(found), images.labels)

    def prepare_data(self) -> None:
        """Read in one process of each machine."""
        for data in (self.data, *self.tested.values()):
            data.trainer = self.trainer
            data.prepare_data()

    def setup(self, stage: str) -> None:
        """Find the images."""
        self._features = {}
        for data in self.tested.values() if stage == "test" else [self.data]:
            data.trainer = self.trainer
            data.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in another order each epoch."""
        if "train" in self._features:
            return self.data.loader(self._features["train"], shuffle=True)
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation batches, or none where there is no such split."""
        if "validation" in self._features:
            return self.data.loader(self._features["validation"])
        return self.data.val_dataloader()

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test batches of each set of classes."""
        return [data.test_dataloader() for data in self.tested.values()]

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images to predict in their own order."""
        return self.data.predict_dataloader()


class ImageFeatures(TorchDataset[dict[str, Tensor]]):
    """Features of images with their classes; a list of pairs ``(epoch, index)`` gives a batch.

    Args:
        features: [N, p].
        labels: numbers of the classes, [N].
    """

    def __init__(self, features: Tensor, labels: np.ndarray) -> None:
        self.features = features
        self.labels = torch.from_numpy(labels.astype("int64"))

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.features)

    def __getitem__(self, key: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch."""
        rows = [row for _, row in key]
        return {"image_features": self.features[rows], "labels": self.labels[rows]}
