"""Fields of samples that other formats call otherwise: named, with what they are to be called here.

May import: the standard library and `data.rows`.
"""

from __future__ import annotations

import re

from lvr_lite.data.rows import JsonObject, Row

# Names, in small letters, that other formats give to the fields.
BOX_NAMES = (
    "bbox",
    "bbox_2d",
    "bboxes",
    "bboxes_2d",
    "bboxs",
    "bounding_box",
    "bounding_boxes",
    "box",
    "box_2d",
    "boxes",
    "regions",
    "rois",
)
# Part of a longer name, such as gt_bbox, that boxes stand under where they stand nowhere else.
_BOX_PART = re.compile(r"(?:^|_)(?:b?box(?:es|s)?|bboxe?s?|bounding_?box(?:es)?)(?:_|$)")
_LOOKALIKES = {
    **dict.fromkeys(BOX_NAMES, "boxes"),
    **dict.fromkeys(
        ("images", "image_path", "image_paths", "image_file", "img", "img_path"), "image"
    ),
    "options": "choices",
}
# These are other data where the field that they may stand for is there.
_STAND_INS = {
    **dict.fromkeys(("query", "problem", "prompt", "instruction"), "question"),
    **dict.fromkeys(("response", "output", "solution", "answers", "target"), "answer"),
    **dict.fromkeys(("ground_truth", "gt_answer", "label", "caption"), "answer"),
    **dict.fromkeys(("conversations", "messages"), "question"),
    **dict.fromkeys(("file_name", "filename", "picture"), "image"),
    **dict.fromkeys(("question_id", "sample_id", "uid"), "id"),
}
# What other trainers read and a sample has no place for.
_NO_PLACE = ("system", "history", "videos", "video", "audios", "audio")
_FIELDS = ("id", "image", "question", "answer", "choices", "boxes", "type", "pair")


def reject_foreign_names(row: Row) -> None:
    """Names the fields that other formats call otherwise, and what they are to be called."""
    _reject_boxes_in_depth(row, "boxes")
    for name, value in row.values.items():
        small = _snake_case(name)
        if small in _NO_PLACE and value:
            row.reject(
                name,
                "is read by other trainers and has no place in a sample",
                "put what the model must know into the question, or remove the field",
            )
            continue
        right = _LOOKALIKES.get(small)
        if right is None and row.values.get(_STAND_INS.get(small, name)) is None:
            right = _STAND_INS.get(small)
        if right is None and small != name and small in _FIELDS:
            right = small
        if name == right or right is None:
            continue
        if small in ("conversations", "messages"):
            remedy = (
                "write `question` and `answer`; an official LVR file is one JSON list, not lines"
            )
        else:
            form = " (fractions of the picture, [x0, y0, x1, y1] each)" if right == "boxes" else ""
            remedy = f"{right!r} is meant, so rename it{form}"
        row.reject(name, "is not a field here", remedy)


def reject_other_boxes(row: Row, right: str) -> None:
    """Names a field that holds boxes under another name than the format's."""
    _reject_boxes_in_depth(row, right)
    for name in row.values:
        if name != right and _snake_case(name) in BOX_NAMES:
            row.reject(name, "is not a field here", f"{right!r} is meant, so rename it")


def _reject_boxes_in_depth(row: Row, right: str) -> None:
    """Where a row has no boxes, names those in a longer name (`gt_bbox`) or in an object
    (`objects: {"bbox": …}`, as ms-swift writes them).
    """
    if row.values.get(right) is not None:
        return
    for name, value in row.values.items():
        small = _snake_case(name)
        if not isinstance(value, list | dict) or not value or small in BOX_NAMES:
            continue
        place = name if _BOX_PART.search(small) else _boxes_inside(name, value)
        if place:
            row.reject(place, "is not a field here", f"write its boxes into {right!r}")


def _boxes_inside(name: str, value: list[object] | JsonObject) -> str:
    """Where boxes stand in an object or in the first one of a list; "" where there are none."""
    first = value[0] if isinstance(value, list) else value
    inner = first if isinstance(first, dict) else {}
    keys = [key for key, part in inner.items() if isinstance(part, list) and _is_box_name(key)]
    if not keys:
        return ""
    return f"{name}[0].{keys[0]}" if isinstance(value, list) else f"{name}.{keys[0]}"


def _is_box_name(name: str) -> bool:
    small = _snake_case(name)
    return small in BOX_NAMES or _BOX_PART.search(small) is not None


def _snake_case(name: str) -> str:
    """A field's name as most write it: `boundingBox` and `Bounding box` are bounding_box."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s]+", "_", name).lower()
