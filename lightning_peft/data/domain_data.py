"""Data for domain adaptation: labelled images of a source domain, unlabelled images of a target domain."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.batches import Batches
from lightning_peft.data.image_data import ImageData
from lightning_peft.data.images import Images
from lightning_peft.data.module import DataArguments


class DomainData(DataArguments):
    """Train on a labelled source and an unlabelled target, choose by the source, test on the target.

    A training batch is ``{"source": {pixel_values, labels}, "target": {pixel_values}}``. Labels of the target's
    training images are left out here, and its validation images are not used, so nothing is chosen by what is tested.

    Args:
        source: labelled images.
        target: images of the same classes in another domain.
        mode: how long an epoch is: 'source' as long as that of the source, the target begun anew; 'longest' or
            'shortest' of the two.
        processor: passed on to both where they have none.

    Raises:
        TuningError: the domains have other classes.
    """

    def __init__(
        self,
        source: ImageData,
        target: ImageData,
        mode: Literal["source", "longest", "shortest"] = "source",
        processor: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["source", "target"])
        if mode not in ("source", "longest", "shortest"):
            raise TuningError(f"mode={mode!r} is no length of an epoch: take 'source', 'longest' or 'shortest'.")
        self.source, self.target = source, target
        for data in (source, target):
            if processor is not None and data.processor is None:
                data.processor = processor
        self.mode = mode

    @property
    def label_names(self) -> list[str]:
        """The names of the classes, in the order of their numbers in a batch."""
        names, others = self.source.label_names, self.target.label_names
        if names != others:
            odd = sorted(set(names) ^ set(others)) or ["their order"]
            raise TuningError(f"source and target differ in their classes, e.g. in {odd[0]!r}: give both the same.")
        return names

    def prepare_data(self) -> None:
        """Read in one process of each machine."""
        for data in (self.source, self.target):
            data.trainer = self.trainer
            data.prepare_data()

    def setup(self, stage: str) -> None:
        """Find the images."""
        assert self.label_names
        splits = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, ())
        for data in (self.source, self.target):
            data.trainer = self.trainer
        for split in splits:
            self.source.images(split)
        if stage == "fit":
            self.target.images("train")
            if self.source.share:
                self.train_dataloader()  # refuses fewer images than processes, before Lightning asks for it
        if stage in ("test", "predict"):
            self.target.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of both domains, in another order each epoch."""
        images = BothDomains(self.source.images("train"), self.target.images("train").without_labels())
        source, target = (len(images.source), self.source.batch_size), (len(images.target), self.target.batch_size)
        pairs = PairsOfBatches(source, target, mode=self.mode, seed=self.source.seed, **self.source.share)
        return self.source.batches_loader(images, pairs)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the validation batches of the source, or none where it has no such split."""
        return self.source.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches of the target."""
        return self.target.test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the images of the target to predict in their own order."""
        return self.target.predict_dataloader()


class BothDomains(TorchDataset[dict[str, dict[str, Tensor]]]):
    """Images of two domains; two lists of pairs ``(epoch, index)`` give a batch of each."""

    def __init__(self, source: Images, target: Images) -> None:
        self.source, self.target = source, target

    def __getitem__(self, key: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> dict[str, dict[str, Tensor]]:
        """Return a batch of each domain."""
        return {"source": self.source[key[0]], "target": self.target[key[1]]}


class PairsOfBatches(Batches):
    """A batch of each of two domains at a time, as lists of ``(epoch, row)``; the shorter one is begun anew.

    Args:
        source: how many rows there are, and how many of a batch in each process.
        target: the same.
        mode: as in `DomainData`.
        seed: of the order.
        num_replicas: how many processes share the rows.
        rank: which of them this one is.
    """

    def __init__(
        self,
        source: tuple[int, int],
        target: tuple[int, int],
        mode: str = "source",
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.domains = [
            Batches(np.ones(rows, "int8"), size, True, False, seed + i, num_replicas, rank)
            for i, (rows, size) in enumerate((source, target))
        ]
        self.mode = mode
        super().__init__(np.ones(source[0], "int8"), source[1], True, False, seed, num_replicas, rank)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of the epoch, from batch number ``start`` on."""
        pairs = zip(*(self._cycle(batches) for batches in self.domains), strict=False)
        for number, pair in enumerate(pairs):
            if number >= len(self):
                return
            if number >= self.start:
                yield pair

    def __len__(self) -> int:
        """Return the number of batches of the whole epoch."""
        source, target = (len(batches) for batches in self.domains)
        return {"source": source, "longest": max(source, target), "shortest": min(source, target)}[self.mode]

    def _cycle(self, batches: Batches) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of a domain without end, in another order each time."""
        times = -(-len(self) // len(batches))
        for epoch in range(self.epoch * times, (self.epoch + 1) * times):
            batches.set_epoch(epoch)
            for rows in batches:
                yield [(epoch, row) for row in rows]
