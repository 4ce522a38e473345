"""What drawings of pictures and their visual tokens share: the contact sheet of samples and
`--look`. May import: Pillow and what stands above `views`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER = (250, 250, 248)
INK = (25, 25, 25)
QUIET = (95, 95, 95)
_BOX_COLOURS = ((230, 30, 120), (0, 150, 255), (255, 140, 0), (20, 170, 70), (130, 60, 220))


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side at `side` pixels."""
    scale = side / max(picture.size)
    width = round(picture.width * scale)
    height = round(picture.height * scale)
    filter = Image.Resampling.LANCZOS
    if scale > 1:
        # It keeps the pixels of a small picture visible, which is what a drawing of it is for.
        filter = Image.Resampling.NEAREST
    return picture.resize((max(1, width), max(1, height)), filter)


def cell_edges(length: int, cells: int) -> list[int]:
    """Where `cells` equal cells begin along `length` pixels, and where the last one ends."""
    return [round(i * length / cells) for i in range(cells + 1)]


def box_colour(box: int) -> Colour:
    """The colour of a sample's box of this number, from 0."""
    return _BOX_COLOURS[box % len(_BOX_COLOURS)]


def draw_boxes(
    draw: ImageDraw.ImageDraw,
    boxes: Sequence[Sequence[float]],
    size: tuple[int, int],
) -> None:
    """Normalized xyxy boxes as outlines over a picture of `size` pixels, each in its colour."""
    width, height = size
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        left = x0 * width
        top = y0 * height
        right = max(x1 * width - 1, left)
        bottom = max(y1 * height - 1, top)
        draw.rectangle(
            (left, top, right, bottom),
            outline=box_colour(i),
            width=2,
        )


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of about `width` pixels, three at most."""
    # characters a line, at the mean width of this text's characters
    characters = int(0.95 * width * len(text) / font.getlength(text))
    return textwrap.wrap(
        text,
        max(1, characters),
        max_lines=3,
        placeholder=" ...",
    )
