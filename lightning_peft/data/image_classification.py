"""Data for image classification from folders, Parquet files or the Hugging Face hub."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.image_data import ImageData
from lightning_peft.data.image_lists import SUFFIXES, listed, renamed
from lightning_peft.data.image_sets import image_set
from lightning_peft.data.splits import GivenSplits, is_file, reason


class ImageClassificationData(GivenSplits, ImageData):
    """Images and their classes from a folder, from Parquet files, or from a dataset of the Hugging Face hub.

    A folder has one folder of image files for each class, below folders named train, validation and test if it is split
    already: ``train/cat/1.png``. A split that is not there is drawn from ``train``, as many of each class as its share.

    Args:
        dataset: folder or hub id of a dataset; None: the splits are files. With ``layout``, the folder of all
            such sets; None: the copy on the hub.
        config: which of the configurations of a hub ``dataset``, if it has several.
        train: name of the split to train with (``train[:1000]`` is one, too); without ``dataset``, a Parquet file, or a
            .txt or .json file that lists images with their classes (see `image_lists`).
        validation: the same for validation; None: the split of that name, else a share of ``train``.
        test: the same for the test.
        predict: the same for prediction, needs no labels; None: the images of the test.
        image: column of the image.
        label: column of the class: strings, integers or class labels.
        validation_share: share of ``train`` drawn for validation where that has no images of its own; 0: no validation.
        test_share: share of ``train`` drawn for the test where that has no images of its own; 0: no test.
        whole: train with the validation images, too, as in a last run, once settings have been chosen on them; what is
            validated then are images that are known.
        layout: a set whose files lie as its authors have them, such as 'vtab-1k/cifar', 'fgvc/cub' or 'coop/dtd';
            `image_sets` has the table. Splits that are named are taken in place of its own.
        images: the folder that the paths of lists begin in; None: that of the list.
        names: a file of lines ``class name``, where classes have other names than in the rows.
        **kwargs: as in `ImageData`.
    """

    known = "a folder of images or a hub id"

    def __init__(
        self,
        dataset: str | None = None,
        config: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image: str = "image",
        label: str = "label",
        validation_share: float = 0.1,
        test_share: float = 0.2,
        whole: bool = False,
        layout: str | None = None,
        images: str | None = None,
        names: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = {"train": train, "validation": validation, "test": test}
        if layout is not None:
            found = _places(layout, dataset)
            dataset, images, names = found.get("dataset"), images or found.get("images"), names or found.get("names")
            given |= {name: found[name] for name, split in given.items() if split in (None, "train") and name in found}
            self.template = image_set(layout).template
        self.use(dataset, config, (*given.values(), predict), validation_share, test_share, whole)
        self.image = image
        self.label = label
        self.folder = images
        self.names = names

    def rows(self, split: str) -> Dataset | None:
        """Return the rows of a split, as read or drawn, their classes called as ``names`` says."""
        rows = super().rows(split)
        return rows if rows is None or self.names is None else renamed(rows, self.label, self.names)

    def all_classes(self) -> Dataset:
        """Return the training rows before any have been drawn from them."""
        rows = super().all_classes()
        return rows if self.names is None else renamed(rows, self.label, self.names)

    def draw(self, rows: Dataset, shares: dict[str, float]) -> dict[str, Dataset]:
        """Draw as many rows of each class as its share, and keep the order of the rows."""
        if not len(rows) or self.label not in rows.column_names:
            return {}
        values = np.asarray(rows[self.label][:])
        parts: dict[str, list[np.ndarray]] = {split: [] for split in (*shares, "train")}
        for number, value in enumerate(np.unique(values)):
            own = np.random.default_rng((self.seed, number)).permutation(np.flatnonzero(values == value))
            counts = [round(share * len(own)) for share in shares.values()]
            for split, chosen in zip(parts, np.split(own, np.cumsum(counts)), strict=True):
                parts[split].append(chosen)
        drawn = {split: np.sort(np.concatenate(chosen)) for split, chosen in parts.items()}
        return {split: rows.select(chosen) for split, chosen in drawn.items() if len(chosen)}

    def load(self, dataset: str, **options: Any) -> Any:
        """Return the splits of a dataset; a folder without Parquet files is one of images."""
        if Path(dataset).is_dir() and not any(Path(dataset).glob("*.parquet")):
            return load_dataset("imagefolder", data_dir=dataset, **options)
        return super().load(dataset, **options)

    def read_file(self, path: str, split: str) -> Dataset:
        """Return the rows of a Parquet file, or of a list of images.

        Raises:
            TuningError: there is no such file, or it cannot be read.
        """
        if Path(path).suffix in SUFFIXES:
            return listed(path, split, self.folder)
        if Path(path).suffix != ".parquet" or not is_file(path):
            raise TuningError(
                f"{split}={path!r} is no Parquet file and no list of images: give the path of one, or dataset=."
            )
        try:
            return load_dataset("parquet", data_files={split: path}, split=split)
        except Exception as error:  # each builder raises its own
            raise TuningError(f"{split}={path!r} is no readable Parquet file ({reason(error)}): mend it.") from None


def _places(layout: str, root: str | None) -> dict[str, str]:
    """Return where the files of a set are below the folder of all sets, or which is the copy on the hub."""
    known = image_set(layout)
    if root is None and not known.hub:
        raise TuningError(f"layout={layout!r} has no copy on the hub: give dataset=, the folder of the sets.")
    return known.hub if root is None else known.places(root)
