"""Reader of Label Studio's JSON export: rectangles with classes, or with questions and answers. May
import: the standard library and what stands above `data`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from lvr_lite.data.boxes import Box
from lvr_lite.data.convert.detections import Detection
from lvr_lite.data.convert.reading import Frame, Import, Size, class_name, size_of
from lvr_lite.data.rows import FieldError, JsonObject, Row, flag, numbers, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import SUFFIXES

_RECTANGLES = ("rectanglelabels", "rectangle")
_TEXTS = ("textarea", "choices")
# What marks no region of its own, so that it hides no object.
_NO_REGION = frozenset(
    (*_TEXTS, "relation", "rating", "number", "datetime", "taxonomy", "pairwise", "ranker", "chat")
)
_GEOMETRY = frozenset(("x", "y", "points", "vertices", "rle", "radiusX", "x1", "imageDataURL"))

# A result of an annotation: {"type", "id", "from_name", "value": {…}, …}. Labels, texts and choices
# in it may be of any type, so each is checked where it is used.
Result = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """A picture with the annotation of it that is read.

    item: place in the export, from 1.
    data: what the task shows.
    annotation: id of the annotation.
    size: of the picture, as the results state it.
    """

    item: int
    id: str
    data: JsonObject
    annotation: str
    results: list[Result]
    path: Path
    size: Size | None


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
    tasks: list[_Task] = []
    for item, value in enumerate(values, 1):
        with imported.row(item=item):
            tasks += _tasks(imported, value, item)
    imported.learn_pixels((task.path, task.size) for task in tasks)
    pictures = []
    for task in tasks:
        rectangles = _rectangles(imported, task)
        if not _add_samples(imported, task, rectangles.named + rectangles.unnamed):
            imported.omissions["rectangles without a class"] += len(rectangles.unnamed)
            pictures.append((task, rectangles))
    used = {detection.name for _, rectangles in pictures for detection in rectangles.named}
    for task, rectangles in pictures:
        unsure = used if rectangles.all_unsure else rectangles.unsure
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
# tasks


def _tasks(imported: Import, value: object, item: int) -> list[_Task]:
    """One for each picture that has results; none for a task without an annotation. Raises
    FieldError.
    """
    if not isinstance(value, dict) or not isinstance(value.get("data"), dict):
        raise _not_a_task()
    if not isinstance(value.get("annotations"), list):
        raise _not_a_task()
    whole = [a for a in value["annotations"] if _has_results(a)]
    if len(whole) < len(value["annotations"]):
        raise FieldError("each must be an object with a list of results", field="annotations")
    valid = [a for a in whole if not flag(a.get("was_cancelled"))]
    imported.omissions["cancelled annotations"] += len(whole) - len(valid)
    if not valid:
        guessed = " but with predictions, which are not read" if value.get("predictions") else ""
        imported.omissions[f"tasks without an annotation{guessed}"] += 1
        return []
    valid.sort(key=lambda a: not flag(a.get("ground_truth")))
    imported.omissions["other annotations of a task"] += len(valid) - 1
    results = valid[0]["result"]
    if not all(isinstance(r, dict) and isinstance(r.get("value") or {}, dict) for r in results):
        raise FieldError("each must be an object with a value", field="result")
    name = str(value.get("id", f"task{item}"))
    annotation = str(valid[0].get("id", "annotation"))
    tasks = []
    for key, own in _by_picture(imported, value["data"], results):
        size = _size(own)
        path = _picture(imported, value["data"], key)
        imported.pixels_of(path, size)
        own_name = f"{name}-{key}" if key else name
        tasks.append(_Task(item, own_name, value["data"], annotation, own, path, size))
    return tasks


def _size(results: list[Result]) -> Size | None:
    """The picture's size, as the results state it. Raises FieldError where it was turned."""
    if any(str(result.get("image_rotation") or 0) not in ("0", "0.0") for result in results):
        raise FieldError(
            "was turned in Label Studio", "turn it back there and export again", "image_rotation"
        )
    sizes = (size_of(result, "original_width", "original_height") for result in results)
    return next((size for size in sizes if size), None)


def _by_picture(
    imported: Import, data: JsonObject, results: list[Result]
) -> list[tuple[str, list[Result]]]:
    """The results of each picture of a task, by the field that names it: their `to_name`, which an
    export gives no other way to tell. One picture, named in the usual way, has the field "".
    """
    keys = [key for key, value in data.items() if _is_picture(value)]
    to_names = {str(r.get("to_name")) for r in results if _marks_region(r) and r.get("to_name")}
    matched = to_names & set(keys)
    if len(keys) > 1 and len(to_names) == 1 and not matched:
        (only,) = to_names
        imported.remarks[
            f"tasks of several pictures of which none is named as to_name is ({only}); its "
            "results were taken for those of data.image"
        ] += 1
    if len(keys) < 2 or (len(to_names) < 2 and not matched):
        return [("", _of_one_picture(imported, results, to_names, keys))]
    for result in results:
        name = result.get("to_name")
        if _marks_region(result) and name and str(name) not in keys:
            imported.omissions[f"results of a picture that no field of data names ({name})"] += 1
    return [
        (key if len(matched) > 1 or key != "image" else "", own)
        for key in keys
        if (own := [r for r in results if str(r.get("to_name")) == key])
    ]


def _of_one_picture(
    imported: Import,
    results: list[Result],
    to_names: set[str],
    keys: list[str],
) -> list[Result]:
    """The results without those of another picture, which the task does not name."""
    own = to_names & {*keys, "image"}
    if len(to_names) < 2:
        return results
    if len(own) != 1:
        names = ", ".join(sorted(to_names))
        raise FieldError(
            f"has regions of {len(to_names)} pictures ({names}) and data names {len(keys)}",
            "name the fields of data as to_name does",
            "to_name",
        )
    others = [r for r in results if _marks_region(r) and str(r.get("to_name")) not in own]
    imported.omissions["results of another picture of the task"] += len(others)
    return [r for r in results if r not in others]


def _is_picture(value: object) -> bool:
    if not isinstance(value, str):
        return False
    url = _url(value)
    query = parse_qs(url.query).get("d", [""])[0]
    return any(name.lower().endswith(SUFFIXES) for name in (url.path, query))


def _url(text: str) -> SplitResult:
    """The parts of a URL; a text that is none is all path."""
    try:
        return urlsplit(text)
    except ValueError:
        return SplitResult("", "", text, "", "")


def _marks_region(result: Result) -> bool:
    """Whether a result is a region of a picture, and no statement about one or about all."""
    kind = str(result.get("type"))
    if kind in _NO_REGION:
        return False
    return kind.endswith("labels") or bool(_GEOMETRY & set(result.get("value") or {}))


def _not_a_task() -> FieldError:
    return FieldError("must be a task with data and annotations", "export as JSON, not as JSON-MIN")


def _has_results(annotation: object) -> bool:
    return isinstance(annotation, dict) and isinstance(annotation.get("result"), list)


def _picture(imported: Import, data: JsonObject, key: str = "") -> Path:
    """The file of a task's picture, which the task names by a path or a URL. Raises FieldError.

    key: the field that names it; by default `image`, or the only one that names a picture.
    """
    value = data.get(key or "image")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise FieldError(
            f"data.image is a list of {len(value)} pages, and boxes are of one picture",
            "make each page a task of its own",
        )
    if isinstance(value, dict):
        raise FieldError("data.image is an object", "it must be text that names the picture")
    if not isinstance(value, str):
        texts = [text for text in data.values() if isinstance(text, str)]
        names = [text for text in texts if _url(text).path.lower().endswith(SUFFIXES)]
        if len(names) != 1:
            raise FieldError("data.image is missing", "it must name the picture")
        value = names[0]
    if value.startswith("data:"):
        raise FieldError("data.image holds the picture itself", "save it as a file and name that")
    name = value
    rooted = False
    if imported.images is None or not (imported.images / value).is_file():
        name = _name_in_url(value)
        # Of a server's or a storage's root it is not known where it lies here.
        rooted = name != value
    try:
        return imported.find(name, rooted)
    except FieldError:
        # Uploading puts eight hexadecimal digits before a name.
        folder, _, last = name.rpartition("/")
        bare = re.sub(r"^[0-9a-f]{8}-", "", last)
        if not bare or bare == last:
            raise
        path = imported.find(f"{folder}/{bare}".lstrip("/"), rooted)
        imported.found_by_end[path] = name
        return path


def _name_in_url(value: str) -> str:
    url = _url(value)
    query = parse_qs(url.query)
    if "local-files" in url.path and "d" in query:
        return query["d"][0]
    # A scheme of one letter is a Windows drive.
    if url.path.startswith("/data/") or len(url.scheme) > 1:
        path = unquote(url.path)
        if path.startswith("/data/upload/"):
            # The number of a project is no folder here.
            return re.sub(r"^/data/upload/(\d+/)?", "", path)
        return path.lstrip("/")
    return value


# ----------------------------------------------------------------------------------------------
# rectangles


def _rectangles(imported: Import, task: _Task) -> _Rectangles:
    rectangles = _Rectangles()
    labels_of = _labels_by_region(task.results)
    geometries = {str(r.get("id")) for r in task.results if r.get("type") not in ("labels", None)}
    frame = imported.frame(task.path, task.size)
    for number, result in enumerate(task.results):
        kind = str(result.get("type"))
        if not _marks_region(result):
            if kind not in _TEXTS:
                imported.omissions[f"results of type {kind}"] += 1
            continue
        value = result.get("value") or {}
        own = str(result.get("id", f"r{number}"))
        # <Labels> beside <Rectangle>: the classes of a region come as a result of their own.
        if kind == "labels" and own in geometries:
            continue
        if kind == "labels" and {"x", "y", "width", "height"} <= set(value):
            kind = "rectangle"
        labels = value.get("labels" if kind == "rectangle" else kind) or value.get("labels") or []
        labels = labels or labels_of.get(own, [])
        labels = labels if isinstance(labels, list) else [labels]
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
            rectangles.named.append(
                Detection(
                    name,
                    box,
                    own if i == 0 else f"{own}.{i}",
                )
            )
        if not names:
            rectangles.unnamed.append(Detection("", box, own))
    return rectangles


def _labels_by_region(results: list[Result]) -> dict[str, list[object]]:
    """The classes that <Labels> gives to regions, by the region's id."""
    labels: defaultdict[str, list[object]] = defaultdict(list)
    for result in results:
        if result.get("type") == "labels":
            own = (result.get("value") or {}).get("labels") or []
            labels[str(result.get("id"))] += own if isinstance(own, list) else [own]
    return labels


def _box(imported: Import, frame: Frame, value: JsonObject) -> Box:
    """The upright rectangle around a rotated one. Raises FieldError."""
    percent = numbers([value.get(key) for key in ("x", "y", "width", "height")], 4)
    (degrees,) = numbers([value.get("rotation") or 0], 1)
    _tell_other_units(imported, percent)
    x = percent[0] * frame.width / 100
    y = percent[1] * frame.height / 100
    w = percent[2] * frame.width / 100
    h = percent[3] * frame.height / 100
    if degrees == 0 or w <= 0 or h <= 0:
        return imported.box(frame, (x, y, x + w, y + h))
    c = math.cos(math.radians(degrees))
    s = math.sin(math.radians(degrees))
    xs = (0, w * c, -h * s, w * c - h * s)
    ys = (0, w * s, h * c, w * s + h * c)
    corners = (x + min(xs), y + min(ys), x + max(xs), y + max(ys))
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

    def __init__(self, task: _Task, regions: set[str]) -> None:
        self._texts: defaultdict[tuple[str, str], list[object]] = defaultdict(list)
        for result in task.results:
            if result.get("type") in _TEXTS:
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


def _add_samples(imported: Import, task: _Task, rectangles: list[Detection]) -> bool:
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
            _add_sample(imported, task, name, question, answer, tuple(boxes))
    return has_questions


def _add_sample(
    imported: Import,
    task: _Task,
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
        name,
        (task.path,),
        checked_question.strip(),
        checked_answer.strip(),
        None,
        boxes,
        "question",
    )
    imported.samples.append(sample)
