"""Questions to scenes, with the figures that must be looked at. May import: numpy, the standard
library and what stands above `toy`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lvr_lite.toy.scenes import (
    COLOUR_NAMES,
    COLUMNS,
    GLYPHS,
    NUMBERS,
    PATTERNS,
    ROWS,
    SHAPES,
    Figure,
    Scene,
    plan,
    random_colour,
    without,
)

CELLS = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)
# question types that the embedded model met before tuning
PRETRAINED = ("attribute", "letter", "position", "count", "odd", "pair")
QUESTION_TYPES = (*PRETRAINED, "odd-letter", "odd-pattern")
# question types that it learned in pre-training and that the scenes' own questions do not contain
SKILLS = ("caption", "place", "short")
# pixels between two centres that a position is asked about
APART = 14


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


def _pick(
    rng: np.random.Generator,
    scene: Scene,
    count: int = 1,
) -> list[Figure]:
    return [scene.figures[i] for i in rng.permutation(len(scene.figures))[:count]]


def _ask_detail(kind: str, detail: str, figure: Figure) -> Question:
    """A question about the colour, pattern or letter of the figure of a shape."""
    choices = {"colour": COLOUR_NAMES, "pattern": PATTERNS, "letter": GLYPHS}[detail]
    answers = {"colour": figure.colour, "pattern": figure.pattern, "letter": figure.glyph}
    verb = "is on" if detail == "letter" else "is"
    return Question(
        kind,
        f"what {detail} {verb} the {figure.shape}",
        answers[detail],
        choices,
        (figure,),
        f"{detail} {figure.shape}",
    )


def ask_attribute(rng: np.random.Generator, scene: Scene) -> Question:
    """Colour or pattern of the figure of a shape, or the shape of the only figure of a colour."""
    (figure,) = _pick(rng, scene)
    kind = int(rng.integers(4))
    colour = figure.colour
    if kind == 3 and sum(other.colour == colour for other in scene.figures) == 1:
        return Question(
            "attribute",
            f"what shape is {colour}",
            figure.shape,
            SHAPES,
            (figure,),
            f"shape {colour}",
        )
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
        if abs(distance) < APART:
            continue
        words = (("left", "right"), ("above", "below"))[axis]
        answer = words[0] if distance < 0 else words[1]
        relation = ("left or right of", "above or below")[axis]
        return Question(
            "position",
            f"{relation} the {b.shape} is the {a.shape}",
            answer,
            words,
            (a, b),
            f"{('across', 'down')[axis]} {b.shape} {a.shape}",
        )
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
    return Question(
        "count",
        f"how many are {word}",
        NUMBERS[count],
        NUMBERS,
        (),
        f"count {word}",
    )


def ask_odd(_: np.random.Generator, scene: Scene) -> Question:
    """The shape of the one figure that differs; for scenes planned with `odd=True`."""
    figure = _odd_one(scene)
    return Question("odd", "which shape is the odd one out", figure.shape, SHAPES, (figure,), "odd")


def ask_odd_letter(_: np.random.Generator, scene: Scene) -> Question:
    """The letter on the one figure that differs, which must be found before it can be read."""
    figure = _odd_one(scene)
    return Question(
        "odd-letter",
        "what letter is on the odd one out",
        figure.glyph,
        GLYPHS,
        (figure,),
        "letter odd",
    )


def ask_odd_pattern(_: np.random.Generator, scene: Scene) -> Question:
    """The pattern of the one figure that differs in colour."""
    figure = _odd_one(scene)
    return Question(
        "odd-pattern",
        "what pattern is the odd one out",
        figure.pattern,
        PATTERNS,
        (figure,),
        "pattern odd",
    )


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
        colours = without(COLOUR_NAMES, figure.colour)
        other = replace(figure, colour=random_colour(rng, figure.shape, split, colours))
    elif detail == "pattern":
        other = replace(figure, pattern=str(rng.choice(without(PATTERNS, figure.pattern))))
    else:
        other = replace(figure, glyph=str(rng.choice(without(GLYPHS, figure.glyph))))
    figures = tuple(other if one is figure else one for one in scene.figures)
    twin = replace(scene, figures=figures)
    return twin, _ask_detail("pair", detail, figure), _ask_detail("pair", detail, other)


def describe(scene: Scene) -> str:
    """A caption: every figure in reading order with colour, pattern, letter and place. It is used
    to pre-train the embedded model.
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
    seed: int,
    split: str,
    count: int,
    types: tuple[str, ...] = QUESTION_TYPES,
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
    question = (
        make_twin(
            rng,
            scene,
            split,
        )[1]
        if kind == "pair"
        else ASK[kind](rng, scene)
    )
    return replace(question, type="short", text=question.short)


def skills(
    seed: int,
    count: int,
    split: str = "test",
    types: tuple[str, ...] = SKILLS,
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
