"""A contact sheet of samples as the model sees them. May import: numpy, Pillow, the core."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvr_lite.data.boxes import tokens_in_box
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import open_picture
from lvr_lite.model.processor import Processor
from lvr_lite.views.drawing import (
    INK,
    PAPER,
    QUIET,
    Font,
    box_colour,
    cell_edges,
    draw_boxes,
    fitted,
    wrapped,
)

_SMALLEST, _LARGEST, _GAP, _CAPTION, _LINE = (
    320,
    960,
    16,
    15,
    19,
)  # pixels: side of a picture's place, space between, text size, text line


def preview(samples: list[Sample], count: int, out: Path, processor: Processor) -> None:
    """A PNG contact sheet of the first `count` samples, up to four in a row: picture, boxes,
    question and answer.

    Pictures are resized to what a model with this processor sees, and shown at one
    size, that of the largest, within 320 to 960 pixels, with the grid of visual tokens. Those that
    the boxes select keep their colours, all others are washed out. Boxes belong to a sample's first
    picture. Raises DataError for a picture that cannot be read, an unwritable `out` or no samples.
    """
    shown = samples[:count]
    if not shown:
        raise DataError(
            f"{out}: no samples to show; give a file with samples and a count of 1 or more"
        )
    seen = [_seen(sample, processor) for sample in shown]
    side = min(_LARGEST, max(_SMALLEST, *(max(picture.size) for picture, _ in seen)))
    tiles = [_tile(sample, *as_seen, side) for sample, as_seen in zip(shown, seen, strict=True)]
    columns = min(4, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new(
        "RGB", (_GAP + columns * (side + _GAP), _GAP + sum(h + _GAP for h in heights)), PAPER
    )
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            sheet.paste(tile, (_GAP + i * (side + _GAP), y))
        y += height + _GAP
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def _seen(sample: Sample, processor: Processor) -> tuple[Image.Image, tuple[int, int]]:
    """A sample's first picture at the size that the model sees, and the rows and columns of its
    visual tokens.
    """
    picture = open_picture(sample.images[0])
    rows, columns = processor.token_grid_of(picture)
    cell = processor.image.token_side
    return picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), (rows, columns)


def _tile(sample: Sample, seen: Image.Image, grid: tuple[int, int], side: int) -> Image.Image:
    picture = _with_boxes(fitted(seen, side), sample, *grid)
    font = ImageFont.load_default(_CAPTION)
    lines = _caption(sample, seen.size, grid, font, side)
    tile = Image.new("RGB", (side, side + 8 + _LINE * len(lines)), PAPER)
    tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    draw = ImageDraw.Draw(tile)
    for i, (line, ink) in enumerate(lines):
        draw.text((0, side + 8 + i * _LINE), line, fill=ink, font=font)
    return tile


def _with_boxes(picture: Image.Image, sample: Sample, rows: int, columns: int) -> Image.Image:
    """The boxes, and the tokens that they select: those keep their colours with a rim in their
    box's, all others are washed out.
    """
    w, h = picture.size
    xs, ys = cell_edges(w, columns), cell_edges(h, rows)
    layer = Image.new("RGBA", picture.size, (*PAPER, 150 if sample.boxes else 0))
    draw = ImageDraw.Draw(layer)
    for i, box in enumerate(sample.boxes):
        for row, column in np.argwhere(_selected(box, rows, columns)):
            draw.rectangle(
                (xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1),
                fill=(0, 0, 0, 0),
                outline=(*box_colour(i), 150),
            )
    for x in xs[1:-1]:
        draw.line((x, 0, x, h), fill=(255, 255, 255, 90))
    for y in ys[1:-1]:
        draw.line((0, y, w, y), fill=(255, 255, 255, 90))
    draw_boxes(draw, sample.boxes, picture.size)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _selected(box: tuple[float, float, float, float], rows: int, columns: int) -> np.ndarray:
    mask = np.zeros(rows * columns, bool)
    mask[tokens_in_box(box, rows, columns)] = True
    return mask.reshape(rows, columns)


def _caption(
    sample: Sample, size: tuple[int, int], grid: tuple[int, int], font: Font, side: int
) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines and their colours: the question, the answer, what the model sees, then id and type,
    each cut to three lines.
    """
    selected = len({int(t) for box in sample.boxes for t in tokens_in_box(box, *grid)})
    seen = f"Seen at {size[0]} x {size[1]} px: {selected} of {grid[1]} x {grid[0]} visual tokens in {len(sample.boxes)} boxes"
    name = ", ".join(filter(None, (sample.id, sample.type)))
    texts = (
        (sample.question, INK),
        (f"Answer: {sample.answer}", INK),
        (seen, QUIET),
        (name, QUIET),
    )
    return [(line, ink) for text, ink in texts for line in wrapped(text, font, side)]
