"""Reader of COCO and LVIS instances files (cocodataset.org, "Data format"): boxes are x, y, width,
height in pixels. May import: the standard library and what stands above `data`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data.convert.detections import Detection
from lvr_lite.data.convert.reading import Frame, Import, Size, class_name, size_of
from lvr_lite.data.rows import FieldError, JsonObject, flag, identifier, numbers
from lvr_lite.errors import DataError

Names = dict[str, str]


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
    categories = _list(imported, data, "categories")
    names = _names(imported, categories)
    known = {_id_or_none(image) for image in images if isinstance(image, dict)}
    boxes, unsure = _boxes(imported, annotations, known, names)
    used: set[str] = set()
    for of_one in boxes.values():
        used.update(box.name for box in of_one.values())
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
        classes = used
        if lacking is not None:
            classes = _names_of(lacking, names)
        unknown = unsure[image] | broken | partial
        place = f"images (id {image})"
        imported.add_picture(
            name=image,
            path=path,
            detections=detections,
            unsure=unknown,
            classes=classes,
            place=place,
            broken=bool(broken),
        )


def _names_of(categories: object, names: Names) -> set[str]:
    listed = []
    if isinstance(categories, list):
        listed = categories
    known = {_id_or_none({"id": category}) for category in listed}
    return {names[category] for category in known if category in names}


def _id_or_none(data: JsonObject) -> str | None:
    """The id of an object as text; None where it is none, which is reported elsewhere."""
    try:
        return identifier(data.get("id"))
    except FieldError:
        return None


def _boxes(
    imported: Import, annotations: list[object], known: set[str | None], names: Names
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
            if _flag(annotation, "iscrowd") or _flag(annotation, "ignore"):
                imported.omissions["crowd regions"] += 1
                unsure[image].add(name)
                continue
            number = identifier(annotation["id"]) if "id" in annotation else f"a{i}"
            if number in boxes[image]:
                raise FieldError(f"id {number} is there twice", "give every annotation its own")
            boxes[image][number] = _Annotation(label, name, _bbox(annotation))
        except FieldError as error:
            imported.report(error, label)
            unsure[_id_or_none({"id": annotation.get("image_id")}) or ""] |= set(names.values())
    return boxes, unsure


def _list(imported: Import, data: object, name: str) -> list[object]:
    value = None
    if isinstance(data, dict):
        value = data.get(name)
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
            if not isinstance(category, dict):
                raise FieldError("must be an object with an id and a name")
            names[identifier(category.get("id"))] = class_name(category.get("name"))
    return names


def _image_and_class(
    annotation: JsonObject,
    known: set[str | None],
    names: Names,
) -> tuple[str, str]:
    """The image's id as text, and the class. Raises FieldError."""
    image = _identifier(annotation, "image_id")
    if image not in known:
        raise FieldError(f"image_id {annotation.get('image_id')} is not among the images")
    category = _identifier(annotation, "category_id")
    if category not in names:
        raise FieldError(f"category_id {category} is not among the categories")
    return image, names[category]


def _identifier(annotation: JsonObject, field: str) -> str:
    with _named(field):
        return identifier(annotation.get(field))


def _bbox(annotation: JsonObject) -> list[float]:
    with _named("bbox"):
        return numbers(annotation.get("bbox"), 4)


def _flag(annotation: JsonObject, field: str) -> bool:
    with _named(field):
        return flag(annotation.get(field))


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Puts the field's name before the reason of a FieldError."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{field}: {error.reason}", error.remedy) from error


def _whole_images(
    imported: Import, images: list[object]
) -> Iterator[tuple[str, Path, Frame, JsonObject]]:
    """The images that are whole: id, picture, the pixels that its boxes are of, all its fields."""
    whole: dict[str, tuple[Path, Size | None, JsonObject]] = {}
    for i, image in enumerate(images):
        with imported.row(f"images[{i}]"):
            if not isinstance(image, dict):
                raise FieldError("must be an object with an id and a file_name")
            name = image.get("file_name") or str(image.get("coco_url") or "").split("/")[-1]
            if not isinstance(name, str) or not name or "\0" in name:
                raise FieldError("file_name is missing", "it must name the picture")
            number = identifier(image.get("id"))
            if number in whole:
                raise FieldError(f"id {number} is there twice", "give every image its own")
            path = imported.find(name)
            size = size_of(image, "width", "height")
            imported.pixels_of(path, size)
            whole[number] = path, size, image
    imported.learn_pixels((path, size) for path, size, _ in whole.values())
    for number, (path, size, image) in whole.items():
        frame = imported.measured(imported.frame(path, size), "pixels")
        yield number, path, frame, image
