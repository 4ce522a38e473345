"""Tasks of Label Studio's JSON export: a picture each, with the results of one annotation. May
import: the standard library and what stands above `data`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from lvr_lite.data.convert.reading import Import, Size, size_of
from lvr_lite.data.rows import FieldError, JsonObject, flag
from lvr_lite.model.images import SUFFIXES

TEXTS = ("textarea", "choices")
# What marks no region of its own, so that it hides no object.
_NO_REGION = frozenset(
    (*TEXTS, "relation", "rating", "number", "datetime", "taxonomy", "pairwise", "ranker", "chat")
)
_GEOMETRY = frozenset(("x", "y", "points", "vertices", "rle", "radiusX", "x1", "imageDataURL"))

# A result of an annotation: {"type", "id", "from_name", "value": {…}, …}. Labels, texts and choices
# in it may be of any type, so each is checked where it is used.
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
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


def tasks_of(imported: Import, value: object, item: int) -> list[Task]:
    """One for each picture that has results; none for a task without an annotation. Raises
    FieldError.
    """
    if not isinstance(value, dict):
        raise _not_a_task()
    data = value.get("data")
    annotations = value.get("annotations")
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise _not_a_task()
    if not all(map(_has_results, annotations)):
        raise FieldError("each must be an object with a list of results", field="annotations")
    valid = [a for a in annotations if not flag(a.get("was_cancelled"))]
    imported.omissions["cancelled annotations"] += len(annotations) - len(valid)
    if not valid:
        guessed = ""
        if value.get("predictions"):
            guessed = " but with predictions, which are not read"
        imported.omissions[f"tasks without an annotation{guessed}"] += 1
        return []
    # The first ground truth, or else the first.
    annotation = min(valid, key=lambda a: not flag(a.get("ground_truth")))
    imported.omissions["other annotations of a task"] += len(valid) - 1
    results = annotation["result"]
    if not all(map(_is_result, results)):
        raise FieldError("each must be an object with a value", field="result")
    name = str(value.get("id", f"task{item}"))
    tasks = []
    for key, own in _by_picture(imported, data, results):
        size = _size(own)
        path = _picture(imported, data, key)
        imported.pixels_of(path, size)
        task = Task(
            item=item,
            id=f"{name}-{key}" if key else name,
            data=data,
            annotation=str(annotation.get("id", "annotation")),
            results=own,
            path=path,
            size=size,
        )
        tasks.append(task)
    return tasks


def _size(results: list[Result]) -> Size | None:
    """The picture's size, as the results state it. Raises FieldError where it was turned."""
    for result in results:
        rotation = str(result.get("image_rotation") or 0)
        if rotation not in ("0", "0.0"):
            raise FieldError(
                "was turned in Label Studio",
                "turn it back there and export again",
                "image_rotation",
            )
    for result in results:
        size = size_of(result, "original_width", "original_height")
        if size:
            return size
    return None


def _by_picture(
    imported: Import, data: JsonObject, results: list[Result]
) -> list[tuple[str, list[Result]]]:
    """The results of each picture of a task, by the field that names it: their `to_name`, which an
    export gives no other way to tell. One picture, named in the usual way, has the field "".
    """
    keys = [key for key, value in data.items() if _is_picture(value)]
    regions = [result for result in results if marks_region(result) and result.get("to_name")]
    to_names = {str(region["to_name"]) for region in regions}
    matched = to_names & set(keys)
    if len(keys) > 1 and len(to_names) == 1 and not matched:
        (only,) = to_names
        imported.remarks[
            f"tasks of several pictures of which none is named as to_name is ({only}); its "
            "results were taken for those of data.image"
        ] += 1
    if len(keys) < 2 or (len(to_names) < 2 and not matched):
        return [("", _of_one_picture(imported, results, to_names, keys))]
    for region in regions:
        name = region["to_name"]
        if str(name) not in keys:
            imported.omissions[f"results of a picture that no field of data names ({name})"] += 1
    by_picture = []
    for key in keys:
        own = [result for result in results if str(result.get("to_name")) == key]
        usual = key == "image" and len(matched) < 2
        if own:
            by_picture.append(("" if usual else key, own))
    return by_picture


def _of_one_picture(
    imported: Import,
    results: list[Result],
    to_names: set[str],
    keys: list[str],
) -> list[Result]:
    """The results without those of another picture, which the task does not name."""
    if len(to_names) < 2:
        return results
    own = to_names & {*keys, "image"}
    if len(own) != 1:
        names = ", ".join(sorted(to_names))
        raise FieldError(
            f"has regions of {len(to_names)} pictures ({names}) and data names {len(keys)}",
            "name the fields of data as to_name does",
            "to_name",
        )
    kept = []
    for result in results:
        if marks_region(result) and str(result.get("to_name")) not in own:
            imported.omissions["results of another picture of the task"] += 1
        else:
            kept.append(result)
    return kept


def _is_picture(value: object) -> bool:
    if not isinstance(value, str):
        return False
    url = _url(value)
    (query, *_) = parse_qs(url.query).get("d", [""])
    return _names_picture(url.path) or _names_picture(query)


def _url(text: str) -> SplitResult:
    """The parts of a URL; a text that is none is all path."""
    try:
        return urlsplit(text)
    except ValueError:
        return SplitResult("", "", text, "", "")


def _names_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def marks_region(result: Result) -> bool:
    """Whether a result is a region of a picture, and no statement about one or about all."""
    kind = str(result.get("type"))
    if kind in _NO_REGION:
        return False
    if kind.endswith("labels"):
        return True
    value = result.get("value") or {}
    return not _GEOMETRY.isdisjoint(value)


def _not_a_task() -> FieldError:
    return FieldError("must be a task with data and annotations", "export as JSON, not as JSON-MIN")


def _has_results(annotation: object) -> bool:
    return isinstance(annotation, dict) and isinstance(annotation.get("result"), list)


def _is_result(result: object) -> bool:
    return isinstance(result, dict) and isinstance(result.get("value") or {}, dict)


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
        names = [text for text in texts if _names_picture(_url(text).path)]
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
