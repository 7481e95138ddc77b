"""Drawing a coloured shape in a style, with Pillow."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw


def draw_shape(hue: float, shape: str, style: str, pixels: int, random: np.random.Generator) -> Image.Image:
    """Return one RGB picture of ``pixels`` by ``pixels``, drawn four times as large and scaled down.

    Args:
        hue: of the shape [degrees].
        shape: one of the names in `ColouredShapes`.
        style: the same.
        pixels: height and width.
        random: draws place, size, tilt, colours and noise.
    """
    side = 4 * pixels
    radius = side * random.uniform(0.24, 0.4)
    x, y = (random.uniform(radius, side - radius) for _ in range(2))
    tilt = math.radians(random.uniform(-20, 20))
    ink = _rgb((hue + random.uniform(-7, 7)) / 360, random.uniform(0.8, 1), random.uniform(0.75, 1))
    whole = _mask(shape, side, x, y, radius, tilt)
    mask = whole
    if style == "outline":
        mask = _mask(shape, side, x, y, radius, tilt, border=round(side * 0.045))
    elif style == "striped":
        step, phase = int(side / 9), int(random.integers(0, side))
        rows = ((np.add.outer(np.arange(side), np.arange(side)) + phase) // (step // 2 + 1)) % 2
        mask = ImageChops.multiply(whole, Image.fromarray((rows * 255).astype("uint8")))
    ground = _ground(style, side, random)
    ground.paste(Image.new("RGB", (side, side), ink), mask=mask)
    picture = np.asarray(ground.resize((pixels, pixels), Image.Resampling.BOX)).astype("float32")
    picture += random.normal(0, 14 if style == "dark" else 4, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype("uint8"))


def _ground(style: str, side: int, random: np.random.Generator) -> Image.Image:
    if style == "outline":
        return Image.new("RGB", (side, side), "white")
    low, high = (0, 0.35) if style == "dark" else (0.75, 1)
    corners = [_rgb(random.random(), random.uniform(0, 0.15), random.uniform(low, high)) for _ in range(4)]
    small = np.array(corners, "uint8").reshape(2, 2, 3)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BILINEAR)


def _mask(
    shape: str, side: int, x: float, y: float, radius: float, tilt: float, border: int | None = None
) -> Image.Image:
    """Return the shape in white on black; with ``border``, only a line of that width along its edge."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape in ("circle", "ring", "moon"):
        pen.ellipse(box, fill=255)
        if shape == "ring":
            hole = radius * 0.5
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        elif shape == "moon":
            shift = radius * 0.75
            left, top = x + shift * math.cos(tilt), y + shift * math.sin(tilt)
            pen.ellipse((left - radius, top - radius, left + radius, top + radius), fill=0)
    else:
        points = [_turned(px, py, x, y, radius, tilt) for px, py in _corners(shape)]
        pen.polygon(points, fill=255)
    if border is None:
        return mask
    return ImageChops.subtract(mask, _eroded(mask, border))


def _eroded(mask: Image.Image, width: int) -> Image.Image:
    """Return the mask without a border of that width."""
    shifts = [(width * math.cos(a), width * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16, endpoint=False)]
    inner = mask
    for dx, dy in shifts:
        inner = ImageChops.darker(inner, ImageChops.offset(mask, round(dx), round(dy)))
    return inner


def _corners(shape: str) -> Sequence[tuple[float, float]]:
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return _polar([(1, 90), (1, 210), (1, 330)])
    if shape == "star":
        return _polar([(1 if i % 2 == 0 else 0.42, 90 + 36 * i) for i in range(10)])
    if shape == "arrow":
        return [(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)]
    arm = 0.32  # a cross
    quarter = [(arm, arm), (arm, 1), (-arm, 1)]
    turned = [quarter]
    for _ in range(3):
        turned.append([(-b, a) for a, b in turned[-1]])
    return [point for part in turned for point in part]


def _polar(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(r * math.cos(math.radians(a)), -r * math.sin(math.radians(a))) for r, a in points]


def _turned(px: float, py: float, x: float, y: float, radius: float, tilt: float) -> tuple[float, float]:
    cos, sin = math.cos(tilt), math.sin(tilt)
    return x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
