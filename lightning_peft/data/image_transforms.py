"""From an image file to what a vision model reads: decoded by Pillow, prepared by the model's own image processor.

Random crops, flips and colours are Pillow's too, drawn from a generator that the caller gives: what an image looks like
in an epoch then depends on the seed, the epoch and the row alone, whichever process prepares it.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.hub import load_config, load_image_processor


def decode(value: Mapping[str, Any], row: int | None = None) -> Image.Image:
    """Return the RGB image of ``{"path": ..., "bytes": ...}``, upright as its EXIF data say.

    Grey becomes three equal channels, 16-bit grey is scaled to 8 bits, transparent parts become white.

    Raises:
        TuningError: the file is damaged or no image; it is named, by its row if it has no path.
    """
    try:
        data = value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        name = value.get("path") or f"row {row}"
        raise TuningError(
            f"{name} is no readable image ({_reason(error)}): mend it, or leave such files out with skip_corrupt=True."
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of three channels of 8 bits.

    >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if image.mode.startswith("I;16"):  # convert() would clip it: https://github.com/python-pillow/Pillow/issues/3011
        image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey values have no known range")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


class ImageTransform:
    """Turns a Pillow image into a tensor [3, H, W] by the image processor of a model, after random changes if any.

    Args:
        processor: the image processor of the model.
        augment: any of 'crop' (a random part of a random shape, resized), 'flip' (half of the images mirrored left to
            right; not for digits or letters), 'colour' (brightness, contrast and saturation by a factor in 0.6 to 1.4).
        crop_scale: the least and the greatest share of the area that 'crop' keeps.
    """

    def __init__(
        self, processor: Any, augment: Sequence[str] = (), crop_scale: tuple[float, float] = (0.08, 1.0)
    ) -> None:
        self.processor = processor
        self.augment = tuple(augment)
        self.crop_scale = crop_scale
        height, width = self(Image.new("RGB", (64, 64))).shape[-2:]
        self.size = (int(width), int(height))

    def __call__(self, image: Image.Image, draw: np.random.Generator | None = None) -> Tensor:
        """Return the pixels, [3, H, W]; with no generator nothing random happens."""
        options: dict[str, Any] = {}
        if draw is not None:
            if "colour" in self.augment:
                for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                    image = enhance(image).enhance(draw.uniform(0.6, 1.4))
            if "flip" in self.augment and draw.random() < 0.5:
                image = ImageOps.mirror(image)
            if "crop" in self.augment:
                box = crop_box(image.width, image.height, self.crop_scale, draw)
                filter_ = Image.Resampling(getattr(self.processor, "resample", None) or Image.Resampling.BILINEAR)
                image = image.resize(self.size, filter_, box=box)
                options = {"do_resize": False, "do_center_crop": False}
        pixels = self.processor(images=[image], return_tensors="pt", **options)["pixel_values"]
        return torch.as_tensor(pixels)[0]


def crop_box(
    width: int, height: int, scale: tuple[float, float], draw: np.random.Generator
) -> tuple[float, float, float, float]:
    """Return a random part of an image as ``(left, upper, right, lower)``.

    Its share of the area is drawn from ``scale`` and its aspect ratio, logarithmically, from 3/4 to 4/3; after ten
    draws that do not fit it is the largest square in the middle (Szegedy et al. 2014, arXiv 1409.4842, section 6).
    """
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, upper = draw.uniform(0, width - w), draw.uniform(0, height - h)
            return left, upper, min(left + w, width), min(upper + h, height)
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def load_processor(name: str | None, image_size: int | None = None) -> Any:
    """Return the image processor of a model, or one that scales to ``image_size`` and to [-1, 1].

    Args:
        name: folder or hub id, or ``package://NAME/FOLDER``; None: no model.
        image_size: height and width of the images [pixels]; None: those of the model.

    Raises:
        TuningError: neither is given, or there is nothing about images in that folder.
    """
    from transformers import ViTImageProcessorPil

    if name is None:
        if image_size is None:
            raise TuningError("nothing says how large the images shall be: give processor= (a model) or image_size=.")
        return ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    try:
        processor = load_image_processor(name)
    except TuningError:
        size = image_size or _size_in_config(name)
        if size is None:
            raise
        return ViTImageProcessorPil(size={"height": size, "width": size})
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        changes: dict[str, Any] = {"size": square, "do_center_crop": False} if "size" in processor.to_dict() else {}
        processor = type(processor).from_dict(processor.to_dict() | changes)
    return processor


def _size_in_config(name: str) -> int | None:
    try:
        size = structure.image_size(load_config(name))
    except TuningError:
        return None
    return size[0] if size is not None and size[0] == size[1] else None


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
