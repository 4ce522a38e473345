"""Questions about pictures of which only boxes with class names are known: what boxes can support,
each with its boxes.

    exists                   is there any of a class            yes: all its boxes, no: none; of each class as many yes as no
    count                    how many there are                 all boxes of the class
    exactly                  whether there are exactly n        all boxes of the class; yes or no at will, so that they balance
    left-right, above-below  two classes, one thing of each     both boxes, apart on that axis
    place                    in which quarter the only one is   its box, whole within the quarter
    part                     which class is in a quarter        the only box that reaches into it, whole within it
    which                    which of some classes is there     all boxes of the class
    largest                  which of some is largest           the others' boxes, then its own, 1.5 times theirs and more

A class of which there may be more than is told (crowds, broken rows) is neither counted nor said to
be absent or alone. No type has an answer that comes more often than the second most frequent one,
so none is answered by saying always the same thing; a type that has too little to choose from is
left out, and `exactly`, which can always be made, takes its place: each thing of a class that is
counted has a question, as far as `per_image` reaches. May import: the standard library and the
core.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lvr_lite.data.boxes import Box
from lvr_lite.data.samples import Sample

MOST = 10  # things of a class: more are neither counted nor shown
APART = 0.02  # of the picture's side, between two boxes one of which is left of the other
LARGER = 1.5  # times the area
_QUARTERS = {
    "top left": (0, 0),
    "top right": (0.5, 0),
    "bottom left": (0, 0.5),
    "bottom right": (0.5, 0.5),
}  # upper left corners


@dataclass(frozen=True)
class Thing:
    """One object. name: of its class. box: normalized, of the upright picture. id: its own in the
    picture.
    """

    name: str
    box: Box
    id: str


@dataclass(frozen=True)
class Picture:
    """What is known of one picture. unsure: classes of which there may be more than `things`;
    absent: classes that are not in it.
    """

    id: str
    path: Path
    things: tuple[Thing, ...]
    unsure: frozenset[str]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """A question that might be asked, and the things it is about. subject: the class, for
    `exists`.
    """

    sample: Sample
    things: tuple[Thing, ...]
    subject: str = ""

    @property
    def kind(self) -> str:
        return str(self.sample.type)


def questions(
    pictures: Sequence[Picture], per_image: int, seed: int, absent: bool = True
) -> list[Sample]:
    """At most `per_image` questions about each picture, in the order of the pictures; the same for
    the same arguments.

    absent: also ask about classes that are not there, which have no boxes; without them there is no
    `exists`.
    """
    ledger = _Ledger()
    chosen = [_choose(picture, per_image, seed, absent, ledger) for picture in pictures]
    kept = {asked.sample.id for asked in _balanced([a for of_one in chosen for a in of_one], seed)}
    ledger = _Ledger()
    samples = []
    for picture, of_one in zip(pictures, chosen, strict=True):
        own = [asked for asked in of_one if asked.sample.id in kept]
        samples += [asked.sample for asked in own + _fill(picture, own, per_image, ledger)]
    return samples


def not_there(classes: Sequence[str], there: set[str]) -> tuple[str, ...]:
    """Those of `classes` that a picture with the classes `there` can be said to lack: "light" is
    not absent where a traffic light is.
    """
    words = [set(name.lower().split()) for name in there]
    return tuple(
        name
        for name in classes
        if not any((own := set(name.lower().split())) <= w or w <= own for w in words)
    )


class _Ledger:
    """How often each answer was chosen so far, by whatever it should balance within."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, group: str, answer: str) -> int:
        return self.counts[group, answer]

    def add(self, asked: _Asked) -> None:
        for group in (asked.kind, f"{asked.kind} {asked.subject}"):
            self.counts[group, asked.sample.answer] += 1


def _choose(
    picture: Picture, per_image: int, seed: int, absent: bool, ledger: _Ledger
) -> list[_Asked]:
    """One `exists` where it may come to balance, then what shows things that have no question yet,
    then types and answers that are rare.
    """
    rng = random.Random(f"{seed} {picture.id}")
    chosen: list[_Asked] = []
    if absent and per_image > 1 and (owed := _exists(picture, rng, ledger)):
        chosen.append(owed)
        ledger.add(owed)
    seen = {t.id for asked in chosen for t in asked.things}
    here: Counter[str] = Counter()
    waiting = [(rng.random(), asked) for asked in _candidates(picture, rng, ledger)]

    def rank(drawn: tuple[float, _Asked]) -> tuple[bool, int, int, float]:
        chance, asked = drawn
        return (
            all(t.id in seen for t in asked.things),
            here[asked.kind],
            ledger(asked.kind, asked.sample.answer),
            chance,
        )

    while waiting and len(chosen) < per_image:
        waiting.remove(best := min(waiting, key=rank))
        asked = best[1]
        chosen.append(asked)
        ledger.add(asked)
        seen |= {t.id for t in asked.things}
        here[asked.kind] += 1
    return chosen


def _balanced(asked: list[_Asked], seed: int) -> list[_Asked]:
    """Without so many of each type's most frequent answer that another comes as often; in `exists`
    within each class, where both must.
    """
    groups: defaultdict[str, defaultdict[str, list[_Asked]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in asked:
        groups[f"{one.kind} {one.subject}"][one.sample.answer].append(one)
    kept = []
    for answers in groups.values():
        sizes = sorted((len(same) for same in answers.values()), reverse=True)
        alone = 0 if next(iter(answers.values()))[0].kind == "exists" else 1
        limit = max(sizes[1] if len(sizes) > 1 else 0, alone)
        for same in answers.values():
            kept += sorted(same, key=lambda a: zlib.crc32(f"{seed} {a.sample.id}".encode()))[:limit]
    return kept


def _fill(picture: Picture, own: list[_Asked], per_image: int, ledger: _Ledger) -> list[_Asked]:
    """`exactly` for the classes that have things without a question, those with the most first."""
    seen = {t.id for asked in own for t in asked.things}
    classes = [
        things for things in _counted(picture).values() if any(t.id not in seen for t in things)
    ]
    filled = []
    for things in sorted(classes, key=len, reverse=True)[: per_image - len(own)]:
        filled.append(_exactly(picture, things, ledger))
        ledger.add(filled[-1])
    return filled


# -------------------------------------------------------------------------------------------------------------------
# types


def _asked(
    picture: Picture,
    kind: str,
    question: str,
    answer: str,
    things: Sequence[Thing],
    choices: Sequence[str] | None = None,
    about: str = "",
) -> _Asked:
    boxes, ids = tuple(t.box for t in things), "+".join(t.id for t in things) or f"no-{about}"
    sample = Sample(
        f"{picture.id}-{kind}-{ids}",
        (picture.path,),
        question,
        answer,
        tuple(choices) if choices is not None else None,
        boxes,
        kind,
    )
    return _Asked(sample, tuple(things), about)


def _by_class(picture: Picture) -> dict[str, list[Thing]]:
    found: defaultdict[str, list[Thing]] = defaultdict(list)
    for thing in picture.things:
        found[thing.name].append(thing)
    return {name: things for name, things in sorted(found.items()) if len(things) <= MOST}


def _counted(picture: Picture) -> dict[str, list[Thing]]:
    """Things by class, where all are known."""
    return {
        name: things for name, things in _by_class(picture).items() if name not in picture.unsure
    }


def _exists(picture: Picture, rng: random.Random, ledger: _Ledger) -> _Asked | None:
    """Yes or no about the class that is most behind with that answer."""
    there, text, choices = _by_class(picture), "Is there any {} in the picture?", ("yes", "no")
    options = [(name, "yes") for name in there] + [(name, "no") for name in picture.absent]

    def ahead(option: tuple[str, str]) -> int:
        name, answer = option
        return ledger(f"exists {name}", answer) - ledger(
            f"exists {name}", "no" if answer == "yes" else "yes"
        )

    rng.shuffle(options)
    # yes first among equals: a picture without a thing is sooner found than one with it
    name, answer = min(options, key=lambda o: (ahead(o), o[1] == "no"), default=("", ""))
    if not name or ahead((name, answer)) > 1:
        return None
    return _asked(
        picture,
        "exists",
        text.format(name),
        answer,
        there[name] if answer == "yes" else (),
        choices,
        name,
    )


def _exactly(picture: Picture, things: list[Thing], ledger: _Ledger) -> _Asked:
    """Yes with the number there is, or no with the one before or after it, whichever is behind."""
    n, name = len(things), things[0].name
    answer = min(("yes", "no"), key=lambda a: ledger("exactly", a))
    fewer = n > 1 and zlib.crc32(f"{picture.id} {name}".encode()) % 2
    number = n if answer == "yes" else n - 1 if fewer else n + 1
    text = f"{'Is there exactly one' if number == 1 else f'Are there exactly {number}'} of these in the picture: {name}?"
    return _asked(picture, "exactly", text, answer, things, ("yes", "no"))


def _candidates(picture: Picture, rng: random.Random, ledger: _Ledger) -> Iterator[_Asked]:
    there, counted = _by_class(picture), _counted(picture)
    once = [things[0] for things in counted.values() if len(things) == 1]
    for name, things in counted.items():
        yield _asked(
            picture,
            "count",
            f"How many of these are in the picture: {name}?",
            str(len(things)),
            things,
        )
    for name, things in there.items():
        if others := rng.sample(picture.absent, min(3, len(picture.absent))):
            yield _choice(
                picture, "which", "Which of these is in the picture", name, others, things, rng
            )
    for thing in once:
        if quarter := _quarter(thing):
            yield _asked(
                picture,
                "place",
                f"In which part of the picture is the {thing.name}?",
                quarter,
                (thing,),
                tuple(_QUARTERS),
            )
    pairs = list(combinations(once, 2))
    for pair in rng.sample(pairs, min(8, len(pairs))):
        yield from _positions(picture, pair, ledger)
    for quarter in _QUARTERS:
        yield from _part(picture, quarter, there, counted, rng)
    yield from _largest(picture, counted, rng)


def _choice(
    picture: Picture,
    kind: str,
    text: str,
    answer: str,
    others: Sequence[str],
    things: Sequence[Thing],
    rng: random.Random,
) -> _Asked:
    choices = [answer, *others]
    rng.shuffle(choices)
    return _asked(
        picture,
        kind,
        f"{text}: {', '.join(choices[:-1])} or {choices[-1]}?",
        answer,
        things,
        choices,
    )


def _quarter(thing: Thing) -> str | None:
    """The quarter of the picture that a thing is whole within."""
    x0, y0, x1, y1 = thing.box
    return next(
        (
            name
            for name, (x, y) in _QUARTERS.items()
            if x <= x0 and x1 <= x + 0.5 and y <= y0 and y1 <= y + 0.5
        ),
        None,
    )


def _reaches(thing: Thing, quarter: str) -> bool:
    x, y = _QUARTERS[quarter]
    x0, y0, x1, y1 = thing.box
    return x0 < x + 0.5 and x1 > x and y0 < y + 0.5 and y1 > y


def _positions(picture: Picture, pair: tuple[Thing, Thing], ledger: _Ledger) -> Iterator[_Asked]:
    """On each axis on which one box ends before the other begins; of both orders of asking that
    whose answer is behind.
    """
    axes = (
        ("left-right", 0, ("left", "right"), "Is the {} to the left or to the right of the {}?"),
        ("above-below", 1, ("above", "below"), "Is the {} above or below the {}?"),
    )
    for kind, axis, words, text in axes:
        first, second = sorted(pair, key=lambda t: t.box[axis])
        if first.box[axis + 2] + APART > second.box[axis]:
            continue
        answer = min(
            words, key=lambda w: (ledger(kind, w), zlib.crc32(f"{picture.id} {w}".encode()))
        )
        a, b = (first, second) if answer == words[0] else (second, first)
        yield _asked(picture, kind, text.format(a.name, b.name), answer, (a, b), words)


def _part(
    picture: Picture,
    quarter: str,
    there: dict[str, list[Thing]],
    counted: dict[str, list[Thing]],
    rng: random.Random,
) -> Iterator[_Asked]:
    inside = [t for t in picture.things if _reaches(t, quarter)]
    if len(inside) != 1 or _quarter(inside[0]) != quarter or inside[0].name not in there:
        return
    (thing,) = inside
    elsewhere = [name for name in counted if name != thing.name]
    others = [
        *rng.sample(elsewhere, min(2, len(elsewhere))),
        *rng.sample(picture.absent, min(2, len(picture.absent))),
    ][:3]
    if others:
        yield _choice(
            picture,
            "part",
            f"Which of these is in the {quarter} part of the picture",
            thing.name,
            others,
            inside,
            rng,
        )


def _largest(
    picture: Picture, counted: dict[str, list[Thing]], rng: random.Random
) -> Iterator[_Asked]:
    def area(thing: Thing) -> float:
        x0, y0, x1, y1 = thing.box
        return (x1 - x0) * (y1 - y0)

    of_each = sorted((max(things, key=area) for things in counted.values()), key=area)
    smaller = [t for t in of_each[:-1] if area(t) * LARGER <= area(of_each[-1])]
    if smaller:
        others = rng.sample(smaller, min(3, len(smaller)))
        largest = of_each[-1]
        text = "Which of these is the largest in the picture"
        yield _choice(
            picture,
            "largest",
            text,
            largest.name,
            [t.name for t in others],
            (*others, largest),
            rng,
        )
