"""The one rule from boxes to visual tokens, and from tokens to the groups that K latent steps stand
for. May import: numpy.

A picture is resized to a grid of `rows` x `columns` visual tokens (a family's `token_grid`), so a
normalized box goes straight onto that grid, whatever the picture's size was. A token belongs to a
box when the box covers the centre of the token's cell or at least a quarter of the cell's area.
Where no token does, the one token in whose cell the box's centre lies belongs to it: never none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lvr_lite.model.families import Grid
from lvr_lite.model.processor import Processor

Box = tuple[float, float, float, float]

COVERED = 0.25  # the part of a cell that must be covered, where its centre is not
_ROUNDING = 1e-6  # boxes are written with a few decimals


def tokens_in_box(box: Sequence[float], rows: int, columns: int) -> np.ndarray:
    """Flat indices (n,) int64, ascending (reading order), n >= 1, of the visual tokens that a
    normalized xyxy box selects.
    """
    x0, y0, x1, y1 = box
    width, across = _along(x0, x1, columns)
    height, down = _along(y0, y1, rows)
    covered = (down[:, None] & across[None]) | (
        height[:, None] * width[None] >= COVERED - _ROUNDING
    )
    if covered.any():
        return np.flatnonzero(covered).astype(np.int64)
    row, column = (
        min(int((y0 + y1) / 2 * rows), rows - 1),
        min(int((x0 + x1) / 2 * columns), columns - 1),
    )
    return np.array([row * columns + column], np.int64)


def upright(box: Sequence[float], orientation: int) -> Box:
    """A normalized box of a picture's stored pixels, where it lies once the EXIF orientation (1 to
    8; others are 1) is applied, as Pillow's `ImageOps.exif_transpose` applies it (Exif 2.3, tag
    0x0112).
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


def _along(low: float, high: float, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """On one axis, for each cell: the part of it that [low, high] covers, and whether its centre is
    covered.
    """
    start = np.arange(cells)
    part = np.clip(np.minimum(high * cells, start + 1) - np.maximum(low * cells, start), 0, 1)
    return part, (low * cells <= start + 0.5 + _ROUNDING) & (
        start + 0.5 <= high * cells + _ROUNDING
    )


def tokens_in_boxes(boxes: Sequence[Sequence[float]], rows: int, columns: int) -> list[np.ndarray]:
    """`tokens_in_box` of each box, in the order of the boxes."""
    return [tokens_in_box(box, rows, columns) for box in boxes]


def visual_tokens_in_boxes(
    boxes: Sequence[Sequence[float]], grid: Grid, processor: Processor
) -> list[np.ndarray]:
    """For each box the indices (n,) of its tokens among all visual tokens of a picture.

    grid: of that picture, as `Processor.see` gives it.
    """
    places = processor.token_places(grid)
    return [places[cells] for cells in tokens_in_boxes(boxes, *processor.token_grid(grid))]


def pool_groups(indices: np.ndarray, steps: int) -> list[np.ndarray]:
    """Token indices (n,), n >= 1, cut into exactly `steps` runs for mean pooling; their lengths
    differ by one at most.

    Fewer tokens than steps: each group holds one token, and tokens repeat, equally often to within
    one. Raises ValueError for no tokens.
    """
    n = len(indices)
    if n == 0 or steps < 1:
        raise ValueError(f"{n} tokens cannot be cut into {steps} groups")
    starts = [i * n // steps for i in range(steps + 1)]
    return [indices[a : max(b, a + 1)] for a, b in pairwise(starts)]


def pool_groups_of_boxes(tokens: Sequence[np.ndarray], steps: int) -> list[np.ndarray]:
    """`pool_groups` over several boxes: exactly `steps` groups, in the order of the boxes. tokens:
    what `tokens_in_boxes` gave.

    Every box but the last has one group, the last has the rest: how long a look takes does not hang
    on sizes that are not known before it. With fewer steps than boxes the union of all tokens is
    cut, each token taken where it comes first. Raises ValueError for no boxes.
    """
    if not tokens:
        raise ValueError("no boxes: nothing to pool")
    if steps < len(tokens):
        return pool_groups(_union(tokens), steps)
    groups = [pool_groups(t, 1)[0] for t in tokens[:-1]]
    return groups + pool_groups(tokens[-1], steps - len(groups))


def _union(tokens: Sequence[np.ndarray]) -> np.ndarray:
    return np.array(list(dict.fromkeys(int(i) for t in tokens for i in t)), np.int64)
