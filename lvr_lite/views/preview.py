"""A contact sheet of samples as the model sees them. May import: Pillow and what stands above
`views`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lvr_lite.data.boxes import Box, tokens_in_box
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.files import write_atomically
from lvr_lite.model.images import open_for_model
from lvr_lite.model.processor import Processor
from lvr_lite.views.drawing import (
    INK,
    PAPER,
    QUIET,
    Colour,
    Font,
    box_colour,
    cell_edges,
    draw_boxes,
    fitted,
    wrapped,
)

# pixels: the least and the greatest side of a picture's place, the space between places, the size
# of text, the height of a line
_SMALLEST = 320
_LARGEST = 960
_GAP = 16
_TEXT = 15
_LINE = 19
# pictures in a row at most
_COLUMNS = 4


@dataclass(frozen=True)
class _View:
    """A sample, its first picture at the size that the model sees, and the rows and columns of its
    visual tokens.
    """

    sample: Sample
    picture: Image.Image
    rows: int
    columns: int


def preview(samples: list[Sample], count: int, out: Path, processor: Processor) -> None:
    """A PNG contact sheet of the first `count` samples, up to four in a row: picture, boxes,
    question and answer.

    Pictures are resized to what a model with this processor sees. They are shown at
    one size, that of the largest, within 320 to 960 pixels, with the grid of visual tokens. Tokens
    that the boxes select keep their colours, all others are washed out. Boxes belong to a sample's
    first picture. Raises DataError for a picture that cannot be read or no samples, OutputError
    where `out` cannot be written.
    """
    if not samples[:count]:
        reason = "no samples to show"
        raise DataError(f"{out}: {reason}; give a file with samples and a count of 1 or more")
    views = [_view(sample, processor) for sample in samples[:count]]
    largest = max(max(view.picture.size) for view in views)
    side = min(_LARGEST, max(_SMALLEST, largest))
    sheet = _sheet([_tile(view, side) for view in views], side)
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    write_atomically(out, file.getvalue())


def _view(sample: Sample, processor: Processor) -> _View:
    picture = open_for_model(sample.images[0])
    rows, columns = processor.token_grid_of(picture)
    cell = processor.image.token_side
    resized = picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    return _View(sample, resized, rows, columns)


def _sheet(tiles: list[Image.Image], side: int) -> Image.Image:
    columns = min(_COLUMNS, len(tiles))
    rows = [
        tiles[i : i + columns]
        for i in range(
            0,
            len(tiles),
            columns,
        )
    ]
    heights = [max(tile.height for tile in row) for row in rows]
    width = _GAP + columns * (side + _GAP)
    height = _GAP + sum(height + _GAP for height in heights)
    sheet = Image.new("RGB", (width, height), PAPER)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            sheet.paste(tile, (_GAP + i * (side + _GAP), y))
        y += height + _GAP
    return sheet


def _tile(view: _View, side: int) -> Image.Image:
    """The picture with its boxes and visual tokens, over its text."""
    picture = _with_tokens(fitted(view.picture, side), view)
    font = ImageFont.load_default(_TEXT)
    lines = _caption(view, font, side)
    tile = Image.new(
        "RGB",
        (side, side + 8 + _LINE * len(lines)),
        PAPER,
    )
    tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    draw = ImageDraw.Draw(tile)
    for i, (line, ink) in enumerate(lines):
        draw.text(
            (0, side + 8 + i * _LINE),
            line,
            fill=ink,
            font=font,
        )
    return tile


def _with_tokens(picture: Image.Image, view: _View) -> Image.Image:
    """The boxes and the tokens that they select: those keep their colours and have a rim in the
    colour of their box, all others are washed out.
    """
    width, height = picture.size
    xs = cell_edges(width, view.columns)
    ys = cell_edges(height, view.rows)
    boxes = view.sample.boxes
    layer = Image.new(
        "RGBA",
        picture.size,
        (*PAPER, 150 if boxes else 0),
    )
    draw = ImageDraw.Draw(layer)
    for i, box in enumerate(boxes):
        rim = (*box_colour(i), 150)
        for token in _tokens(box, view):
            row, column = divmod(token, view.columns)
            cell = (xs[column], ys[row], xs[column + 1] - 1, ys[row + 1] - 1)
            draw.rectangle(cell, fill=(0, 0, 0, 0), outline=rim)
    for x in xs[1:-1]:
        draw.line((x, 0, x, height), fill=(255, 255, 255, 90))
    for y in ys[1:-1]:
        draw.line((0, y, width, y), fill=(255, 255, 255, 90))
    draw_boxes(draw, boxes, picture.size)
    return Image.alpha_composite(picture.convert("RGBA"), layer).convert("RGB")


def _tokens(box: Box, view: _View) -> list[int]:
    tokens: list[int] = tokens_in_box(box, view.rows, view.columns).tolist()
    return tokens


def _caption(
    view: _View,
    font: Font,
    side: int,
) -> list[tuple[str, Colour]]:
    """Lines and their colours: the question, the answer, what the model sees, then id and type,
    each cut to three lines.
    """
    sample = view.sample
    width, height = view.picture.size
    selected = {token for box in sample.boxes for token in _tokens(box, view)}
    texts = (
        (sample.question, INK),
        (f"Answer: {sample.answer}", INK),
        (
            f"Seen at {width} x {height} px: {len(selected)} of {view.columns} x {view.rows} "
            f"visual tokens in {len(sample.boxes)} boxes",
            QUIET,
        ),
        (", ".join(filter(None, (sample.id, sample.type))), QUIET),
    )
    return [
        (line, ink)
        for text, ink in texts
        for line in wrapped(
            text,
            font,
            side,
        )
    ]
