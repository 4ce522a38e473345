"""Label Studio's JSON export: rectangles with classes, or with questions and answers. May import:
the standard library and the core.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from lvr_lite.data.boxes import Box
from lvr_lite.data.convert.detections import Thing
from lvr_lite.data.convert.reading import (
    SUFFIXES,
    Found,
    Frame,
    class_name,
    size_of,
)
from lvr_lite.data.rows import FieldError, Row, numbers, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError


@dataclass(frozen=True)
class _Task:
    item: int
    id: str
    data: dict[str, Any]
    annotation: dict[str, Any]
    path: Path
    size: tuple[float, float] | None

    def results(self, *kinds: str) -> list[dict[str, Any]]:
        return [r for r in self.annotation["result"] if r.get("type") in kinds]


_RECTANGLES, _TEXTS = ("rectanglelabels", "rectangle"), ("textarea", "choices")


def labelstudio(found: Found) -> None:
    """The JSON export: x, y, width, height in percent of the picture as shown, rotation in degrees
    clockwise about x, y. Texts whose name (from_name) has "question" or "answer" in it, or the
    task's own question, make a sample of all rectangles or of their own.
    """
    tasks = found.json()
    if not isinstance(tasks, list):
        raise DataError(f"{found.source}: not Label Studio's JSON export, which is a list of tasks")
    whole = [
        task for item, data in enumerate(tasks, 1) if (task := _task(found, data, item)) is not None
    ]
    found.learn((task.path, task.size) for task in whole)
    pictures = []
    for task in whole:
        things, unsure, unlabelled = _rectangles(found, task)
        if not _answered(found, task, things + unlabelled):
            found.skipped["rectangles without a class"] += len(unlabelled)
            pictures.append((task, things, unsure))
    used = {thing.name for _, things, _ in pictures for thing in things}
    for task, things, unsure in pictures:
        found.picture(
            task.id,
            task.path,
            things,
            used if None in unsure else {u for u in unsure if u is not None},
            used,
        )


def _task(found: Found, data: Any, item: int) -> _Task | None:
    try:
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("data"), dict)
            or not isinstance(data.get("annotations"), list)
        ):
            raise FieldError(
                "must be a task with data and annotations; export as JSON, not as JSON-MIN"
            )
        done = [
            a
            for a in data["annotations"]
            if isinstance(a, dict) and isinstance(a.get("result"), list)
        ]
        if len(done) < len(data["annotations"]):
            raise FieldError("annotations: each must be an object with a list of results")
        kept = [a for a in done if not a.get("was_cancelled")]
        found.skipped["cancelled annotations"] += len(done) - len(kept)
        if not kept:
            found.skipped["tasks without an annotation"] += 1
            return None
        kept.sort(key=lambda a: not a.get("ground_truth"))
        found.skipped["other annotations of a task"] += len(kept) - 1
        if not all(
            isinstance(r, dict) and isinstance(r.get("value") or {}, dict)
            for r in kept[0]["result"]
        ):
            raise FieldError("result: each must be an object with a value")
        if any(r.get("image_rotation") for r in kept[0]["result"]):
            raise FieldError(
                "image_rotation: was turned in Label Studio; turn it back there and export again"
            )
        size = next(
            (
                s
                for r in kept[0]["result"]
                if (s := size_of(r, "original_width", "original_height"))
            ),
            None,
        )
        path = _studio_picture(found, data["data"])
        found.tells(path, size)
        return _Task(item, str(data.get("id", f"task{item}")), data["data"], kept[0], path, size)
    except FieldError as error:
        found.broken("", str(error), item=item)
        return None


def _studio_picture(found: Found, data: dict[str, Any]) -> Path:
    value = data.get("image")
    if not isinstance(value, str):
        named = [
            v
            for v in data.values()
            if isinstance(v, str) and urlsplit(v).path.lower().endswith(SUFFIXES)
        ]
        if len(named) != 1:
            raise FieldError("data.image is missing; it must name the picture")
        (value,) = named
    name = value
    url = urlsplit(value)
    if value.startswith("data:"):
        raise FieldError("data.image holds the picture itself; save it as a file and name that")
    if found.images is None or not (found.images / value).is_file():
        if "local-files" in url.path and "d" in parse_qs(url.query):
            name = parse_qs(url.query)["d"][0]
        elif url.path.startswith("/data/") or len(url.scheme) > 1:  # one letter is a Windows drive
            name = unquote(url.path).removeprefix("/data/upload/").lstrip("/")
    try:
        return found.find(name)
    except FieldError:
        folder, _, last = name.rpartition("/")
        if (
            not (bare := re.sub(r"^[0-9a-f]{8}-", "", last)) or bare == last
        ):  # what uploading puts before a name
            raise
        return found.find(f"{folder}/{bare}".lstrip("/"))


def _rectangles(found: Found, task: _Task) -> tuple[list[Thing], set[str | None], list[Thing]]:
    """Things; classes of which one may be missing (None: of any); rectangles without a class."""
    things: list[Thing] = []
    unlabelled: list[Thing] = []
    unsure: set[str | None] = set()
    frame = found.frame(task.path, task.size)
    for number, result in enumerate(task.annotation["result"]):
        kind, value = result.get("type"), result.get("value") or {}
        labels = value.get(kind if kind != "rectangle" else "labels") or value.get("labels") or []
        labels = [labels] if isinstance(labels, str) else labels
        if kind in _TEXTS:
            continue
        if kind not in _RECTANGLES:
            found.skipped[f"results of type {kind}"] += 1
            unsure |= set(map(str, labels)) if isinstance(labels, list) and labels else {None}
            continue
        try:
            names = [class_name(label) for label in labels]
            box = _rectangle(found, frame, value)
        except FieldError as error:
            found.broken(f"result[{number}] (id {result.get('id')})", str(error), item=task.item)
            unsure.add(None)
            continue
        own = str(result.get("id", f"r{number}"))
        things += [
            Thing(name, box, own if i == 0 else f"{own}.{i}") for i, name in enumerate(names)
        ]
        unlabelled += [] if names else [Thing("", box, own)]
    return things, unsure, unlabelled


def _rectangle(found: Found, frame: Frame, value: dict[str, Any]) -> Box:
    x, y, w, h = numbers([value.get(k) for k in ("x", "y", "width", "height")], 4)
    (turn,) = numbers([value.get("rotation") or 0], 1)
    x, w = x * frame.width / 100, w * frame.width / 100
    y, h = y * frame.height / 100, h * frame.height / 100
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    if turn == 0 or w <= 0 or h <= 0:
        return found.box(frame, x, y, x + w, y + h)
    xs, ys = (0, w * c, -h * s, w * c - h * s), (0, w * s, h * c, w * s + h * c)
    return found.box(frame, x + min(xs), y + min(ys), x + max(xs), y + max(ys), cut=True)


def _answered(found: Found, task: _Task, things: list[Thing]) -> bool:
    """Adds the samples that a task's own questions and answers make; False where it has none."""
    regions = {thing.id for thing in things}
    said: defaultdict[tuple[str, str], list[str]] = defaultdict(
        list
    )  # (what, region or "") -> texts
    for result in task.results(*_TEXTS):
        name, value = str(result.get("from_name", "")).lower(), result.get("value") or {}
        texts = value.get("text") or value.get("choices") or []
        what = "question" if "question" in name else "answer" if "answer" in name else "other"
        region = str(result.get("id")) if str(result.get("id")) in regions else ""
        said[what, region] += texts if isinstance(texts, list) else [texts]
    given = [task.data[k] for k in ("question", "answer") if isinstance(task.data.get(k), str)]
    if len(given) == 2 and not any(what == "answer" for what, _ in said):
        said["answer", ""] = [given[1]]
    made = False
    for region in sorted({region for what, region in said if what != "question"}):
        answers = said.get(("answer", region)) or said.get(("other", region)) or []
        asked = said.get(("question", region)) or said.get(("question", "")) or given[:1]
        if not asked or not answers:
            found.skipped["texts and choices without a question"] += 1
            continue
        made = True
        boxes = tuple(dict.fromkeys(t.box for t in things if t.id == region or not region))
        if len(asked) != len(answers):
            found.broken(
                "result",
                f"has {len(asked)} questions for {len(answers)} answers; write one for each",
                item=task.item,
            )
            continue
        for i, texts in enumerate(zip(asked, answers, strict=True)):
            row = Row({})
            question = row.check("question", texts[0], plain_text)
            answer = row.check("answer", texts[1], plain_text)
            for error in row.errors:
                found.broken(error.field, str(error), item=task.item)
            if question is not None and answer is not None:
                name = "-".join(
                    [
                        task.id,
                        str(task.annotation.get("id", "annotation")),
                        *([region] if region else []),
                        f"q{i}",
                    ]
                )
                found.samples.append(
                    Sample(
                        name,
                        (task.path,),
                        question.strip(),
                        answer.strip(),
                        None,
                        boxes,
                        "question",
                    )
                )
    return made
