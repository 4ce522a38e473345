"""Questions about pictures of which only boxes with class names are known: what boxes can support,
each with its boxes.

    exists                   is there any of a class            yes: all its boxes, no: none;
                                                                of each class as many yes as no
    count                    how many there are                 all boxes of the class
    exactly                  whether there are exactly n        all boxes of the class; yes or no
                                                                as needed for balance
    left-right, above-below  two classes with one object each   both boxes, apart on that axis
    place                    in which quarter the only one is   its box, whole within the quarter
    part                     which class is in a quarter        the only box that reaches into it,
                                                                whole within it
    which                    which of some classes is there     all boxes of the class
    largest                  which of some is largest           the others' boxes, then its own,
                                                                1.5 times theirs and more

A class is unsure where the picture may show more of it than there are boxes (crowds, broken rows).
Such a class is not counted, and is not called absent or the only one.

No type has an answer that comes more often than the second most frequent one, so nobody scores by
always giving the same answer. A type with too little to choose from is left out. `exactly` can
always be asked, so it takes the free places: every object of a class that is counted has a
question, as far as `per_image` reaches. May import: the standard library and what stands above
`data`.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from lvr_lite.data.boxes import Box
from lvr_lite.data.samples import Sample

T = TypeVar("T")

# objects of a class: of a class with more, none is asked about
MOST = 10
# gap between two boxes of which one is left of the other, as a part of the picture's side
APART = 0.02
# ratio of areas from which on an object counts as larger
LARGER = 1.5
# upper left corners
_QUARTERS = {
    "top left": (0, 0),
    "top right": (0.5, 0),
    "bottom left": (0, 0.5),
    "bottom right": (0.5, 0.5),
}


@dataclass(frozen=True)
class Detection:
    """One object in a picture.

    name: of its class.
    box: normalized, of the upright picture.
    id: unique within the picture.
    """

    name: str
    box: Box
    id: str

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)

    @property
    def quarter(self) -> str | None:
        """The quarter of the picture that the object is whole within."""
        x0, y0, x1, y1 = self.box
        for name, (x, y) in _QUARTERS.items():
            if x <= x0 and x1 <= x + 0.5 and y <= y0 and y1 <= y + 0.5:
                return name
        return None

    def reaches(self, quarter: str) -> bool:
        """Whether a part of the object lies in the quarter."""
        x, y = _QUARTERS[quarter]
        x0, y0, x1, y1 = self.box
        return x0 < x + 0.5 and x1 > x and y0 < y + 0.5 and y1 > y


Classes = dict[str, list[Detection]]


@dataclass(frozen=True)
class Picture:
    """What is known of one picture.

    unsure: classes of which it may show more than `detections`.
    absent: classes that it does not show.
    """

    id: str
    path: Path
    detections: tuple[Detection, ...]
    unsure: frozenset[str]
    absent: tuple[str, ...]

    def classes(self) -> Classes:
        """The detections by class, without the classes that have too many."""
        classes: defaultdict[str, list[Detection]] = defaultdict(list)
        for detection in self.detections:
            classes[detection.name].append(detection)
        return {name: own for name, own in sorted(classes.items()) if len(own) <= MOST}

    def counted_classes(self) -> Classes:
        """The classes of which all objects are known."""
        return {name: own for name, own in self.classes().items() if name not in self.unsure}


@dataclass(frozen=True)
class _Candidate:
    """A question that might be asked, and what it is about. subject: the class, for `exists`."""

    sample: Sample
    detections: tuple[Detection, ...]
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
    counts = _AnswerCounts()
    chosen = [_choose(picture, per_image, seed, absent, counts) for picture in pictures]
    every = [candidate for of_one in chosen for candidate in of_one]
    balanced = {candidate.sample.id for candidate in _balanced(every, seed)}
    counts = _AnswerCounts()
    samples = []
    for picture, of_one in zip(pictures, chosen, strict=True):
        own = [candidate for candidate in of_one if candidate.sample.id in balanced]
        own += _fill(picture, own, per_image, counts)
        samples += [candidate.sample for candidate in own]
    return samples


def absent_classes(classes: Sequence[str], present: set[str]) -> tuple[str, ...]:
    """Those of `classes` that a picture with the classes `present` can be said to lack: "light" is
    not absent where a traffic light is.
    """
    words_present = [_words(name) for name in present]
    return tuple(
        name
        for name in classes
        if not any(_words(name) <= words or words <= _words(name) for words in words_present)
    )


def _words(name: str) -> set[str]:
    return set(name.lower().split())


class _AnswerCounts:
    """How often each answer was chosen so far, of each type and of each subject of a type."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def of(self, group: str, answer: str) -> int:
        return self._counts[group, answer]

    def add(self, candidate: _Candidate) -> None:
        for group in (candidate.kind, f"{candidate.kind} {candidate.subject}"):
            self._counts[group, candidate.sample.answer] += 1


# ----------------------------------------------------------------------------------------------
# choosing


def _choose(
    picture: Picture, per_image: int, seed: int, absent: bool, counts: _AnswerCounts
) -> list[_Candidate]:
    """One `exists` where its answers are not in balance. Then what shows objects that have no
    question yet, then types and answers that are rare.
    """
    rng = random.Random(f"{seed} {picture.id}")
    chosen: list[_Candidate] = []
    if absent and per_image > 1 and (exists := _exists(picture, rng, counts)):
        chosen.append(exists)
        counts.add(exists)
    waiting = [(rng.random(), candidate) for candidate in _candidates(picture, rng, counts)]
    while waiting and len(chosen) < per_image:
        covered = {d.id for candidate in chosen for d in candidate.detections}
        kinds = Counter(candidate.kind for candidate in chosen)
        ranked = [
            (
                all(d.id in covered for d in candidate.detections),
                kinds[candidate.kind],
                counts.of(candidate.kind, candidate.sample.answer),
                chance,
                place,
            )
            for place, (chance, candidate) in enumerate(waiting)
        ]
        _, best = waiting.pop(min(ranked)[-1])
        chosen.append(best)
        counts.add(best)
    return chosen


def _balanced(candidates: list[_Candidate], seed: int) -> list[_Candidate]:
    """As many of each type's most frequent answer as of its second most frequent one at most; in
    `exists` within each class, where both answers must come.
    """
    groups: defaultdict[str, defaultdict[str, list[_Candidate]]]
    groups = defaultdict(lambda: defaultdict(list))
    for candidate in candidates:
        group = groups[f"{candidate.kind} {candidate.subject}"]
        group[candidate.sample.answer].append(candidate)
    balanced = []
    for answers in groups.values():
        sizes = sorted((len(same) for same in answers.values()), reverse=True)
        kind = next(iter(answers.values()))[0].kind
        limit = sizes[1] if len(sizes) > 1 else 0
        if kind != "exists":
            limit = max(limit, 1)
        for same in answers.values():
            balanced += sorted(same, key=lambda c: _hash(f"{seed} {c.sample.id}"))[:limit]
    return balanced


def _fill(
    picture: Picture, own: list[_Candidate], per_image: int, counts: _AnswerCounts
) -> list[_Candidate]:
    """`exactly` for the classes with an object that has no question, the largest classes first."""
    has_question = {d.id for candidate in own for d in candidate.detections}
    classes = [
        detections
        for detections in picture.counted_classes().values()
        if any(d.id not in has_question for d in detections)
    ]
    added = []
    for detections in sorted(
        classes,
        key=len,
        reverse=True,
    )[: per_image - len(own)]:
        candidate = _exactly(picture, detections, counts)
        added.append(candidate)
        counts.add(candidate)
    return added


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


# ----------------------------------------------------------------------------------------------
# types


def _candidate(
    picture: Picture,
    kind: str,
    question: str,
    answer: str,
    detections: Sequence[Detection],
    choices: Sequence[str] | None = None,
    subject: str = "",
) -> _Candidate:
    ids = "+".join(d.id for d in detections) or f"no-{subject}"
    sample = Sample(
        id=f"{picture.id}-{kind}-{ids}",
        images=(picture.path,),
        question=question,
        answer=answer,
        choices=tuple(choices) if choices is not None else None,
        boxes=tuple(d.box for d in detections),
        type=kind,
    )
    return _Candidate(sample, tuple(detections), subject)


def _choice(
    picture: Picture,
    kind: str,
    question: str,
    answer: str,
    others: Sequence[str],
    detections: Sequence[Detection],
    rng: random.Random,
) -> _Candidate:
    """A question whose choices it names, in a random order."""
    choices = [answer, *others]
    rng.shuffle(choices)
    question = f"{question}: {', '.join(choices[:-1])} or {choices[-1]}?"
    return _candidate(picture, kind, question, answer, detections, choices)


def _exists(picture: Picture, rng: random.Random, counts: _AnswerCounts) -> _Candidate | None:
    """Yes or no about the class for which that answer lags most; None where none lags."""
    classes = picture.classes()
    options = [(name, "yes") for name in classes]
    options += [(name, "no") for name in picture.absent]
    rng.shuffle(options)
    if not options:
        return None
    # A tie goes to yes: pictures without a class are more frequent than pictures with it.
    name, answer = min(options, key=lambda option: (_lead(counts, *option), option[1] == "no"))
    if _lead(counts, name, answer) > 1:
        return None
    detections = []
    if answer == "yes":
        detections = classes[name]
    return _candidate(
        picture,
        "exists",
        f"Is there any {name} in the picture?",
        answer,
        detections,
        ("yes", "no"),
        name,
    )


def _lead(counts: _AnswerCounts, name: str, answer: str) -> int:
    """How much more often `answer` was chosen for a class than the other one of yes and no."""
    other = "no" if answer == "yes" else "yes"
    return counts.of(f"exists {name}", answer) - counts.of(f"exists {name}", other)


def _exactly(picture: Picture, detections: list[Detection], counts: _AnswerCounts) -> _Candidate:
    """Yes with the right number, or no with the one before or after it: the answer that lags."""
    n = len(detections)
    name = detections[0].name
    answer = min(("yes", "no"), key=lambda answer: counts.of("exactly", answer))
    number = n
    if answer == "no":
        fewer = n > 1 and _hash(f"{picture.id} {name}") % 2
        number = n - 1 if fewer else n + 1
    begin = "Is there exactly one"
    if number != 1:
        begin = f"Are there exactly {number}"
    return _candidate(
        picture,
        "exactly",
        f"{begin} of these in the picture: {name}?",
        answer,
        detections,
        ("yes", "no"),
    )


def _candidates(
    picture: Picture, rng: random.Random, counts: _AnswerCounts
) -> Iterator[_Candidate]:
    """All questions but `exists` and `exactly`."""
    classes = picture.classes()
    counted = picture.counted_classes()
    single = [detections[0] for detections in counted.values() if len(detections) == 1]
    for name, detections in counted.items():
        yield _candidate(
            picture,
            "count",
            f"How many of these are in the picture: {name}?",
            str(len(detections)),
            detections,
        )
    for name, detections in classes.items():
        if others := _some(picture.absent, 3, rng):
            yield _choice(
                picture, "which", "Which of these is in the picture", name, others, detections, rng
            )
    for detection in single:
        if quarter := detection.quarter:
            yield _candidate(
                picture,
                "place",
                f"In which part of the picture is the {detection.name}?",
                quarter,
                (detection,),
                tuple(_QUARTERS),
            )
    for pair in _some(list(combinations(single, 2)), 8, rng):
        yield from _positions(picture, pair, counts)
    for quarter in _QUARTERS:
        yield from _part(picture, quarter, classes, counted, rng)
    yield from _largest(picture, counted, rng)


def _some(
    options: Sequence[T],
    most: int,
    rng: random.Random,
) -> list[T]:
    """At most so many of the options, in a random order."""
    return rng.sample(options, min(most, len(options)))


def _positions(
    picture: Picture, pair: tuple[Detection, Detection], counts: _AnswerCounts
) -> Iterator[_Candidate]:
    """On each axis on which one box ends before the other begins. Of the two orders of asking, the
    one whose answer lags.
    """
    axes = (
        ("left-right", 0, ("left", "right"), "Is the {} to the left or to the right of the {}?"),
        ("above-below", 1, ("above", "below"), "Is the {} above or below the {}?"),
    )
    for kind, axis, words, form in axes:
        first, second = sorted(pair, key=lambda d: d.box[axis])
        if first.box[axis + 2] + APART > second.box[axis]:
            continue
        lagging = [(counts.of(kind, word), _hash(f"{picture.id} {word}"), word) for word in words]
        answer = min(lagging)[2]
        order = (first, second) if answer == words[0] else (second, first)
        question = form.format(order[0].name, order[1].name)
        yield _candidate(picture, kind, question, answer, order, words)


def _part(
    picture: Picture, quarter: str, classes: Classes, counted: Classes, rng: random.Random
) -> Iterator[_Candidate]:
    inside = [d for d in picture.detections if d.reaches(quarter)]
    if len(inside) != 1 or inside[0].quarter != quarter or inside[0].name not in classes:
        return
    answer = inside[0].name
    elsewhere = [name for name in counted if name != answer]
    others = [
        *_some(elsewhere, 2, rng),
        *_some(
            picture.absent,
            2,
            rng,
        ),
    ][:3]
    if others:
        yield _choice(
            picture,
            "part",
            f"Which of these is in the {quarter} part of the picture",
            answer,
            others,
            inside,
            rng,
        )


def _largest(picture: Picture, counted: Classes, rng: random.Random) -> Iterator[_Candidate]:
    of_each = [max(detections, key=lambda d: d.area) for detections in counted.values()]
    of_each.sort(key=lambda d: d.area)
    smaller = [d for d in of_each[:-1] if d.area * LARGER <= of_each[-1].area]
    if smaller:
        others = _some(smaller, 3, rng)
        largest = of_each[-1]
        names = [d.name for d in others]
        yield _choice(
            picture,
            "largest",
            "Which of these is the largest in the picture",
            largest.name,
            names,
            [*others, largest],
            rng,
        )
