"""The embedded scenes: small pictures that need looking, with exact boxes and questions, from a
seed.

A scene holds three to eight objects of different shapes on a cluttered background. Every object has
a colour, a pattern and a letter or digit; shapes are unique within a scene, so a shape names an
object. May import: numpy, Pillow, the standard library.

Splits differ in two ways: the seed stream, and the (shape, colour) combinations of `HELD_OUT`,
which the train split never draws.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

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
PATTERNS = ("plain", "striped", "dotted")
NUMBERS = ("none", "one", "two", "three", "four", "five")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
# Every combination whose indices add up to 3 modulo 8: eight of 64, each shape and each colour
# once.
HELD_OUT = frozenset(
    (s, c) for i, s in enumerate(SHAPES) for j, c in enumerate(COLOURS) if (i + j) % 8 == 3
)
SIZES = ((140, 140), (112, 168), (168, 112))  # width, height: 25, 24 and 24 visual tokens of 28 px
QUESTION_TYPES = (
    "attribute",
    "letter",
    "position",
    "count",
    "odd",
    "pair",
    "odd-letter",
    "odd-pattern",
)
PRETRAINED = (
    "attribute",
    "letter",
    "position",
    "count",
    "odd",
    "pair",
)  # those that the embedded model met before tuning
SKILLS = ("caption", "place", "short")  # what it learned in pre-training and the suite never asks

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
GLYPHS = tuple(_GLYPHS)
_GLYPH_MASKS = {
    g: Image.fromarray(
        np.array([[int(c) * 255 for c in row] for row in rows.split()], dtype=np.uint8)
    )
    for g, rows in _GLYPHS.items()
}


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where; `x`, `y`, `size` in pixels, (x, y) its upper left
    corner.
    """

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
    """A drawn scene's plan: `width`, `height` in pixels; `clutter` seeds the background."""

    width: int
    height: int
    things: tuple[Thing, ...]
    clutter: int

    def box(self, thing: Thing) -> Box:
        """Normalized xyxy box of `thing`."""
        return (
            round(thing.x / self.width, 5),
            round(thing.y / self.height, 5),
            round((thing.x + thing.size) / self.width, 5),
            round((thing.y + thing.size) / self.height, 5),
        )

    def cell_words(self, thing: Thing) -> str:
        """Where a thing is on a 3 x 3 grid, such as "top left"."""
        cx, cy = thing.centre()
        return (
            f"{ROWS[min(2, int(3 * cy / self.height))]} {COLUMNS[min(2, int(3 * cx / self.width))]}"
        )


@dataclass(frozen=True)
class Question:
    """One question to a scene: `things` are what must be looked at, `choices` all possible answers,
    `short` a note-like wording of the same question, in which the embedded model was
    pre-trained.
    """

    type: str
    text: str
    answer: str
    choices: tuple[str, ...]
    things: tuple[Thing, ...]
    short: str


# ---------------------------------------------------------------------------------------------------------------
# drawing


def _outline(shape: str, s: float) -> list[tuple[float, float]]:
    """Polygon of a shape in a square of side `s` pixels."""
    c = s / 2
    if shape == "square":
        return [
            (s * 0.08, s * 0.08),
            (s * 0.92, s * 0.08),
            (s * 0.92, s * 0.92),
            (s * 0.08, s * 0.92),
        ]
    if shape == "triangle":
        return [(c, 0), (s, s * 0.94), (0, s * 0.94)]
    if shape == "diamond":
        return [(c, 0), (s * 0.88, c), (c, s), (s * 0.12, c)]
    if shape == "star":
        spokes = [
            (c if i % 2 == 0 else c * 0.46, -math.pi / 2 + i * math.pi / 5) for i in range(10)
        ]
        return [(c + r * math.cos(t), c + r * math.sin(t)) for r, t in spokes]
    if shape == "cross":
        a, b = s * 0.32, s * 0.68
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (s, a),
            (s, b),
            (b, b),
            (b, s),
            (a, s),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    if shape == "arrow":
        a, b = s * 0.3, s * 0.7
        return [(c, 0), (s, s * 0.5), (b, s * 0.5), (b, s), (a, s), (a, s * 0.5), (0, s * 0.5)]
    if shape == "heart":
        turns = [i * math.pi / 12 for i in range(24)]
        return [
            (
                c + c * math.sin(t) ** 3,
                c * 0.9
                - c
                * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 17,
            )
            for t in turns
        ]
    raise ValueError(shape)


def _shape_mask(shape: str, size: int) -> Image.Image:
    scale = 3
    s = size * scale
    mask = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((s * 0.03, s * 0.03, s * 0.97, s * 0.97), fill=255)
    else:
        draw.polygon(_outline(shape, s - 1), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _fill(colour: tuple[int, int, int], pattern: str, size: int) -> Image.Image:
    fill = Image.new("RGB", (size, size), colour)
    if pattern == "plain":
        return fill
    draw = ImageDraw.Draw(fill)
    dark = tuple(int(v * 0.42) for v in colour)
    step = max(4, size // 6)
    if pattern == "striped":
        for y in range(0, size, step):
            draw.rectangle((0, y, size, y + step // 2 - 1), fill=dark)
    else:
        r = max(1, step // 3)
        for row, y in enumerate(range(step // 2, size, step)):
            for x in range(step // 2 + (row % 2) * (step // 2), size, step):
                draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=dark)
    return fill


def _draw_thing(picture: Image.Image, thing: Thing) -> None:
    picture.paste(
        _fill(COLOURS[thing.colour], thing.pattern, thing.size),
        (thing.x, thing.y),
        _shape_mask(thing.shape, thing.size),
    )
    scale = max(1, round(thing.size * 0.42 / 7))
    glyph = _GLYPH_MASKS[thing.glyph].resize((5 * scale, 7 * scale), Image.Resampling.NEAREST)
    low = 0.62 if thing.shape == "triangle" else 0.5  # the body of a triangle lies low
    x = thing.x + (thing.size - glyph.width) // 2
    y = thing.y + round(thing.size * low - glyph.height / 2)
    for dx, dy in (
        (-1, 0),
        (1, 0),
        (0, -1),
        (0, 1),
    ):  # a dark rim, so that it reads on white as well
        picture.paste((20, 20, 20), (x + dx, y + dy), glyph)
    picture.paste((255, 255, 255), (x, y), glyph)


def _background(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    base = rng.integers(70, 175, size=3)
    base = (0.35 * base + 0.65 * base.mean()).astype(
        int
    )  # muted, so that the colours of things stand out
    coarse = np.clip(
        base + rng.normal(0, 16, size=(6, 6, 1)) + rng.normal(0, 6, size=(6, 6, 3)), 0, 255
    ).astype(np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1, shade, kind in rng.random((int(rng.integers(4, 11)), 6)):
        tone = tuple(int(v) for v in np.clip(base + (shade - 0.5) * 90, 0, 255))
        at = (x0 * width, y0 * height)
        if kind < 0.6:
            draw.line((*at, x1 * width, y1 * height), fill=tone, width=1)
        else:
            draw.rectangle((*at, at[0] + 3 + 9 * x1, at[1] + 3 + 9 * y1), fill=tone)
    return picture


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `scene.width` x `scene.height`, the same bytes for the same
    scene.
    """
    picture = _background(scene.width, scene.height, scene.clutter)
    for thing in scene.things:
        _draw_thing(picture, thing)
    return picture


# --------------------------------------------------------------------------------------------------------------
# planning


def _place(
    rng: np.random.Generator, width: int, height: int, sizes: list[int]
) -> list[tuple[int, int]] | None:
    """Upper left corners of squares that do not touch, or None where a square found no room."""
    taken: list[tuple[int, int, int]] = []
    for size in sizes:
        for _ in range(60):
            x, y = int(rng.integers(1, width - size)), int(rng.integers(1, height - size))
            if all(
                x + size + 3 <= a or a + s + 3 <= x or y + size + 3 <= b or b + s + 3 <= y
                for a, b, s in taken
            ):
                taken.append((x, y, size))
                break
        else:
            return None
    return [(x, y) for x, y, _ in taken]


def _sizes(rng: np.random.Generator, count: int) -> list[int]:
    """Side lengths in pixels, largest first: at most two of several visual tokens, the rest about
    one or below.
    """
    large = int(rng.integers(0, 3)) if count <= 5 else int(rng.integers(0, 2))
    sizes = [int(rng.integers(40, 57)) for _ in range(min(large, count))]
    return sizes + sorted(
        (int(rng.integers(15, 33)) for _ in range(count - len(sizes))), reverse=True
    )


def _colour(
    rng: np.random.Generator, shape: str, split: str, among: tuple[str, ...] = tuple(COLOURS)
) -> str:
    allowed = [c for c in among if split == "test" or (shape, c) not in HELD_OUT]
    return allowed[int(rng.integers(len(allowed)))]


def plan(
    rng: np.random.Generator, split: str, count: int | None = None, odd: bool = False
) -> Scene:
    """A random scene. `odd`: all things but one share a colour."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    count = (
        count if count is not None else int(rng.integers(3 if not odd else 4, 9 if not odd else 8))
    )
    while True:
        sizes = _sizes(rng, count)
        corners = _place(rng, width, height, sizes)
        if corners is not None:
            break
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:count]]
    # A small palette makes colours repeat, so that counting and "the red one" both find questions.
    palette = tuple(list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: max(3, count - 1)])
    things = [
        Thing(
            shape,
            _colour(
                rng,
                shape,
                split,
                palette if split == "test" or len(palette) > 1 else tuple(COLOURS),
            ),
            PATTERNS[int(rng.integers(3))],
            GLYPHS[int(rng.integers(len(GLYPHS)))],
            *corner,
            size,
        )
        for shape, corner, size in zip(shapes, corners, sizes, strict=True)
    ]
    things = [
        things[i] for i in rng.permutation(count)
    ]  # planned largest first; the odd one may have any size
    if odd:
        things = _make_odd(rng, things, split)
    return Scene(width, height, tuple(things), int(rng.integers(2**31)))


def _make_odd(rng: np.random.Generator, things: list[Thing], split: str) -> list[Thing]:
    """The same things, all of one colour but the last."""
    banned = (
        set()
        if split == "test"
        else {c for t in things for c in COLOURS if (t.shape, c) in HELD_OUT}
    )
    free = [
        c for c in COLOURS if c not in banned
    ]  # never empty: a scene with an odd one has at most seven things
    shared = free[int(rng.integers(len(free)))]
    other = _colour(rng, things[-1].shape, split, tuple(c for c in COLOURS if c != shared))
    patterns = [t.pattern for t in things]
    if (
        len(set(patterns)) == 2 and min(patterns.count(p) for p in set(patterns)) == 1
    ):  # another would be odd by its pattern
        things = [replace(t, pattern=PATTERNS[i % 2]) for i, t in enumerate(things)]
    return [*(replace(t, colour=shared) for t in things[:-1]), replace(things[-1], colour=other)]


# -------------------------------------------------------------------------------------------------------------
# questions


def _pick(rng: np.random.Generator, scene: Scene, count: int = 1) -> list[Thing]:
    return [scene.things[i] for i in rng.permutation(len(scene.things))[:count]]


def ask_attribute(rng: np.random.Generator, scene: Scene) -> Question:
    """Colour or pattern of the thing of a shape, or the shape of the only thing of a colour."""
    (thing,) = _pick(rng, scene)
    kind = int(rng.integers(4))
    if kind == 3 and sum(t.colour == thing.colour for t in scene.things) == 1:
        return Question(
            "attribute",
            f"what shape is {thing.colour}",
            thing.shape,
            SHAPES,
            (thing,),
            f"shape {thing.colour}",
        )
    if kind == 2:
        return Question(
            "attribute",
            f"what pattern is the {thing.shape}",
            thing.pattern,
            PATTERNS,
            (thing,),
            f"pattern {thing.shape}",
        )
    return Question(
        "attribute",
        f"what colour is the {thing.shape}",
        thing.colour,
        tuple(COLOURS),
        (thing,),
        f"colour {thing.shape}",
    )


def ask_letter(rng: np.random.Generator, scene: Scene) -> Question:
    """The letter or digit on a named thing."""
    (thing,) = _pick(rng, scene)
    return Question(
        "letter",
        f"what letter is on the {thing.shape}",
        thing.glyph,
        GLYPHS,
        (thing,),
        f"letter {thing.shape}",
    )


def ask_position(rng: np.random.Generator, scene: Scene) -> Question:
    """Left or right, above or below: the pair and the axis whose centres are at least 14 px
    apart.
    """
    for _ in range(20):
        a, b = _pick(rng, scene, 2)
        axis = int(rng.integers(2))
        before, after = a.centre()[axis], b.centre()[axis]
        if abs(before - after) < 14:
            continue
        words = (("left", "right"), ("above", "below"))[axis]
        text = f"{('left or right of', 'above or below')[axis]} the {b.shape} is the {a.shape}"
        short = f"{('across', 'down')[axis]} {b.shape} {a.shape}"
        return Question(
            "position", text, words[0] if before < after else words[1], words, (a, b), short
        )
    return ask_position(rng, replace(scene, things=scene.things[::-1]))


def ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    """How many things have a colour or a pattern (one in six questions names a colour that is not
    there). There is no one place to look at, so it has no things.
    """
    (thing,) = _pick(rng, scene)
    if rng.random() < 0.5:
        word = thing.pattern
        found = [t for t in scene.things if t.pattern == word]
    else:
        word = thing.colour if rng.random() < 0.83 else str(rng.choice(list(COLOURS)))
        found = [t for t in scene.things if t.colour == word]
    if len(found) >= len(NUMBERS):
        return ask_count(rng, scene)
    return Question(
        "count", f"how many are {word}", NUMBERS[len(found)], NUMBERS, (), f"count {word}"
    )


def ask_odd(_: np.random.Generator, scene: Scene) -> Question:
    """The shape of the one thing that differs; for scenes planned with `odd=True`."""
    thing = _odd(scene)
    return Question("odd", "which shape is the odd one out", thing.shape, SHAPES, (thing,), "odd")


def _odd(scene: Scene) -> Thing:
    (thing,) = (t for t in scene.things if _is_odd(scene, t))
    return thing


def ask_odd_letter(_: np.random.Generator, scene: Scene) -> Question:
    """The letter on the one thing that differs: it has to be found before it can be read."""
    thing = _odd(scene)
    return Question(
        "odd-letter",
        "what letter is on the odd one out",
        thing.glyph,
        GLYPHS,
        (thing,),
        "letter odd",
    )


def ask_odd_pattern(_: np.random.Generator, scene: Scene) -> Question:
    """The pattern of the one thing that differs in colour."""
    thing = _odd(scene)
    return Question(
        "odd-pattern",
        "what pattern is the odd one out",
        thing.pattern,
        PATTERNS,
        (thing,),
        "pattern odd",
    )


def _is_odd(scene: Scene, thing: Thing) -> bool:
    others = {t.colour for t in scene.things if t is not thing}
    return len(scene.things) > 2 and len(others) == 1 and thing.colour not in others


def has_odd(scene: Scene) -> bool:
    """Whether one thing can be called the odd one out."""
    return any(_is_odd(scene, t) for t in scene.things)


def make_twin(
    rng: np.random.Generator, scene: Scene, split: str
) -> tuple[Scene, Question, Question]:
    """The same scene with one detail of one thing changed, and the question whose answer that
    changes.

    Returns (twin, question to the scene, question to the twin).
    """
    (thing,) = _pick(rng, scene)
    detail = ("colour", "pattern", "glyph")[int(rng.integers(3))]
    if detail == "colour":
        other = replace(
            thing,
            colour=_colour(rng, thing.shape, split, tuple(c for c in COLOURS if c != thing.colour)),
        )
        text, choices = f"what colour is the {thing.shape}", tuple(COLOURS)
    elif detail == "pattern":
        other = replace(thing, pattern=str(rng.choice([p for p in PATTERNS if p != thing.pattern])))
        text, choices = f"what pattern is the {thing.shape}", PATTERNS
    else:
        other = replace(thing, glyph=str(rng.choice([g for g in GLYPHS if g != thing.glyph])))
        text, choices = f"what letter is on the {thing.shape}", GLYPHS
    twin = replace(scene, things=tuple(other if t is thing else t for t in scene.things))
    short = f"{'letter' if detail == 'glyph' else detail} {thing.shape}"
    return (
        twin,
        Question("pair", text, getattr(thing, detail), choices, (thing,), short),
        Question("pair", text, getattr(other, detail), choices, (other,), short),
    )


def describe(scene: Scene) -> str:
    """A caption: every thing in reading order with colour, pattern, letter and place; used to
    pre-train the embedded model.
    """
    rows = sorted(
        scene.things, key=lambda t: (int(3 * t.centre()[1] / scene.height), t.centre()[0])
    )
    return " ; ".join(
        f"{t.shape} {t.colour} {t.pattern} {t.glyph} {scene.cell_words(t)}" for t in rows
    )


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


# ----------------------------------------------------------------------------------------------------------------
# skills


def ask_place(rng: np.random.Generator, scene: Scene) -> Question:
    """Where the thing of a shape is, in the wording of pre-training."""
    (thing,) = _pick(rng, scene)
    cells = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
    return Question(
        "place",
        f"where {thing.shape}",
        scene.cell_words(thing),
        cells,
        (thing,),
        f"where {thing.shape}",
    )


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
    the suite: (id, scene, question).

    The types take turns, and within "short" those of PRETRAINED; item i depends on (seed, split,
    types, i) alone.
    """
    stream = zlib.crc32(b"skills" if split == "test" else b"skills train")
    for i in range(count):
        rng = np.random.default_rng([stream, seed, i])
        skill, kind = types[i % len(types)], PRETRAINED[i // len(types) % len(PRETRAINED)]
        scene = plan(rng, split, odd=(skill, kind) == ("short", "odd"))
        if skill == "caption":
            question = Question(
                "caption", "describe", describe(scene), (), scene.things, "describe"
            )
        else:
            question = (
                ask_place(rng, scene) if skill == "place" else ask_short(rng, scene, kind, split)
            )
        yield f"{'skill' if split == 'test' else 'replay'}-{seed}-{i:06d}", scene, question
