"""The one rule from boxes to visual tokens, and from tokens to the groups that K latent steps stand
for. May import: numpy.

A picture is resized to a grid of `rows` x `columns` visual tokens (a family's `token_grid`), so a
normalized box lies on that grid whatever the picture's size was. A token belongs to a box when the
box covers the centre of the token's cell or at least a quarter of the cell's area. Where no token
does, the box gets the one token in whose cell its centre lies: every box has a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lvr_lite.model.families import Grid
from lvr_lite.model.processor import Processor

# x0, y0, x1, y1
Box = tuple[float, float, float, float]

# the part of a cell that must be covered where its centre is not
COVERED = 0.25
# boxes are written with a few decimals
_ROUNDING = 1e-6


def tokens_in_box(box: Sequence[float], rows: int, columns: int) -> np.ndarray:
    """The visual tokens that a normalized box selects: flat indices (n,) int64, ascending (reading
    order), n >= 1.
    """
    x0, y0, x1, y1 = box
    width, holds_x = _coverage(x0, x1, columns)
    height, holds_y = _coverage(y0, y1, rows)
    holds_centre = holds_y[:, None] & holds_x[None]
    area = height[:, None] * width[None]
    covered = area >= COVERED - _ROUNDING
    selected = holds_centre | covered
    if selected.any():
        return np.flatnonzero(selected).astype(np.int64)
    row = int((y0 + y1) / 2 * rows)
    column = int((x0 + x1) / 2 * columns)
    row = min(row, rows - 1)
    column = min(column, columns - 1)
    return np.array([row * columns + column], np.int64)


def _coverage(
    low: float,
    high: float,
    cells: int,
) -> tuple[np.ndarray, np.ndarray]:
    """On one axis, for each cell: the part of it that [low, high] covers, and whether its centre is
    covered.
    """
    start = np.arange(cells)
    low = low * cells
    high = high * cells
    first = np.maximum(low, start)
    last = np.minimum(high, start + 1)
    part = np.clip(last - first, 0, 1)
    centre = start + 0.5
    after_low = low <= centre + _ROUNDING
    before_high = centre <= high + _ROUNDING
    return part, after_low & before_high


def upright(box: Sequence[float], orientation: int) -> Box:
    """Where a normalized box of a picture's stored pixels lies on the upright picture.

    orientation: EXIF tag 0x0112 (Exif 2.3), 1 to 8; others count as 1. Applied as Pillow's
        `ImageOps.exif_transpose` does.
    """
    x0, y0, x1, y1 = box
    turned = {
        2: (1 - x1, y0, 1 - x0, y1),
        3: (1 - x1, 1 - y1, 1 - x0, 1 - y0),
        4: (x0, 1 - y1, x1, 1 - y0),
        5: (y0, x0, y1, x1),
        6: (1 - y1, x0, 1 - y0, x1),
        7: (1 - y1, 1 - x1, 1 - y0, 1 - x0),
        8: (y0, 1 - x1, y1, 1 - x0),
    }
    return turned.get(orientation, (x0, y0, x1, y1))


def tokens_in_boxes(
    boxes: Sequence[Sequence[float]],
    rows: int,
    columns: int,
) -> list[np.ndarray]:
    """`tokens_in_box` of each box, in the order of the boxes."""
    return [tokens_in_box(box, rows, columns) for box in boxes]


def visual_tokens_in_boxes(
    boxes: Sequence[Sequence[float]], grid: Grid, processor: Processor
) -> list[np.ndarray]:
    """For each box the indices (n,) of its tokens among all visual tokens of a picture.

    grid: of that picture, as `Processor.see` gives it.
    """
    rows, columns = processor.token_grid(grid)
    places = processor.token_places(grid)
    return [places[cells] for cells in tokens_in_boxes(boxes, rows, columns)]


def pool_groups(indices: np.ndarray, steps: int) -> list[np.ndarray]:
    """Token indices (n,), n >= 1, cut into exactly `steps` runs for mean pooling. Their lengths
    differ by one at most.

    With fewer tokens than steps each group holds one token, and tokens repeat, equally often to
    within one. Raises ValueError for no tokens.
    """
    n = len(indices)
    if n == 0 or steps < 1:
        raise ValueError(f"{n} tokens cannot be cut into {steps} groups")
    starts = [i * n // steps for i in range(steps + 1)]
    groups = []
    for start, following in pairwise(starts):
        end = max(following, start + 1)
        groups.append(indices[start:end])
    return groups


def pool_groups_of_boxes(tokens: Sequence[np.ndarray], steps: int) -> list[np.ndarray]:
    """`pool_groups` over several boxes: exactly `steps` groups, in the order of the boxes.

    tokens: of each box, as `tokens_in_boxes` gives them.

    Every box but the last has one group, and the last has all others. The number of steps for a box
    must not depend on the box's size, which is unknown while decoding. With fewer steps than boxes
    the union of all tokens is cut; a token that is in several boxes counts where it comes first.
    Raises ValueError for no boxes.
    """
    if not tokens:
        raise ValueError("no boxes: nothing to pool")
    if steps < len(tokens):
        return pool_groups(_union(tokens), steps)
    *others, last = tokens
    groups = []
    for of_box in others:
        groups += pool_groups(of_box, 1)
    return groups + pool_groups(last, steps - len(groups))


def _union(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """The distinct tokens, in the order in which they come first."""
    every = np.concatenate(tokens)
    _, first = np.unique(every, return_index=True)
    first.sort()
    return every[first].astype(np.int64)
