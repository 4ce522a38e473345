"""The embedded scenes: small pictures that need looking, with exact boxes, from a seed. The module
`drawing` draws them, `questions` asks about them. May import: numpy, the standard library and what
stands above `toy`.

A scene holds three to eight figures of different shapes on a cluttered background. Every figure has
a colour, a pattern and a letter or digit. Shapes are unique within a scene, so a shape names a
figure.

Splits differ in two ways: the seed stream, and the (shape, colour) combinations of `HELD_OUT`,
which the train split never draws.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from lvr_lite.data.boxes import Box

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "arrow", "heart")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
    "cyan": (50, 205, 220),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
PATTERNS = ("plain", "striped", "dotted")
GLYPHS = ("A", "E", "H", "K", "T", "X", "2", "4", "5", "7")
NUMBERS = ("none", "one", "two", "three", "four", "five")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
# Every combination whose indices add up to 3 modulo 8: eight of 64, each shape and each colour
# once.
HELD_OUT = frozenset(
    (shape, colour)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOUR_NAMES)
    if (i + j) % 8 == 3
)
# width and height in pixels: 25, 24 and 24 visual tokens of 28 pixels
SIZES = ((140, 140), (112, 168), (168, 112))
# pixels between two figures
_GAP = 3
# places that are tried for a figure before the scene is planned anew
_TRIES = 60


@dataclass(frozen=True)
class Figure:
    """One figure: what it is and where. x, y: its upper left corner, in pixels; size: its side."""

    shape: str
    colour: str
    pattern: str
    glyph: str
    x: int
    y: int
    size: int

    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """What is drawn. width, height: in pixels. clutter: seed of the background."""

    width: int
    height: int
    figures: tuple[Figure, ...]
    clutter: int

    def box(self, figure: Figure) -> Box:
        """Normalized xyxy box of a figure."""
        right = figure.x + figure.size
        bottom = figure.y + figure.size
        return (
            round(figure.x / self.width, 5),
            round(figure.y / self.height, 5),
            round(right / self.width, 5),
            round(bottom / self.height, 5),
        )

    def cell_words(self, figure: Figure) -> str:
        """Where a figure is on a 3 x 3 grid, such as "top left"."""
        x, y = figure.centre()
        row = int(3 * y / self.height)
        column = int(3 * x / self.width)
        row_word = ROWS[min(2, row)]
        column_word = COLUMNS[min(2, column)]
        return f"{row_word} {column_word}"


# ----------------------------------------------------------------------------------------------
# planning


def plan(
    rng: np.random.Generator,
    split: str,
    count: int | None = None,
    odd: bool = False,
) -> Scene:
    """A random scene. odd: all figures but one share a colour."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    if count is None:
        count = int(rng.integers(4, 8) if odd else rng.integers(3, 9))
    corners = None
    while corners is None:
        sizes = _sizes(rng, count)
        corners = _corners(rng, width, height, sizes)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
    # A small palette makes colours repeat, so that counting and "the red one" both find questions.
    palette = [COLOUR_NAMES[i] for i in rng.permutation(len(COLOURS))[: max(3, count - 1)]]
    figures = []
    for shape, (x, y), size in zip(shapes, corners, sizes, strict=True):
        colour = random_colour(rng, shape, split, palette)
        pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
        glyph = GLYPHS[int(rng.integers(len(GLYPHS)))]
        figures.append(
            Figure(shape=shape, colour=colour, pattern=pattern, glyph=glyph, x=x, y=y, size=size)
        )
    # They are planned largest first, and the odd one may have any size.
    figures = [figures[i] for i in rng.permutation(count)]
    if odd:
        figures = _with_odd_one(rng, figures, split)
    return Scene(
        width=width, height=height, figures=tuple(figures), clutter=int(rng.integers(2**31))
    )


def _sizes(rng: np.random.Generator, count: int) -> list[int]:
    """Side lengths in pixels, largest first: at most two of several visual tokens, the rest about
    one or below.
    """
    most = 2 if count <= 5 else 1
    large = int(rng.integers(0, most + 1))
    large = min(large, count)
    sizes = [int(rng.integers(40, 57)) for _ in range(large)]
    small = [int(rng.integers(15, 33)) for _ in range(count - large)]
    small.sort(reverse=True)
    return sizes + small


def _corners(
    rng: np.random.Generator, width: int, height: int, sizes: list[int]
) -> list[tuple[int, int]] | None:
    """Upper left corners of squares that do not touch, or None where a square found no room."""
    squares: list[tuple[int, int, int]] = []
    for size in sizes:
        for _ in range(_TRIES):
            x = int(rng.integers(1, width - size))
            y = int(rng.integers(1, height - size))
            if all(_are_apart((x, y, size), other) for other in squares):
                squares.append((x, y, size))
                break
        else:
            return None
    return [(x, y) for x, y, _ in squares]


def _are_apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether a gap is between two squares (x, y, size)."""
    x, y, size = one
    other_x, other_y, other_size = other
    return (
        x + size + _GAP <= other_x
        or other_x + other_size + _GAP <= x
        or y + size + _GAP <= other_y
        or other_y + other_size + _GAP <= y
    )


def random_colour(
    rng: np.random.Generator,
    shape: str,
    split: str,
    colours: list[str],
) -> str:
    """One of these colours that the split may give to the shape."""
    allowed = colours
    if split != "test":
        allowed = [colour for colour in colours if (shape, colour) not in HELD_OUT]
    return allowed[int(rng.integers(len(allowed)))]


def _with_odd_one(
    rng: np.random.Generator,
    figures: list[Figure],
    split: str,
) -> list[Figure]:
    """The same figures, all of one colour but the last."""
    banned: set[str] = set()
    for figure in figures:
        banned.update(_banned_colours(figure, split))
    # Never empty: a scene with an odd one has at most seven figures.
    free = [colour for colour in COLOUR_NAMES if colour not in banned]
    shared = free[int(rng.integers(len(free)))]
    other = random_colour(
        rng,
        figures[-1].shape,
        split,
        without(COLOUR_NAMES, shared),
    )
    counts = Counter(figure.pattern for figure in figures)
    if len(counts) == 2 and min(counts.values()) == 1:
        # Another figure would be odd by its pattern.
        figures = [replace(f, pattern=PATTERNS[i % 2]) for i, f in enumerate(figures)]
    *alike, odd = figures
    recoloured = [replace(figure, colour=shared) for figure in alike]
    recoloured.append(replace(odd, colour=other))
    return recoloured


def _banned_colours(figure: Figure, split: str) -> list[str]:
    if split == "test":
        return []
    return [colour for colour in COLOUR_NAMES if (figure.shape, colour) in HELD_OUT]


def without(words: tuple[str, ...], word: str) -> list[str]:
    return [other for other in words if other != word]
