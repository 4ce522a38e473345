"""Questions made of boxes with classes: each answer follows from the boxes, none can be guessed by
saying always the same.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lvr_lite.data.convert.detections import (
    LARGER,
    MOST,
    Detection,
    Picture,
    absent_classes,
    questions,
)
from lvr_lite.data.samples import Sample

NAMES = {
    "person": 60,
    "dog": 12,
    "cat": 10,
    "car": 15,
    "traffic light": 5,
    "cup": 6,
}  # how common each is


def drawn(count: int, seed: int = 0, unsure: bool = False) -> list[Picture]:
    rng, pictures = random.Random(seed), []
    for i in range(count):
        things = []
        for j in range(rng.choice([0, 1, 1, 2, 3, 4, 6, 14])):
            (name,) = rng.choices(list(NAMES), list(NAMES.values()))
            w, h = rng.uniform(0.05, 0.45), rng.uniform(0.05, 0.45)
            x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
            things.append(Detection(name, (x, y, x + w, y + h), f"{i}.{j}"))
        there = {t.name for t in things}
        crowds = {rng.choice(list(NAMES))} if unsure and i % 2 else set()
        lacks = absent_classes(sorted(set(NAMES) - there - crowds), there | crowds)
        pictures.append(Picture(str(i), Path(f"{i}.png"), tuple(things), frozenset(crowds), lacks))
    return pictures


def of(picture: Picture, name: str) -> list[Detection]:
    return [t for t in picture.detections if t.name == name]


def area(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def listed(sample: Sample) -> list[str]:
    return re.split(r", | or ", sample.question.rpartition(": ")[2].rstrip("?"))


def right(sample: Sample, picture: Picture) -> bool:
    """Worked out again from the boxes and the words of the question."""
    text, answer, boxes = sample.question, sample.answer, list(sample.boxes)
    if sample.choices is not None and answer not in sample.choices:
        return False
    match sample.type:
        case "exists":
            name = text.removeprefix("Is there any ").removesuffix(" in the picture?")
            of_class = [t.box for t in of(picture, name)]
            return (
                boxes == of_class
                and answer == ("yes" if of_class else "no")
                and (bool(of_class) or name not in picture.unsure)
            )
        case "count" | "exactly":
            (name,) = listed(sample)
            of_class = [t.box for t in of(picture, name)]
            number = (
                len(of_class)
                if sample.type == "count"
                else int(re.sub("one", "1", text).split()[3])
            )
            right_number = (
                answer == str(number)
                if sample.type == "count"
                else answer == ("yes" if number == len(of_class) else "no")
            )
            return right_number and boxes == of_class and name not in picture.unsure and number > 0
        case "which":
            others = set(listed(sample)) - {answer}
            return (
                boxes == [t.box for t in of(picture, answer)]
                and others <= set(picture.absent)
                and set(listed(sample)) == set(sample.choices or ())
            )
        case "largest":
            best = {name: max(area(t.box) for t in of(picture, name)) for name in listed(sample)}
            return (
                area(boxes[-1]) == best[answer]
                and all(best[answer] >= LARGER * v for n, v in best.items() if n != answer)
                and not (set(best) & picture.unsure)
            )
        case "place" | "part":
            quarter = (
                answer
                if sample.type == "place"
                else re.findall("(top left|top right|bottom left|bottom right) part", text)[0]
            )
            (box,) = boxes
            centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            there = (
                f"{'top' if centre[1] < 0.5 else 'bottom'} {'left' if centre[0] < 0.5 else 'right'}"
            )
            whole = not (box[0] < 0.5 < box[2] or box[1] < 0.5 < box[3])
            if sample.type == "place":
                name = text.removeprefix("In which part of the picture is the ").rstrip("?")
                return (
                    quarter == there
                    and whole
                    and [t.box for t in of(picture, name)] == boxes
                    and name not in picture.unsure
                )
            left, top = (0.5 if "right" in quarter else 0), (0.5 if "bottom" in quarter else 0)
            reaching = [
                t
                for t in picture.detections
                if t.box[0] < left + 0.5
                and t.box[2] > left
                and t.box[1] < top + 0.5
                and t.box[3] > top
            ]
            return (
                quarter == there
                and whole
                and [t.name for t in reaching] == [answer]
                and not (set(listed(sample)) - {answer}) & picture.unsure
            )
        case "left-right" | "above-below":
            pattern = (
                r"Is the (.+) to the left or to the right of the (.+)\?"
                if sample.type == "left-right"
                else r"Is the (.+) above or below the (.+)\?"
            )
            (pair,) = re.findall(pattern, text)
            (a,), (b,) = (of(picture, name) for name in pair)
            axis = 0 if sample.type == "left-right" else 1
            before = a.box[axis + 2] < b.box[axis]
            apart = before or b.box[axis + 2] < a.box[axis]
            word = {
                ("left-right", True): "left",
                ("left-right", False): "right",
                ("above-below", True): "above",
            }
            return (
                apart
                and boxes == [a.box, b.box]
                and answer == word.get((sample.type, before), "below")
                and not set(pair) & picture.unsure
            )
    return False


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return drawn(400, unsure=True)


@pytest.fixture(scope="module")
def samples(pictures: list[Picture]) -> list[Sample]:
    return questions(pictures, 6, 0)


def test_every_answer_follows_from_the_boxes(
    pictures: list[Picture], samples: list[Sample]
) -> None:
    by_path = {p.path: p for p in pictures}
    wrong = [s for s in samples if not right(s, by_path[s.images[0]])]
    assert wrong == []
    kinds = {
        "exists",
        "count",
        "exactly",
        "which",
        "largest",
        "place",
        "part",
        "left-right",
        "above-below",
    }
    assert {s.type for s in samples} == kinds
    assert {s.answer for s in samples if s.type in ("left-right", "above-below")} == {
        "left",
        "right",
        "above",
        "below",
    }


def test_no_type_is_answered_by_saying_always_the_same(samples: list[Sample]) -> None:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        answers[str(sample.type)][sample.answer] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) <= (sum(counts.values()) + 1) / 2, (kind, counts)
    assert len(set(answers["exists"].values())) == 1
    assert abs(answers["left-right"]["left"] - answers["left-right"]["right"]) <= 1


def test_of_each_class_as_many_are_there_as_are_not(samples: list[Sample]) -> None:
    by_class: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if sample.type == "exists":
            by_class[sample.question][sample.answer] += 1
    assert len(by_class) >= 4
    assert all(counts["yes"] == counts["no"] for counts in by_class.values())


def test_the_place_of_the_answer_among_the_choices_tells_nothing(samples: list[Sample]) -> None:
    for kind in ("which", "largest", "part"):
        firsts = [
            s.choices.index(s.answer) == 0
            for s in samples
            if s.type == kind and s.choices and len(s.choices) > 2
        ]
        assert 0.1 < sum(firsts) / len(firsts) < 0.6


def test_things_whose_number_is_known_all_have_a_question() -> None:
    pictures = [p for p in drawn(200, 3) if len(p.detections) <= 5]
    shown = {box for s in questions(pictures, 8, 0) for box in s.boxes}
    assert all(t.box in shown for p in pictures for t in p.detections)


def test_pictures_of_one_thing_of_one_class_still_have_questions() -> None:
    pictures = [
        Picture(
            str(i),
            Path(f"{i}.png"),
            (Detection("bird", (0.1, 0.1, 0.2, 0.2), str(i)),),
            frozenset(),
            (),
        )
        for i in range(10)
    ]
    samples = questions(pictures, 3, 0)
    assert {s.images[0] for s in samples} == {p.path for p in pictures}
    answers = Counter(s.answer for s in samples if s.type == "exactly")
    assert abs(answers["yes"] - answers["no"]) <= 1


def test_ids_are_unique_and_pictures_have_no_more_than_asked_for(
    pictures: list[Picture], samples: list[Sample]
) -> None:
    assert len({s.id for s in samples}) == len(samples)
    for limit in (1, 2, 6):
        of_each = Counter(s.images[0] for s in questions(pictures, limit, 0))
        assert max(of_each.values()) == limit


def test_the_seed_decides(pictures: list[Picture], samples: list[Sample]) -> None:
    assert questions(pictures, 6, 0) == samples
    assert questions(pictures, 6, 1) != samples


def test_absent_classes_can_be_left_out(pictures: list[Picture]) -> None:
    samples = questions(pictures, 6, 0, absent=False)
    assert samples
    assert all(s.boxes for s in samples)
    assert "exists" not in {s.type for s in samples}


def test_more_things_than_can_be_looked_at_are_not_counted() -> None:
    def crowd(n: int) -> Picture:
        boxes = [(0.05 * i, 0.1, 0.05 * i + 0.04, 0.2) for i in range(n)]
        return Picture(
            str(n),
            Path(f"{n}.png"),
            tuple(Detection("ant", box, str(i)) for i, box in enumerate(boxes)),
            frozenset(),
            (),
        )

    assert questions([crowd(MOST + 1)], 6, 0) == []
    assert {len(s.boxes) for s in questions([crowd(MOST)], 6, 0)} == {MOST}


def test_a_class_is_not_absent_where_its_name_is_part_of_one_that_is_there() -> None:
    assert absent_classes(
        ["light", "cup", "dog", "hot dog", "Traffic Light"], {"traffic light", "dog"}
    ) == ("cup",)
