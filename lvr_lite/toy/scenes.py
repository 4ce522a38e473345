"""The embedded scenes: small pictures that need looking, with exact boxes and questions, from a
seed. `lvr_lite.toy.drawing` draws them. May import: numpy, the standard library and what stands
above `toy`.

A scene holds three to eight figures of different shapes on a cluttered background. Every figure has
a colour, a pattern and a letter or digit. Shapes are unique within a scene, so a shape names a
figure.

Splits differ in two ways: the seed stream, and the (shape, colour) combinations of `HELD_OUT`,
which the train split never draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
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
CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
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
# question types that the embedded model met before tuning
PRETRAINED = ("attribute", "letter", "position", "count", "odd", "pair")
QUESTION_TYPES = (*PRETRAINED, "odd-letter", "odd-pattern")
# question types that it learned in pre-training and that the scenes' own questions do not contain
SKILLS = ("caption", "place", "short")

# pixels between two figures, and between two centres that a position is asked about
_GAP = 3
_APART = 14
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
        return (
            round(figure.x / self.width, 5),
            round(figure.y / self.height, 5),
            round((figure.x + figure.size) / self.width, 5),
            round((figure.y + figure.size) / self.height, 5),
        )

    def cell_words(self, figure: Figure) -> str:
        """Where a figure is on a 3 x 3 grid, such as "top left"."""
        x, y = figure.centre()
        row = min(2, int(3 * y / self.height))
        column = min(2, int(3 * x / self.width))
        return f"{ROWS[row]} {COLUMNS[column]}"


@dataclass(frozen=True)
class Question:
    """One question to a scene.

    choices: all possible answers.
    figures: what must be looked at.
    short: a note-like wording of the same question, in which the embedded model was pre-trained.
    """

    type: str
    text: str
    answer: str
    choices: tuple[str, ...]
    figures: tuple[Figure, ...]
    short: str


# ----------------------------------------------------------------------------------------------
# planning


def plan(
    rng: np.random.Generator, split: str, count: int | None = None, odd: bool = False
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
        colour = _colour(rng, shape, split, palette)
        pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
        glyph = GLYPHS[int(rng.integers(len(GLYPHS)))]
        figures.append(Figure(shape, colour, pattern, glyph, x, y, size))
    # They are planned largest first, and the odd one may have any size.
    figures = [figures[i] for i in rng.permutation(count)]
    if odd:
        figures = _with_odd_one(rng, figures, split)
    return Scene(width, height, tuple(figures), int(rng.integers(2**31)))


def _sizes(rng: np.random.Generator, count: int) -> list[int]:
    """Side lengths in pixels, largest first: at most two of several visual tokens, the rest about
    one or below.
    """
    large = int(rng.integers(0, 3)) if count <= 5 else int(rng.integers(0, 2))
    sizes = [int(rng.integers(40, 57)) for _ in range(min(large, count))]
    small = [int(rng.integers(15, 33)) for _ in range(count - len(sizes))]
    return sizes + sorted(small, reverse=True)


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


def _colour(rng: np.random.Generator, shape: str, split: str, colours: list[str]) -> str:
    """One of these colours that the split may give to the shape."""
    allowed = [c for c in colours if split == "test" or (shape, c) not in HELD_OUT]
    return allowed[int(rng.integers(len(allowed)))]


def _with_odd_one(rng: np.random.Generator, figures: list[Figure], split: str) -> list[Figure]:
    """The same figures, all of one colour but the last."""
    banned = {colour for figure in figures for colour in _banned_colours(figure, split)}
    # Never empty: a scene with an odd one has at most seven figures.
    free = [colour for colour in COLOUR_NAMES if colour not in banned]
    shared = free[int(rng.integers(len(free)))]
    other = _colour(rng, figures[-1].shape, split, _without(COLOUR_NAMES, shared))
    patterns = [figure.pattern for figure in figures]
    counts = [patterns.count(pattern) for pattern in set(patterns)]
    if len(counts) == 2 and min(counts) == 1:
        # Another figure would be odd by its pattern.
        figures = [replace(f, pattern=PATTERNS[i % 2]) for i, f in enumerate(figures)]
    alike = [replace(figure, colour=shared) for figure in figures[:-1]]
    return [*alike, replace(figures[-1], colour=other)]


def _banned_colours(figure: Figure, split: str) -> list[str]:
    if split == "test":
        return []
    return [colour for colour in COLOUR_NAMES if (figure.shape, colour) in HELD_OUT]


def _without(words: tuple[str, ...], word: str) -> list[str]:
    return [other for other in words if other != word]


# ----------------------------------------------------------------------------------------------
# questions


def _pick(rng: np.random.Generator, scene: Scene, count: int = 1) -> list[Figure]:
    return [scene.figures[i] for i in rng.permutation(len(scene.figures))[:count]]


def _ask_detail(kind: str, detail: str, figure: Figure) -> Question:
    """A question about the colour, pattern or letter of the figure of a shape."""
    choices = {"colour": COLOUR_NAMES, "pattern": PATTERNS, "letter": GLYPHS}[detail]
    answers = {"colour": figure.colour, "pattern": figure.pattern, "letter": figure.glyph}
    verb = "is on" if detail == "letter" else "is"
    text = f"what {detail} {verb} the {figure.shape}"
    short = f"{detail} {figure.shape}"
    return Question(kind, text, answers[detail], choices, (figure,), short)


def ask_attribute(rng: np.random.Generator, scene: Scene) -> Question:
    """Colour or pattern of the figure of a shape, or the shape of the only figure of a colour."""
    (figure,) = _pick(rng, scene)
    kind = int(rng.integers(4))
    colour = figure.colour
    if kind == 3 and sum(other.colour == colour for other in scene.figures) == 1:
        text = f"what shape is {colour}"
        return Question("attribute", text, figure.shape, SHAPES, (figure,), f"shape {colour}")
    return _ask_detail("attribute", "pattern" if kind == 2 else "colour", figure)


def ask_letter(rng: np.random.Generator, scene: Scene) -> Question:
    """The letter or digit on a named figure."""
    (figure,) = _pick(rng, scene)
    return _ask_detail("letter", "letter", figure)


def ask_position(rng: np.random.Generator, scene: Scene) -> Question:
    """Left or right, above or below: the pair and the axis whose centres are at least 14 pixels
    apart.
    """
    for _ in range(20):
        a, b = _pick(rng, scene, 2)
        axis = int(rng.integers(2))
        distance = a.centre()[axis] - b.centre()[axis]
        if abs(distance) < _APART:
            continue
        words = (("left", "right"), ("above", "below"))[axis]
        answer = words[0] if distance < 0 else words[1]
        relation = ("left or right of", "above or below")[axis]
        text = f"{relation} the {b.shape} is the {a.shape}"
        short = f"{('across', 'down')[axis]} {b.shape} {a.shape}"
        return Question("position", text, answer, words, (a, b), short)
    return ask_position(rng, replace(scene, figures=scene.figures[::-1]))


def ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    """How many figures have a colour or a pattern. One in six questions about a colour names one at
    random, which may be absent. There is no one place to look at, so it has no figures.
    """
    (figure,) = _pick(rng, scene)
    if rng.random() < 0.5:
        word = figure.pattern
        count = sum(other.pattern == word for other in scene.figures)
    else:
        word = figure.colour if rng.random() < 0.83 else str(rng.choice(COLOUR_NAMES))
        count = sum(other.colour == word for other in scene.figures)
    if count >= len(NUMBERS):
        return ask_count(rng, scene)
    text = f"how many are {word}"
    return Question("count", text, NUMBERS[count], NUMBERS, (), f"count {word}")


def ask_odd(_: np.random.Generator, scene: Scene) -> Question:
    """The shape of the one figure that differs; for scenes planned with `odd=True`."""
    figure = _odd_one(scene)
    text = "which shape is the odd one out"
    return Question("odd", text, figure.shape, SHAPES, (figure,), "odd")


def ask_odd_letter(_: np.random.Generator, scene: Scene) -> Question:
    """The letter on the one figure that differs, which must be found before it can be read."""
    figure = _odd_one(scene)
    text = "what letter is on the odd one out"
    return Question("odd-letter", text, figure.glyph, GLYPHS, (figure,), "letter odd")


def ask_odd_pattern(_: np.random.Generator, scene: Scene) -> Question:
    """The pattern of the one figure that differs in colour."""
    figure = _odd_one(scene)
    text = "what pattern is the odd one out"
    return Question("odd-pattern", text, figure.pattern, PATTERNS, (figure,), "pattern odd")


def _odd_one(scene: Scene) -> Figure:
    (figure,) = (figure for figure in scene.figures if _is_odd(scene, figure))
    return figure


def _is_odd(scene: Scene, figure: Figure) -> bool:
    others = {other.colour for other in scene.figures if other is not figure}
    return len(scene.figures) > 2 and len(others) == 1 and figure.colour not in others


def has_odd(scene: Scene) -> bool:
    """Whether one figure can be called the odd one out."""
    return any(_is_odd(scene, figure) for figure in scene.figures)


def make_twin(
    rng: np.random.Generator, scene: Scene, split: str
) -> tuple[Scene, Question, Question]:
    """The same scene with one detail of one figure changed, and the question whose answer that
    changes.

    Returns (twin, question to the scene, question to the twin).
    """
    (figure,) = _pick(rng, scene)
    detail = ("colour", "pattern", "letter")[int(rng.integers(3))]
    if detail == "colour":
        colours = _without(COLOUR_NAMES, figure.colour)
        other = replace(figure, colour=_colour(rng, figure.shape, split, colours))
    elif detail == "pattern":
        other = replace(figure, pattern=str(rng.choice(_without(PATTERNS, figure.pattern))))
    else:
        other = replace(figure, glyph=str(rng.choice(_without(GLYPHS, figure.glyph))))
    figures = tuple(other if one is figure else one for one in scene.figures)
    twin = replace(scene, figures=figures)
    return twin, _ask_detail("pair", detail, figure), _ask_detail("pair", detail, other)


def describe(scene: Scene) -> str:
    """A caption: every figure in reading order with colour, pattern, letter and place. It is used to
    pre-train the embedded model.
    """
    rows = sorted(
        scene.figures, key=lambda f: (int(3 * f.centre()[1] / scene.height), f.centre()[0])
    )
    phrases = [f"{f.shape} {f.colour} {f.pattern} {f.glyph} {scene.cell_words(f)}" for f in rows]
    return " ; ".join(phrases)


Ask = Callable[[np.random.Generator, Scene], Question]
ASK: dict[str, Ask] = {
    "attribute": ask_attribute,
    "letter": ask_letter,
    "position": ask_position,
    "count": ask_count,
    "odd": ask_odd,
    "odd-letter": ask_odd_letter,
    "odd-pattern": ask_odd_pattern,
}


def items(
    seed: int, split: str, count: int, types: tuple[str, ...] = QUESTION_TYPES
) -> Iterator[tuple[str, Scene, Question, str | None]]:
    """`count` questions with their scenes: (id, scene, question, pair id or None).

    The types take turns, and a pair takes two places; item i depends on (seed, split, i) alone.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, not {split}")
    stream = zlib.crc32(split.encode())
    i = 0
    while i < count:
        kind = types[(i // 2) % len(types)]
        rng = np.random.default_rng([stream, seed, i])
        name = f"{split}-{seed}-{i:06d}"
        if kind == "pair":
            scene = plan(rng, split)
            twin, first, second = make_twin(rng, scene, split)
            yield f"{name}a", scene, first, name
            if i + 1 < count:
                yield f"{name}b", twin, second, name
            i += 2
            continue
        scene = plan(rng, split, odd=kind.startswith("odd"))
        yield name, scene, ASK[kind](rng, scene), None
        i += 1


# ----------------------------------------------------------------------------------------------
# skills


def ask_place(rng: np.random.Generator, scene: Scene) -> Question:
    """Where the figure of a shape is, in the wording of pre-training."""
    (figure,) = _pick(rng, scene)
    text = f"where {figure.shape}"
    return Question("place", text, scene.cell_words(figure), CELLS, (figure,), text)


def ask_short(rng: np.random.Generator, scene: Scene, kind: str, split: str) -> Question:
    """A question of one of the types PRETRAINED in its short wording; of a pair the question to the
    scene itself.
    """
    question = make_twin(rng, scene, split)[1] if kind == "pair" else ASK[kind](rng, scene)
    return replace(question, type="short", text=question.short)


def skills(
    seed: int, count: int, split: str = "test", types: tuple[str, ...] = SKILLS
) -> Iterator[tuple[str, Scene, Question]]:
    """`count` questions of the kinds that the embedded model was pre-trained in, beside those of
    the scenes: (id, scene, question).

    The types take turns, and within "short" those of PRETRAINED; item i depends on (seed, split,
    types, i) alone.
    """
    stream = zlib.crc32(b"skills" if split == "test" else b"skills train")
    prefix = "skill" if split == "test" else "replay"
    for i in range(count):
        rng = np.random.default_rng([stream, seed, i])
        skill = types[i % len(types)]
        kind = PRETRAINED[i // len(types) % len(PRETRAINED)]
        scene = plan(rng, split, odd=(skill, kind) == ("short", "odd"))
        if skill == "caption":
            caption = describe(scene)
            question = Question("caption", "describe", caption, (), scene.figures, "describe")
        elif skill == "place":
            question = ask_place(rng, scene)
        else:
            question = ask_short(rng, scene, kind, split)
        yield f"{prefix}-{seed}-{i:06d}", scene, question
