"""The picture of a scene: figures with a pattern and a letter on a cluttered background. May
import: numpy, Pillow and what stands above `toy`.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from lvr_lite.toy.scenes import COLOURS, Figure, Scene

Point = tuple[float, float]
Colour = tuple[int, ...]

RIM = (20, 20, 20)
INK = (255, 255, 255)
# The pixels beside one: left, right, above, below.
_AROUND = ((-1, 0), (1, 0), (0, -1), (0, 1))

# 5 x 7 bitmaps, row by row: drawn here so that no font or FreeType version can change a picture.
_GLYPHS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "2": "01110 10001 00001 00010 00100 01000 11111",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
}
# Polygons in a square of side 1; circle, star and heart are computed.
_POLYGONS: dict[str, list[Point]] = {
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0), (1, 0.94), (0, 0.94)],
    "diamond": [(0.5, 0), (0.88, 0.5), (0.5, 1), (0.12, 0.5)],
    "cross": [
        (0.32, 0),
        (0.68, 0),
        (0.68, 0.32),
        (1, 0.32),
        (1, 0.68),
        (0.68, 0.68),
        (0.68, 1),
        (0.32, 1),
        (0.32, 0.68),
        (0, 0.68),
        (0, 0.32),
        (0.32, 0.32),
    ],
    "arrow": [(0.5, 0), (1, 0.5), (0.7, 0.5), (0.7, 1), (0.3, 1), (0.3, 0.5), (0, 0.5)],
}


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `scene.width` x `scene.height`, the same bytes for the same
    scene.
    """
    picture = _background(scene.width, scene.height, scene.clutter)
    for figure in scene.figures:
        _draw_figure(picture, figure)
    return picture


def _background(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    base = rng.integers(70, 175, size=3)
    # muted, so that the colours of figures stand out
    base = (0.35 * base + 0.65 * base.mean()).astype(int)
    shade = rng.normal(0, 16, size=(6, 6, 1))
    tint = rng.normal(0, 6, size=(6, 6, 3))
    coarse = Image.fromarray(_bytes(base + shade + tint))
    picture = coarse.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    count = int(rng.integers(4, 11))
    for x0, y0, x1, y1, brightness, kind in rng.random((count, 6)):
        tone = _bytes(base + (brightness - 0.5) * 90)
        fill = tuple(tone.tolist())
        x = x0 * width
        y = y0 * height
        if kind < 0.6:
            end = (x1 * width, y1 * height)
            draw.line((x, y, *end), fill=fill, width=1)
        else:
            corner = (x + 3 + 9 * x1, y + 3 + 9 * y1)
            draw.rectangle((x, y, *corner), fill=fill)
    return picture


def _bytes(values: np.ndarray) -> np.ndarray:
    """Colour values as uint8."""
    clipped = np.clip(values, 0, 255)
    return np.asarray(clipped, np.uint8)


def _draw_figure(picture: Image.Image, figure: Figure) -> None:
    fill = _fill(COLOURS[figure.colour], figure.pattern, figure.size)
    mask = _mask(figure.shape, figure.size)
    picture.paste(fill, (figure.x, figure.y), mask)
    glyph = _glyph(figure)
    middle = 0.5
    if figure.shape == "triangle":
        # Its body lies low.
        middle = 0.62
    x = figure.x + (figure.size - glyph.width) // 2
    y = figure.y + round(figure.size * middle - glyph.height / 2)
    # A dark rim makes the letter readable on white as well.
    for dx, dy in _AROUND:
        picture.paste(RIM, (x + dx, y + dy), glyph)
    picture.paste(INK, (x, y), glyph)


def _mask(shape: str, size: int) -> Image.Image:
    """The figure in white on black, drawn at three times its size and scaled down."""
    side = size * 3
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        first = side * 0.03
        last = side * 0.97
        draw.ellipse((first, first, last, last), fill=255)
    else:
        draw.polygon(_outline(shape, side - 1), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _outline(shape: str, side: float) -> list[Point]:
    """Polygon of a shape in a square of `side` pixels."""
    if shape == "star":
        return _star(side / 2)
    if shape == "heart":
        return _heart(side / 2)
    return [(x * side, y * side) for x, y in _POLYGONS[shape]]


def _star(radius: float) -> list[Point]:
    points = []
    for i in range(10):
        spoke = radius if i % 2 == 0 else radius * 0.46
        angle = -math.pi / 2 + i * math.pi / 5
        x = radius + spoke * math.cos(angle)
        y = radius + spoke * math.sin(angle)
        points.append((x, y))
    return points


def _heart(radius: float) -> list[Point]:
    points = []
    for i in range(24):
        t = i * math.pi / 12
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        x = radius + radius * math.sin(t) ** 3
        y = radius * 0.9 - radius * height / 17
        points.append((x, y))
    return points


def _fill(colour: Colour, pattern: str, size: int) -> Image.Image:
    """A square of a colour with dark stripes or dots."""
    fill = Image.new("RGB", (size, size), colour)
    draw = ImageDraw.Draw(fill)
    dark = tuple(int(v * 0.42) for v in colour)
    step = max(4, size // 6)
    half = step // 2
    if pattern == "striped":
        for y in range(0, size, step):
            draw.rectangle((0, y, size, y + half - 1), fill=dark)
    if pattern == "dotted":
        r = max(1, step // 3)
        for row, y in enumerate(range(half, size, step)):
            # Every other row of dots is shifted.
            first = half + (row % 2) * half
            for x in range(first, size, step):
                draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=dark)
    return fill


def _glyph(figure: Figure) -> Image.Image:
    """The mask of a figure's letter, about 0.42 of the figure's height."""
    rows = [list(row) for row in _GLYPHS[figure.glyph].split()]
    bits = np.array(rows, dtype=np.uint8)
    bitmap = Image.fromarray(bits * np.uint8(255))
    scale = max(1, round(figure.size * 0.42 / 7))
    return bitmap.resize((5 * scale, 7 * scale), Image.Resampling.NEAREST)
