"""Reader of Label Studio's JSON export: rectangles with classes, or with questions and answers. May
import: the standard library and what stands above `data`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from lvr_lite.data.boxes import Box
from lvr_lite.data.convert.detections import Detection
from lvr_lite.data.convert.labelstudio_tasks import TEXTS, Result, Task, marks_region, tasks_of
from lvr_lite.data.convert.reading import Frame, Import, class_name
from lvr_lite.data.rows import FieldError, JsonObject, Row, numbers, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError

_RECTANGLES = ("rectanglelabels", "rectangle")


@dataclass
class _Rectangles:
    """The rectangles of a task.

    named: with a class.
    unnamed: without one.
    unsure: classes of which one may be missing.
    all_unsure: whether one of any class may be missing.
    broken: whether one was reported as broken.
    """

    named: list[Detection] = field(default_factory=list)
    unnamed: list[Detection] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)
    all_unsure: bool = False
    broken: bool = False


def labelstudio(imported: Import) -> None:
    """x, y, width, height are in percent of the picture as shown, rotation is in degrees clockwise
    about x, y. Texts whose name (from_name) has "question" or "answer" in it, or the task's own
    question, make a sample of all rectangles or of their own one.
    """
    values = imported.json()
    if not isinstance(values, list):
        raise DataError(
            f"{imported.source}: not Label Studio's JSON export, which is a list of tasks"
        )
    tasks: list[Task] = []
    for item, value in enumerate(values, 1):
        with imported.row(item=item):
            tasks += tasks_of(imported, value, item)
    imported.learn_pixels((task.path, task.size) for task in tasks)
    used: set[str] = set()
    pictures = []
    for task in tasks:
        rectangles = _rectangles(imported, task)
        if not _add_samples(imported, task, rectangles.named + rectangles.unnamed):
            imported.omissions["rectangles without a class"] += len(rectangles.unnamed)
            pictures.append((task, rectangles))
            used.update(detection.name for detection in rectangles.named)
    for task, rectangles in pictures:
        unsure = used
        if not rectangles.all_unsure:
            unsure = rectangles.unsure
        imported.add_picture(
            task.id,
            task.path,
            rectangles.named,
            unsure,
            used,
            item=task.item,
            broken=rectangles.broken,
        )


# ----------------------------------------------------------------------------------------------
# rectangles


def _rectangles(imported: Import, task: Task) -> _Rectangles:
    rectangles = _Rectangles()
    labels_of = _labels_by_region(task.results)
    geometries = {str(r.get("id")) for r in task.results if r.get("type") not in ("labels", None)}
    frame = imported.frame(task.path, task.size)
    for number, result in enumerate(task.results):
        kind = str(result.get("type"))
        if not marks_region(result):
            if kind not in TEXTS:
                imported.omissions[f"results of type {kind}"] += 1
            continue
        value = result.get("value") or {}
        own = str(result.get("id", f"r{number}"))
        # <Labels> beside <Rectangle>: the classes of a region come as a result of their own.
        if kind == "labels" and own in geometries:
            continue
        if kind == "labels" and {"x", "y", "width", "height"} <= set(value):
            kind = "rectangle"
        labels = _labels(kind, value) or labels_of.get(own, [])
        if not isinstance(labels, list):
            labels = [labels]
        if kind not in _RECTANGLES:
            imported.omissions[f"results of type {kind}"] += 1
            if isinstance(labels, list) and labels:
                rectangles.unsure.update(map(str, labels))
            else:
                rectangles.all_unsure = True
            continue
        try:
            names = [class_name(label) for label in labels]
            box = _box(imported, frame, value)
        except FieldError as error:
            imported.report(
                error,
                f"result[{number}] (id {result.get('id')})",
                item=task.item,
            )
            rectangles.all_unsure = True
            rectangles.broken = True
            continue
        for i, name in enumerate(names):
            identifier = f"{own}.{i}" if i else own
            rectangles.named.append(Detection(name, box, identifier))
        if not names:
            rectangles.unnamed.append(Detection("", box, own))
    return rectangles


def _labels(kind: str, value: Result) -> Any:
    """The classes in the value of a region."""
    field = kind
    if kind == "rectangle":
        field = "labels"
    return value.get(field) or value.get("labels")


def _labels_by_region(results: list[Result]) -> dict[str, list[object]]:
    """The classes that <Labels> gives to regions, by the region's id."""
    labels: defaultdict[str, list[object]] = defaultdict(list)
    for result in results:
        if result.get("type") != "labels":
            continue
        value = result.get("value") or {}
        own = value.get("labels") or []
        if not isinstance(own, list):
            own = [own]
        labels[str(result.get("id"))] += own
    return labels


def _box(imported: Import, frame: Frame, value: JsonObject) -> Box:
    """The upright rectangle around a rotated one. Raises FieldError."""
    percent = numbers([value.get(key) for key in ("x", "y", "width", "height")], 4)
    (degrees,) = numbers([value.get("rotation") or 0], 1)
    _tell_other_units(imported, percent)
    left, top, width, height = percent
    x = left * frame.width / 100
    y = top * frame.height / 100
    w = width * frame.width / 100
    h = height * frame.height / 100
    if degrees == 0 or w <= 0 or h <= 0:
        return imported.box(frame, (x, y, x + w, y + h))
    radians = math.radians(degrees)
    c = math.cos(radians)
    s = math.sin(radians)
    xs = (0, w * c, -h * s, w * c - h * s)
    ys = (0, w * s, h * c, w * s + h * c)
    corners = (
        x + min(xs),
        y + min(ys),
        x + max(xs),
        y + max(ys),
    )
    return imported.box(frame, corners, cut=True)


def _tell_other_units(imported: Import, percent: list[float]) -> None:
    """Tells of a rectangle that is hardly in percent. Raises FieldError where it cannot be."""
    x, y, width, height = percent
    # Above a rounding error: rotated rectangles may begin outside the picture.
    if max(x, y) >= 101 or max(width, height) > 150:
        raise FieldError(
            f"x {x:g}, y {y:g}, width {width:g}, height {height:g} are not percent of the picture",
            "pixels are 100 / width (or height) of it each, and the scale 0 to 1000 is 10 times it",
        )
    if min(x, y) >= 0 and 0 < x + width <= 1 and 0 < y + height <= 1:
        imported.remarks[
            "boxes within one percent of the upper left corner: if they are fractions of the "
            "picture, multiply them by 100"
        ] += 1


# ----------------------------------------------------------------------------------------------
# questions and answers


class _Texts:
    """What the annotator wrote or chose, by kind ("question", "answer", "other") and by region: the
    id of a rectangle, or "" for the whole picture.
    """

    def __init__(self, task: Task, regions: set[str]) -> None:
        self._texts: defaultdict[tuple[str, str], list[object]] = defaultdict(list)
        for result in task.results:
            if result.get("type") in TEXTS:
                value = result.get("value") or {}
                texts = value.get("text") or value.get("choices") or []
                region = str(result.get("id"))
                place = (_kind_of(result), region if region in regions else "")
                self._texts[place] += texts if isinstance(texts, list) else [texts]
        question, answer = (task.data.get(name) for name in ("question", "answer"))
        self._own_question: list[object] = [question] if isinstance(question, str) else []
        answered = any(kind == "answer" for kind, _ in self._texts)
        if self._own_question and isinstance(answer, str) and not answered:
            self._texts["answer", ""] = [answer]

    def regions(self) -> list[str]:
        """The regions that have something else than a question."""
        return sorted({region for kind, region in self._texts if kind != "question"})

    def questions(self, region: str) -> list[object]:
        own = self._texts.get(("question", region)) or self._texts.get(("question", ""))
        return own or self._own_question

    def answers(self, region: str) -> list[object]:
        return self._texts.get(("answer", region)) or self._texts.get(("other", region)) or []


def _kind_of(result: Result) -> str:
    name = str(result.get("from_name", "")).lower()
    return next((kind for kind in ("question", "answer") if kind in name), "other")


def _add_samples(imported: Import, task: Task, rectangles: list[Detection]) -> bool:
    """Adds the samples that a task's own questions and answers make; False where it has none."""
    texts = _Texts(task, {rectangle.id for rectangle in rectangles})
    has_questions = False
    for region in texts.regions():
        questions = texts.questions(region)
        answers = texts.answers(region)
        if not questions or not answers:
            imported.omissions["texts and choices without a question"] += 1
            continue
        has_questions = True
        if len(questions) != len(answers):
            error = FieldError(
                f"has {len(questions)} questions for {len(answers)} answers",
                "write one for each",
                "result",
            )
            imported.report(error, item=task.item)
            continue
        # The same box may stand in several rectangles.
        boxes = dict.fromkeys(r.box for r in rectangles if not region or r.id == region)
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            place = [region] if region else []
            name = "-".join([task.id, task.annotation, *place, f"q{i}"])
            _add_sample(
                imported=imported,
                task=task,
                name=name,
                question=question,
                answer=answer,
                boxes=tuple(boxes),
            )
    return has_questions


def _add_sample(
    imported: Import,
    task: Task,
    name: str,
    question: object,
    answer: object,
    boxes: tuple[Box, ...],
) -> None:
    row = Row({"question": question, "answer": answer})
    checked_question = row.need("question", plain_text)
    checked_answer = row.need("answer", plain_text)
    for error in row.errors:
        imported.report(error, item=task.item)
    if checked_question is None or checked_answer is None:
        return
    sample = Sample(
        id=name,
        images=(task.path,),
        question=checked_question.strip(),
        answer=checked_answer.strip(),
        choices=None,
        boxes=boxes,
        type="question",
    )
    imported.samples.append(sample)
