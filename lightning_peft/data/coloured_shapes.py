"""Synthetic images whose classes have names: a shape of a colour in a style, such as the outline of a red star.

They stand in for photographs where there is no network: class names mean something ("red star"), styles are domains,
and as many pictures as one likes can be drawn for a backbone to learn from before a method is tried on others.
"""

import io
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from lightning_peft.core.errors import TuningError
from lightning_peft.core.select import near
from lightning_peft.data.draw import number_of
from lightning_peft.data.image_data import ImageData

COLOURS = {"red": 0, "orange": 28, "yellow": 55, "green": 120, "cyan": 182, "blue": 225, "purple": 278, "pink": 325}
"""Name -> hue [degrees]."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "arrow")
STYLES = ("filled", "outline", "striped", "dark")
_OFFSETS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}


class ColouredShapes(ImageData):
    """Which shape of which colour is this? The classes are all pairs of ``colours`` and ``shapes``, like "red star".

    A picture shows one shape at a random place, of random size, tilted by at most 20 degrees, its colour a little off.
    The first half of the classes, ``classes='base'``, has every colour and every shape, and so has the second half,
    unless ``novel`` says otherwise.

    Args:
        style: 'filled', 'outline' (a line on white), 'striped', or 'dark' (filled, before a dark and noisy ground): a
            domain. A list mixes them.
        colours: names of colours.
        shapes: names of shapes.
        per_class: training pictures of each class and style.
        validation_per_class: the same for validation; 0: no validation.
        test_per_class: the same for the test.
        novel: what the second half of the classes has that the first has not: other pairs alone ('pair'), or other
            shapes ('shape') or colours ('colour'), whose number is then even.
        pixels: height and width of a picture as it is drawn.
        drawing: another number draws other pictures of the same things.
        **kwargs: as in `ImageData`.
    """

    def __init__(
        self,
        style: str | list[str] = "filled",
        colours: list[str] = list(COLOURS)[:6],
        shapes: list[str] = list(SHAPES)[:6],
        per_class: int = 40,
        validation_per_class: int = 10,
        test_per_class: int = 20,
        novel: Literal["pair", "shape", "colour"] = "pair",
        pixels: int = 32,
        drawing: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.styles = [style] if isinstance(style, str) else list(style)
        self.colours, self.shapes = list(colours), list(shapes)
        for what, names, known in (
            ("style", self.styles, STYLES),
            ("colours", self.colours, tuple(COLOURS)),
            ("shapes", self.shapes, SHAPES),
        ):
            for name in names:
                if name not in known:
                    raise TuningError(f"{what} has no {name!r}: take any of {', '.join(known)}{near(name, known)}.")
            if len(set(names)) != len(names) or not names:
                raise TuningError(f"{what}={names} is empty or names something twice: name each once.")
        if novel not in ("pair", "shape", "colour"):
            raise TuningError(f"novel={novel!r} is nothing that classes have: take 'pair', 'shape' or 'colour'.")
        halved = {"shape": self.shapes, "colour": self.colours}.get(novel, [])
        if len(halved) % 2:
            raise TuningError(f"novel={novel!r} halves the {novel}s {', '.join(halved)}: give an even number of them.")
        self.novel = novel
        self.counts = {"train": per_class, "validation": validation_per_class, "test": test_per_class}
        if per_class < 1 or test_per_class < 1 or validation_per_class < 0:
            raise TuningError(
                f"{self.counts} are too few pictures of a class: take 1 or more, for validation 0 or more."
            )
        self.pixels = self.size = pixels
        self.drawing = drawing

    def rows(self, split: str) -> Dataset | None:
        """Return the pictures of a split; those of the test are the ones to predict, too."""
        split = "test" if split == "predict" else split
        return self._drawn(split) if self.counts[split] else None

    @cached_property
    def class_pairs(self) -> list[tuple[str, str]]:
        """Colour and shape of each class, in the order of the classes."""
        pairs = [(i, j) for i in range(len(self.colours)) for j in range(len(self.shapes))]
        halved = {"colour": 0, "shape": 1}.get(self.novel)  # otherwise each half has every colour and every shape
        pairs.sort(key=lambda pair: sum(pair) % 2 if halved is None else pair[halved])
        return [(self.colours[i], self.shapes[j]) for i, j in pairs]

    def _drawn(self, split: str) -> Dataset:
        names = [" ".join(pair) for pair in self.class_pairs]
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names), "style": Value("string")})
        arguments = {
            "pairs": tuple(self.class_pairs),  # a list would be taken for files to share out
            "styles": tuple(self.styles),
            "count": self.counts[split],
            "offset": _OFFSETS[split],
            "pixels": self.pixels,
            "drawing": self.drawing,
        }
        return Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)


def _rows(
    pairs: tuple[tuple[str, str], ...], styles: tuple[str, ...], count: int, offset: int, pixels: int, drawing: int
) -> Iterator[dict[str, Any]]:
    from lightning_peft.data.drawing import draw_shape

    for style in styles:
        for label, (colour, shape) in enumerate(pairs):
            for i in range(count):
                key = f"{drawing} {style} {colour} {shape} {offset + i}"
                seed = number_of(key)
                file = io.BytesIO()
                draw_shape(COLOURS[colour], shape, style, pixels, np.random.default_rng(seed)).save(file, "PNG")
                yield {"image": {"bytes": file.getvalue(), "path": None}, "label": label, "style": style}
