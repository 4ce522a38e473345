"""`--look`: which visual tokens each latent step is nearest to, as heat maps over the pictures. May
import: numpy, Pillow and what stands above `views`.

Nearness is `lvr_lite.model.latents.likeness`, by which a bottleneck finds the places of its latents
too: a cosine, after the picture's mean of its visual tokens is taken from each. Nothing is taken
from the latents: a mean over the few steps would remove what they agree on, and the mean over many
answers, which `probe` takes for its R@1, one answer does not have. The price: a latent that has the
tokens' mean in it leans to tokens that lie along this mean, even one that equals another token.
What a latent is near to is not what the answer hangs on: that is for `probe`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lvr_lite.errors import LvrError, UsageError
from lvr_lite.files import write_atomically
from lvr_lite.generate.decode import Prompt, Result
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.latents import likeness
from lvr_lite.model.spec import LatentSpec
from lvr_lite.views.drawing import (
    INK,
    PAPER,
    QUIET,
    Colour,
    Font,
    cell_edges,
    draw_boxes,
    fitted,
    wrapped,
)

MEANING = "colour: cosine with each visual token less their mean; white frame: the highest"
NOTE = "nearest visual tokens; whether the latents are used is what lvr-lite probe measures"

# ten steps of viridis (matplotlib, CC0): lightness rises evenly, and it reads in grey and for
# colour-blind eyes
SCALE: tuple[Colour, ...] = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip
# How much of a panel is colour, and the brightness of the grey picture beneath it.
_TINT = 0.6
_DIM = 0.75
# In pixels: a picture's longer side, the space between, the size of text, a line of text.
_SIDE = 224
_GAP = 16
_TEXT = 15
_LINE = 20
# Panels in a line.
_ACROSS = 5
# Pixels that the nearest token's frame measures at least, where the picture has them.
_FRAME = 11


@dataclass(frozen=True)
class View:
    """A picture, the rows and columns of its visual tokens, and how near each latent step is to
    each token: (K, rows * columns).
    """

    picture: Image.Image
    grid: tuple[int, int]
    similarities: np.ndarray

    def nearest(self, step: int) -> tuple[int, int, float]:
        """Row and column of the token that latent step `step` (from 0) is nearest to, and its
        similarity.
        """
        similarities = self.similarities[step]
        token = int(similarities.argmax())
        _, columns = self.grid
        row, column = divmod(token, columns)
        return row, column, float(similarities[token])


def refuse(out: Path, images: Sequence[str], latent: LatentSpec, steps: int | None) -> None:
    """Raises UsageError where a call has nothing to look at (no picture, no latents of the model's
    own) or would write over a picture.

    images: paths; steps: as in `Options`.
    """
    if any(Path(image).resolve() == out.resolve() for image in images):
        raise UsageError(f"--look {out}: is the picture itself; choose another file")
    if not images:
        raise UsageError(
            "--look: nothing to look at without a picture; give one before the question"
        )
    if not latent.steps:
        raise UsageError(
            "--look: this model was not tuned for latent steps, so there is nothing to look at; "
            "see `lvr-lite finetune`"
        )
    if steps == 0:
        raise UsageError(
            "--look: nothing to look at with --steps 0 or --look never; leave one of them out"
        )
    if latent.feedback == "token":
        raise UsageError(
            "--look: this model feeds a fixed token in place of latents, so there is nothing to "
            "look at"
        )


def answer_views(
    runtime: Runtime, pictures: Sequence[Image.Image], prompt: Prompt, result: Result
) -> list[View]:
    """What the latents of an answer are near to, in each of the prompt's pictures. Raises LvrError
    for an answer without latents.
    """
    if not result.latents:
        raise LvrError(
            "--look: the model answered without latent steps this time, so there is nothing to "
            "look at"
        )
    processor = runtime.processor
    latents = np.stack(result.latents)
    views = []
    end = 0
    for picture in pictures:
        grid = processor.grid_of(picture.height, picture.width)
        start = end
        end += processor.visual_tokens(grid)
        similarities = likeness(latents, prompt.features[start:end])
        view = View(
            picture=picture,
            grid=processor.token_grid(grid),
            similarities=similarities[:, processor.token_places(grid)],
        )
        views.append(view)
    assert end == len(prompt.features), f"{end} places for {len(prompt.features)} visual tokens"
    return views


def bounds(views: Sequence[View]) -> tuple[float, float]:
    """The lowest and highest similarity of all steps and pictures: the one scale by which panels
    compare.
    """
    lows = [float(view.similarities.min()) for view in views]
    highs = [float(view.similarities.max()) for view in views]
    return min(lows), max(highs)


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (...) -> (..., 3) uint8: `SCALE` from low to high."""
    shares = (values - low) / max(high - low, 1e-9)
    places = np.clip(shares, 0, 1) * (len(SCALE) - 1)
    steps = np.arange(len(SCALE))
    channels = np.array(SCALE, float).T
    mixed = [np.interp(places, steps, channel) for channel in channels]
    rounded = np.stack(mixed, -1).round()
    return np.asarray(rounded, np.uint8)


def panel(view: View, step: int, scale: tuple[float, float], side: int = _SIDE) -> Image.Image:
    """One latent step: the picture in dim grey under its tokens' colours, the nearest token
    outlined; the longer side has `side` pixels.
    """
    picture = fitted(view.picture.convert("RGB"), side)
    rows, columns = view.grid
    similarities = view.similarities[step].reshape(rows, columns)
    cells = Image.fromarray(colours(similarities, *scale))
    heat = cells.resize(picture.size, Image.Resampling.NEAREST)
    grey = picture.convert("L")
    dim = grey.point(lambda value: value * _DIM).convert("RGB")
    drawn = Image.blend(dim, heat, _TINT)
    row, column, _ = view.nearest(step)
    x0, x1 = _framed(column, columns, picture.width)
    y0, y1 = _framed(row, rows, picture.height)
    draw = ImageDraw.Draw(drawn)
    # A black line around the white one, which then shows on yellow too.
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0))
    draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255), width=2)
    return drawn


def _framed(cell: int, cells: int, length: int) -> tuple[int, int]:
    """First and last pixel of a frame around one of `cells` cells along `length` pixels; around a
    tiny cell it is wider than the cell.
    """
    edges = cell_edges(length, cells)
    start = edges[cell]
    end = edges[cell + 1]
    spare = max(0, _FRAME - (end - start) + 1) // 2
    first = max(0, start - spare)
    last = min(length, end + spare) - 1
    return first, last


def heat_maps(
    views: Sequence[View],
    question: str,
    answer: str,
    expected: str | None = None,
    boxes: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """Question and answer; for each picture the picture itself and a panel for each latent step;
    then the scale, one for all panels.

    boxes: normalized xyxy, drawn on the first picture.
    """
    font = ImageFont.load_default(_TEXT)
    across = min(_ACROSS, 1 + len(views[0].similarities))
    width = across * (_SIDE + _GAP) - _GAP
    texts = [(question, INK), (f"answer: {answer or '(nothing)'}", INK)]
    if expected:
        texts.append((f"expected: {expected}", QUIET))
    scale = bounds(views)
    blocks = [_text(texts, width, font)]
    for view in views:
        tiles = _tiles(view, scale, boxes, font)
        # They are of the first picture.
        boxes = ()
        for first in range(0, len(tiles), across):
            line = tiles[first : first + across]
            blocks.append(_beside(line, width))
    blocks.append(_bar(scale, width, font))
    blocks.append(_text([(MEANING, QUIET), (NOTE, QUIET)], width, font))
    height = _GAP + sum(block.height + _GAP for block in blocks)
    sheet = Image.new("RGB", (width + 2 * _GAP, height), PAPER)
    y = _GAP
    for block in blocks:
        sheet.paste(block, (_GAP, y))
        y += block.height + _GAP
    return sheet


def _text(texts: Sequence[tuple[str, Colour]], width: int, font: Font) -> Image.Image:
    """Texts below each other, each wrapped to the width."""
    lines: list[tuple[str, Colour]] = []
    for text, ink in texts:
        lines += [(line, ink) for line in wrapped(text, font, width)]
    block = Image.new("RGB", (width, _LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(block)
    for i, (line, ink) in enumerate(lines):
        draw.text((0, i * _LINE), line, fill=ink, font=font)
    return block


def _tiles(
    view: View, scale: tuple[float, float], boxes: Sequence[Sequence[float]], font: Font
) -> list[Image.Image]:
    """The picture with its boxes, then the panels, each with its line of text below."""
    picture = fitted(view.picture.convert("RGB"), _SIDE)
    draw_boxes(ImageDraw.Draw(picture), boxes, picture.size)
    tiles = [_labelled(picture, "the picture", font)]
    for step in range(len(view.similarities)):
        _, _, similarity = view.nearest(step)
        label = f"step {step + 1}: {similarity:.2f}"
        tiles.append(_labelled(panel(view, step, scale), label, font))
    return tiles


def _labelled(image: Image.Image, label: str, font: Font) -> Image.Image:
    top = image.height + 4
    tile = Image.new("RGB", (_SIDE, top + _LINE), PAPER)
    tile.paste(image, (0, 0))
    draw = ImageDraw.Draw(tile)
    draw.text((0, top), label, fill=INK, font=font)
    return tile


def _beside(tiles: Sequence[Image.Image], width: int) -> Image.Image:
    height = max(tile.height for tile in tiles)
    line = Image.new("RGB", (width, height), PAPER)
    x = 0
    for tile in tiles:
        line.paste(tile, (x, 0))
        x += _SIDE + _GAP
    return line


def _bar(scale: tuple[float, float], width: int, font: Font) -> Image.Image:
    """The colour bar, its two ends in numbers at its sides."""
    low, high = (f"{value:.2f}" for value in scale)
    block = Image.new("RGB", (width, _LINE), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 0), low, fill=INK, font=font)
    left = round(font.getlength(low)) + 8
    line = np.linspace(0, 1, _SIDE)
    strip = colours(line[None].repeat(_LINE - 4, 0), 0, 1)
    block.paste(Image.fromarray(strip), (left, 2))
    right = left + _SIDE + 8
    draw.text((right, 0), high, fill=INK, font=font)
    return block


def write_look(path: Path, sheet: Image.Image) -> None:
    """Write a PNG, whole or not at all. Raises OutputError where it cannot be written."""
    file = io.BytesIO()
    sheet.save(file, "PNG")
    write_atomically(path, file.getvalue())
