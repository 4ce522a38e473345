"""Reader of COCO and LVIS instances files (cocodataset.org, "Data format"): boxes are x, y, width,
height in pixels. May import: the standard library and what stands above `data`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data.convert.detections import Detection
from lvr_lite.data.convert.reading import Frame, Import, Size, class_name, size_of
from lvr_lite.data.rows import FieldError, JsonObject, numbers
from lvr_lite.errors import DataError

Names = dict[object, str]


@dataclass(frozen=True)
class _Annotation:
    """A box of an image. label: what problems call it. corner_and_size: x, y, width, height."""

    label: str
    name: str
    corner_and_size: list[float]


def coco(imported: Import) -> None:
    """Of LVIS also the lists of what is not annotated in full, and of what an image lacks."""
    data = imported.json()
    images = _list(imported, data, "images")
    annotations = _list(imported, data, "annotations")
    names = _names(imported, _list(imported, data, "categories"))
    known = {str(image["id"]) for image in images if isinstance(image, dict) and "id" in image}
    boxes, unsure = _boxes(imported, annotations, known, names)
    used = {box.name for of_one in boxes.values() for box in of_one.values()}
    for image, path, frame, data in _whole_images(imported, images):
        detections = []
        for number, annotation in boxes[image].items():
            with imported.row(f"{annotation.label}: bbox"):
                x, y, width, height = annotation.corner_and_size
                box = imported.box(frame, (x, y, x + width, y + height))
                detections.append(Detection(annotation.name, box, number))
        whole = {detection.id for detection in detections}
        broken = {a.name for number, a in boxes[image].items() if number not in whole}
        partial = _names_of(data.get("not_exhaustive_category_ids"), names)
        lacking = data.get("neg_category_ids")
        classes = used if lacking is None else _names_of(lacking, names)
        unknown = unsure[image] | broken | partial
        imported.add_picture(image, path, detections, unknown, classes)


def _names_of(categories: object, names: Names) -> set[str]:
    listed = categories if isinstance(categories, list) else []
    return {names[category] for category in listed if category in names}


def _boxes(
    imported: Import, annotations: list[object], known: set[str], names: Names
) -> tuple[dict[str, dict[str, _Annotation]], dict[str, set[str]]]:
    """Of each image its boxes by id, and the classes of which it may show more."""
    boxes: defaultdict[str, dict[str, _Annotation]] = defaultdict(dict)
    unsure: defaultdict[str, set[str]] = defaultdict(set)
    for i, annotation in enumerate(annotations):
        label = f"annotations[{i}]"
        if not isinstance(annotation, dict):
            imported.report(FieldError("must be an object"), label)
            continue
        if "id" in annotation:
            label += f" (id {annotation['id']})"
        try:
            image, name = _image_and_class(annotation, known, names)
            if annotation.get("iscrowd") or annotation.get("ignore"):
                imported.omissions["crowd regions"] += 1
                unsure[image].add(name)
                continue
            number = str(annotation.get("id", f"a{i}"))
            if number in boxes[image]:
                raise FieldError(f"id {number} is there twice", "give every annotation its own")
            boxes[image][number] = _Annotation(
                label,
                name,
                numbers(annotation.get("bbox"), 4),
            )
        except FieldError as error:
            imported.report(error, label)
            unsure[str(annotation.get("image_id"))] |= set(names.values())
    return boxes, unsure


def _list(imported: Import, data: object, name: str) -> list[object]:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, list):
        raise DataError(
            f"{imported.source}: not a COCO instances file: it must hold the lists images, "
            "annotations and categories"
        )
    return value


def _names(imported: Import, categories: list[object]) -> Names:
    names: Names = {}
    for i, category in enumerate(categories):
        with imported.row(f"categories[{i}]"):
            if not isinstance(category, dict) or not isinstance(category.get("id"), int | str):
                raise FieldError("must be an object with an id and a name")
            names[category["id"]] = class_name(category.get("name"))
    return names


def _image_and_class(
    annotation: JsonObject,
    known: set[str],
    names: Names,
) -> tuple[str, str]:
    """The image's id as text, and the class. Raises FieldError."""
    image = str(annotation.get("image_id"))
    if image not in known:
        raise FieldError(f"image_id {annotation.get('image_id')} is not among the images")
    category = annotation.get("category_id")
    if not isinstance(category, int | str) or category not in names:
        raise FieldError(f"category_id {category} is not among the categories")
    return image, names[category]


def _whole_images(
    imported: Import, images: list[object]
) -> Iterator[tuple[str, Path, Frame, JsonObject]]:
    """The images that are whole: id, picture, the pixels that its boxes are of, all its fields."""
    whole: dict[str, tuple[Path, Size | None, JsonObject]] = {}
    for i, image in enumerate(images):
        with imported.row(f"images[{i}]"):
            if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
                raise FieldError("must be an object with an id and a file_name")
            name = image.get("file_name") or str(image.get("coco_url") or "").split("/")[-1]
            if not isinstance(name, str) or not name or "\0" in name:
                raise FieldError("file_name is missing", "it must name the picture")
            number = str(image["id"])
            if number in whole:
                raise FieldError(f"id {number} is there twice", "give every image its own")
            path = imported.find(name)
            size = size_of(image, "width", "height")
            imported.pixels_of(path, size)
            whole[number] = path, size, image
    imported.learn_pixels((path, size) for path, size, _ in whole.values())
    for number, (path, size, image) in whole.items():
        yield number, path, imported.frame(path, size), image
