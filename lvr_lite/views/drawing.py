"""What drawings of pictures and their visual tokens share: the contact sheet of samples and
`--look`. May import: Pillow, the core.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, QUIET = (250, 250, 248), (25, 25, 25), (95, 95, 95)
_BOXES = ((230, 30, 120), (0, 150, 255), (255, 140, 0), (20, 170, 70), (130, 60, 220))


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at `side` pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Nearest keeps the pixels of a small picture visible, which is what a drawing of it is for.
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def cell_edges(length: int, cells: int) -> list[int]:
    """Where `cells` equal cells begin along `length` pixels, and where the last one ends."""
    return [round(i * length / cells) for i in range(cells + 1)]


def box_colour(box: int) -> Colour:
    return _BOXES[box % len(_BOXES)]


def draw_boxes(
    draw: ImageDraw.ImageDraw, boxes: Sequence[Sequence[float]], size: tuple[int, int]
) -> None:
    """Normalized xyxy boxes as outlines over a picture of `size` pixels, each in its colour."""
    w, h = size
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        at = (x0 * w, y0 * h, max(x1 * w - 1, x0 * w), max(y1 * h - 1, y0 * h))
        draw.rectangle(at, outline=box_colour(i), width=2)


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of about `width` pixels, three at most."""
    widest = max(
        1, int(0.95 * width * len(text) / font.getlength(text))
    )  # characters a line, at this text's mean width
    return textwrap.wrap(text, widest, max_lines=3, placeholder=" ...")
