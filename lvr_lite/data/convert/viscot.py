"""Readers of Visual-CoT's metadata and of the official LVR list, which both have questions. May
import: the standard library and what stands above `data`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lvr_lite.data.boxes import Box
from lvr_lite.data.convert.reading import Import, Size, size_of
from lvr_lite.data.foreign_names import reject_other_boxes
from lvr_lite.data.rows import (
    FieldError,
    JsonObject,
    Row,
    as_on_disk,
    exists,
    numbers,
    parse_json,
    plain_text,
    refuse_half_characters,
)
from lvr_lite.data.sample_files import placed_samples
from lvr_lite.data.samples import Sample
from lvr_lite.errors import UsageError


@dataclass(frozen=True)
class _Item:
    """One object of Visual-CoT, with its line or its place in a list, its picture and its size."""

    data: JsonObject
    line: int | None
    item: int | None
    path: Path
    size: Size | None


def viscot(imported: Import) -> None:
    """One object a line or one list: question, answer, image, width, height, bboxs in pixels,
    dataset, split.
    """
    split = imported.split
    items = []
    for line, item, data in _objects(imported):
        if split is None or not isinstance(data, dict) or data.get("split") == split:
            with imported.row("", line, item):
                items.append(_checked_item(imported, line, item, data))
    imported.learn_pixels((one.path, one.size) for one in items)
    for one in items:
        row = Row(one.data)
        question = row.need("question", plain_text)
        answer = row.need("answer", plain_text)
        reject_other_boxes(row, "bboxs")
        for error in row.errors:
            imported.report(error, "", one.line, one.item)
        with imported.row("bboxs", one.line, one.item):
            boxes = _boxes(imported, one)
            if question is not None and answer is not None:
                imported.samples.append(
                    _sample(
                        one,
                        question.strip(),
                        answer.strip(),
                        boxes,
                    )
                )
    if split is not None and not items:
        raise UsageError(f"--split {split}: no row of {imported.source} has it")


def _objects(imported: Import) -> Iterator[tuple[int | None, int | None, object]]:
    """Each object with its line, or of a list with its item."""
    text = imported.text()
    if text.lstrip().startswith("["):
        values = imported.json()
        assert isinstance(values, list)
        for item, value in enumerate(values, 1):
            yield None, item, value
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
            refuse_half_characters(line, value)
        except FieldError as error:
            imported.report(error, line=number)
            continue
        yield number, None, value


def _checked_item(
    imported: Import,
    line: int | None,
    item: int | None,
    data: object,
) -> _Item:
    if not isinstance(data, dict):
        raise FieldError("must be an object with question, answer, image and bboxs")
    name = data.get("image")
    if not isinstance(name, str) or not name or "\0" in name:
        raise FieldError("is missing", "it must name the picture", "image")
    if not isinstance(data.get("bboxs") or [], list):
        raise FieldError("must be a list of [x0, y0, x1, y1] in pixels", field="bboxs")
    dataset = data.get("dataset")
    in_its_folder = name
    if isinstance(dataset, str) and dataset:
        in_its_folder = f"{dataset}/{name}"
    path = as_on_disk(imported.folder / name)
    if not exists(path) or not path.is_file():
        path = imported.find(in_its_folder)
    size = size_of(data, "width", "height")
    imported.pixels_of(path, size)
    return _Item(data, line, item, path, size)


def _boxes(imported: Import, one: _Item) -> tuple[Box, ...]:
    frame = imported.measured(imported.frame(one.path, one.size), "pixels")
    listed = one.data.get("bboxs") or []
    assert isinstance(listed, list)
    corners = [numbers(box, 4) for box in listed]
    boxes = [imported.box(frame, (x0, y0, x1, y1)) for x0, y0, x1, y1 in corners]
    return tuple(dict.fromkeys(boxes))


def _sample(
    one: _Item,
    question: str,
    answer: str,
    boxes: tuple[Box, ...],
) -> Sample:
    kind = None
    if one.data.get("dataset"):
        kind = str(one.data["dataset"])
    parts = (kind, one.data.get("split"), one.path.stem, one.line or one.item)
    name = "-".join(str(part) for part in parts if part)
    return Sample(
        id=name,
        images=(one.path,),
        question=question,
        answer=answer,
        choices=None,
        boxes=boxes,
        type=kind,
    )


def lvr(imported: Import) -> None:
    """The official list, as `lvr_lite.data.official` reads it. Its boxes are of the upright picture
    unless the user says otherwise.
    """
    placed, problems = placed_samples(
        imported.source, imported.images, imported.unit in (None, "fractions")
    )
    imported.problems += problems
    for one in placed:
        sample = one.sample
        with imported.row("", one.line, one.item):
            frame = imported.measured(imported.frame(sample.images[0], None), "fractions")
            boxes = tuple(imported.box(frame, box) for box in sample.boxes)
            imported.samples.append(replace(sample, boxes=boxes))
