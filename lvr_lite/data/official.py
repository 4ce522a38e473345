"""Samples of the official LVR data: one JSON list of {"dataset", "split", "question_id", "image",
"conversations", "bboxes"} (arXiv 2509.24251).

May import: the standard library and what stands above `data`.
"""

from __future__ import annotations

import re
from pathlib import Path

from lvr_lite.data.foreign_names import reject_other_boxes
from lvr_lite.data.rows import (
    BoxCheck,
    FieldError,
    JsonObject,
    Row,
    has_lone_surrogate,
    plain_text,
    text,
)
from lvr_lite.data.samples import Sample

_ID_FIELDS = ("dataset", "split", "question_id")


def from_official(
    data: JsonObject, folder: Path, item: int, box: BoxCheck
) -> Sample | list[FieldError]:
    """An item of the official LVR list: the sample, or what is wrong with it.

    Its id is dataset-split-question_id, of those that are there; its type is the dataset.
    """
    row = Row(data)
    names = [str(data[f]) for f in _ID_FIELDS if data.get(f) not in (None, "")]
    if has_lone_surrogate("".join(names)):
        row.reject("question_id", "holds half of a surrogate pair, which is no character")
    if data.get("question_id") in (None, ""):
        names.append(f"item{item}")
    images = row.images(folder)
    boxes = row.boxes("bboxes", box)
    reject_other_boxes(row, "bboxes")
    human, gpt = _turns(row)
    question = _question(row, human, len(images))
    answer = _answer(row, gpt)
    kind = None
    if data.get("dataset"):
        kind = str(data["dataset"])
    if row.errors or question is None or answer is None:
        return row.errors
    return Sample(
        id="-".join(names),
        images=images,
        question=question,
        answer=answer,
        choices=None,
        boxes=boxes,
        type=kind,
    )


def _turns(row: Row) -> tuple[str | None, str | None]:
    """The texts of the two turns; None, with the error noted, where they are not there."""
    turns = row.need("conversations", _two_turns)
    if turns is None:
        return None, None
    human = row.check("conversations[0].value", turns[0].get("value"), text)
    return human, row.check("conversations[1].value", turns[1].get("value"), text)


def _two_turns(value: object) -> list[JsonObject]:
    turns = value if isinstance(value, list) else []
    if [turn.get("from") if isinstance(turn, dict) else None for turn in turns] != ["human", "gpt"]:
        raise FieldError(
            "must be two turns, from human and then from gpt",
            "split longer conversations into several items",
        )
    return turns


def _question(row: Row, human: str | None, pictures: int) -> str | None:
    if human is None:
        return None
    field = "conversations[0].value"
    question = re.sub(r"^(\s*<image>)+", "", human).strip()
    marks = human.count("<image>")
    if "<image>" in question:
        row.reject(field, "has <image> after the text", "put all <image> before the question")
    elif marks and marks != pictures:
        row.reject(field, f"has {marks} <image> for {pictures} pictures", "write one for each")
    return row.check(field, question, plain_text)


def _answer(row: Row, gpt: str | None) -> str | None:
    """What stands between <answer> and </answer>, or, without them, the whole text but <lvr>."""
    if gpt is None:
        return None
    field = "conversations[1].value"
    marks = gpt.count("<lvr>")
    boxes = row.values.get("bboxes") or []
    if isinstance(boxes, list) and marks != len(boxes):
        row.reject(
            field, f"has {marks} <lvr> for {len(boxes)} boxes in bboxes", "write one for each"
        )
    _, _, behind_tag = gpt.partition("<answer>")
    answer, closed, _ = behind_tag.partition("</answer>")
    if not closed:
        answer = gpt.replace("<lvr>", "")
    return row.check(field, answer.strip(), plain_text)
