"""Pictures in folders and files, and a tiny vision model in a folder, for tests of data and tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from lightning_peft import ColouredShapes
from tests.models import tiny

NAMES = ["bird", "river", "stone"]


def picture(label: int, number: int, size: int = 16) -> Image.Image:
    """Return a picture whose channel number ``label`` is bright; another for each number."""
    pixels = np.random.default_rng((label, number)).integers(0, 100, (size, size, 3))
    pixels[:, :, label] += 120
    return Image.fromarray(pixels.astype("uint8"))


def folder(path: Path, counts: dict[str, int], size: int = 16) -> str:
    """Write so many pictures of each class for each split, in folders."""
    for offset, (split, count) in enumerate(counts.items()):
        for label, name in enumerate(NAMES):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(label, 1000 * offset + i, size).save(path / split / name / f"{i}.png")
    return str(path)


def parquet(path: Path, count: int) -> str:
    """Write so many pictures of each class into a Parquet file."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    columns = {
        "image": [picture(label, i) for label in range(3) for i in range(count)],
        "label": [label for label in range(3) for _ in range(count)],
    }
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def save_vit(path: Path, kind: str = "vit", processor: bool = True) -> str:
    """Save a tiny classifier of pictures of 16 by 16 pixels."""
    tiny(kind).save_pretrained(path)
    if processor:
        hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return str(path)


def shapes(**kwargs: Any) -> ColouredShapes:
    """Return few small pictures of four classes."""
    small = {"colours": ["red", "blue"], "shapes": ["circle", "cross"], "pixels": 16, "batch_size": 4}
    counts = {"per_class": 6, "validation_per_class": 2, "test_per_class": 3}
    return ColouredShapes(**small | counts | kwargs)
