"""The handwritten digits of scikit-learn as image data; nothing is downloaded."""

import io
from functools import cached_property
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from lightning_peft.core.errors import TuningError
from lightning_peft.data.image_data import ImageData

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(ImageData):
    """Which digit is this? The 1,797 handwritten digits of scikit-learn, 8 by 8 pixels of 17 shades of grey.

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI). Of each class
    one image in five is for the test and one in ten for validation, always the same ones.

    Args:
        **kwargs: as in `ImageData`.
    """

    size = 32

    def rows(self, split: str) -> Dataset:
        """Return the images of a split; those of the test are the ones to predict, too."""
        labels = np.asarray(self._every["label"][:])
        wanted = "test" if split == "predict" else split
        rows = []
        for number in range(len(NAMES)):
            own = np.random.default_rng(number).permutation(np.flatnonzero(labels == number))
            test, validation = len(own) // 5, len(own) // 10
            parts = np.split(own, [test, test + validation])
            rows.append(dict(zip(("test", "validation", "train"), parts, strict=True))[wanted])
        return self._every.select(np.sort(np.concatenate(rows)))

    @cached_property
    def _every(self) -> Dataset:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise TuningError("Digits are in scikit-learn, which is not there: pip install scikit-learn.") from None
        images, labels = load_digits(return_X_y=True)
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})
        columns = {"image": [_png(image) for image in images], "label": labels.tolist()}
        return Dataset.from_dict(columns, features=features)


def _png(image: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((image.reshape(8, 8) * 255 / 16).astype("uint8")).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}
