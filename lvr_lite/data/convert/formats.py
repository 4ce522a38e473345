"""Readers of COCO, YOLO, Visual-CoT and the official LVR list; Label Studio's is in labelstudio.py.
Each fills a `Found`.

May import: PyYAML (in a function), the standard library, the core.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvr_lite.data.convert.detections import Thing
from lvr_lite.data.convert.labelstudio import labelstudio
from lvr_lite.data.convert.reading import (
    SUFFIXES,
    Found,
    Frame,
    class_name,
    size_of,
)
from lvr_lite.data.rows import FieldError, Row, numbers, parse_json, plain_text
from lvr_lite.data.samples import Sample, placed_samples
from lvr_lite.errors import DataError, UsageError


def coco(found: Found) -> None:
    """An instances file (cocodataset.org, "Data format"): boxes are x, y, width, height in pixels.
    Of LVIS also its lists of what is told of an image in full, and of what is not.
    """
    data = found.json()
    images, annotations, categories = (
        _coco_list(found, data, name) for name in ("images", "annotations", "categories")
    )
    names = _coco_names(found, categories)
    known = {str(image["id"]) for image in images if isinstance(image, dict) and "id" in image}
    boxes: defaultdict[str, dict[str, tuple[str, str, list[float]]]] = defaultdict(
        dict
    )  # image -> id -> where, class, x y w h
    unsure: defaultdict[str, set[str]] = defaultdict(set)
    for i, annotation in enumerate(annotations):
        own = f"annotations[{i}]" + (
            f" (id {annotation['id']})"
            if isinstance(annotation, dict) and "id" in annotation
            else ""
        )
        try:
            image, name = _coco_annotation(annotation, known, names)
            if annotation.get("iscrowd") or annotation.get("ignore"):
                found.skipped["crowd regions"] += 1
                unsure[image].add(name)
                continue
            if (number := str(annotation.get("id", f"a{i}"))) in boxes[image]:
                raise FieldError(f"id {number} is there twice; give every annotation its own")
            boxes[image][number] = own, name, numbers(annotation.get("bbox"), 4)
        except FieldError as error:
            found.broken(own, str(error))
            if isinstance(annotation, dict):
                unsure[str(annotation.get("image_id"))] |= set(names.values())
    used = {name for of_one in boxes.values() for _, name, _ in of_one.values()}
    for image, path, frame, told in _coco_images(found, images):
        things = []
        for number, (own, name, (x, y, w, h)) in boxes[image].items():
            with found.row(f"{own}: bbox"):
                things.append(Thing(name, found.box(frame, x, y, x + w, y + h), number))
        whole = {thing.id for thing in things}
        unsure[image] |= {
            name for number, (_, name, _) in boxes[image].items() if number not in whole
        }
        unsure[image] |= {
            names[c] for c in told.get("not_exhaustive_category_ids") or [] if c in names
        }
        neg = told.get("neg_category_ids")
        found.picture(
            image,
            path,
            things,
            unsure[image],
            used if neg is None else {names[c] for c in neg if c in names},
        )


def _coco_list(found: Found, data: Any, name: str) -> list[Any]:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, list):
        raise DataError(
            f"{found.source}: not a COCO instances file: it must hold the lists images, annotations and categories"
        )
    return value


def _coco_names(found: Found, categories: list[Any]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for i, category in enumerate(categories):
        with found.row(f"categories[{i}]"):
            if not isinstance(category, dict) or not isinstance(category.get("id"), int | str):
                raise FieldError("must be an object with an id and a name")
            names[category["id"]] = class_name(category.get("name"))
    return names


def _coco_annotation(annotation: Any, known: set[str], names: dict[Any, str]) -> tuple[str, str]:
    """The image's id as text, and the class."""
    if not isinstance(annotation, dict):
        raise FieldError("must be an object")
    if str(annotation.get("image_id")) not in known:
        raise FieldError(f"image_id {annotation.get('image_id')} is not among the images")
    category = annotation.get("category_id")
    if not isinstance(category, int | str) or category not in names:
        raise FieldError(f"category_id {category} is not among the categories")
    return str(annotation["image_id"]), names[category]


def _coco_images(
    found: Found, images: list[Any]
) -> Iterator[tuple[str, Path, Frame, dict[str, Any]]]:
    """The images that are whole: id, picture, the pixels that its boxes are of, all that is told of
    it.
    """
    whole: dict[str, tuple[Path, tuple[float, float] | None, dict[str, Any]]] = {}
    for i, image in enumerate(images):
        with found.row(f"images[{i}]"):
            if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
                raise FieldError("must be an object with an id and a file_name")
            name = image.get("file_name") or str(image.get("coco_url") or "").split("/")[-1]
            if not isinstance(name, str) or not name or "\0" in name:
                raise FieldError("file_name is missing; it must name the picture")
            if str(image["id"]) in whole:
                raise FieldError(f"id {image['id']} is there twice; give every image its own")
            path, said = found.find(name), size_of(image, "width", "height")
            found.tells(path, said)
            whole[str(image["id"])] = path, said, image
    found.learn((path, said) for path, said, _ in whole.values())
    for name, (path, said, image) in whole.items():
        yield name, path, found.frame(path, said), image


# -------------------------------------------------------------------------------------------------------------------
# YOLO


@dataclass(frozen=True)
class _YoloSet:
    """root: what ids are relative to. names: of classes by number. pictures: all, with their
    splits. keypoints: whether lines have some.
    """

    root: Path
    names: dict[int, str]
    pictures: dict[Path, str]
    keypoints: bool


def yolo(found: Found) -> None:
    """Ultralytics' layout: images/… and labels/… alike below, a line `class cx cy w h` or `class x1
    y1 x2 y2 …` an object, normalized.
    """
    given = _yolo_set(found)
    if not given.pictures:
        raise DataError(
            f"{found.source}: holds no pictures; they belong under images/, and their labels under labels/ alike"
        )
    labels = {path: _yolo_label(path) for path in given.pictures}
    if not any(label.is_file() for label in labels.values()):
        first = next(iter(labels.values()))
        raise DataError(
            f"{found.source}: none of its {len(labels)} pictures has labels, the first would be {first}; check the layout"
        )
    _yolo_orphans(found, labels)
    read = [(path, *_yolo_things(found, given, path, label)) for path, label in labels.items()]
    used = {thing.name for _, things, _ in read for thing in things}
    for path, things, unsure in read:
        name = (
            path.relative_to(given.root).as_posix()
            if path.is_relative_to(given.root)
            else path.as_posix()
        )
        if path in found.shapes:  # it could be read
            found.picture(name, path, things, unsure, used)


def _yolo_orphans(found: Found, labels: dict[Path, Path]) -> None:
    """Labels in folders of their own that have no picture. labels: of each picture that is read."""
    folders = {
        label.parent: path.parent for path, label in labels.items() if label.parent != path.parent
    }
    for folder, pictures in sorted(folders.items()):
        pictured = (
            {p.stem for p in pictures.iterdir() if p.suffix.lower() in SUFFIXES}
            if pictures.is_dir()
            else set()
        )
        for label in sorted(folder.glob("*.txt")):
            if label.stem not in pictured and label.name != "classes.txt":
                found.broken(
                    "",
                    "labels without a picture; add the picture, or remove the labels",
                    file=label,
                )


def _yolo_things(
    found: Found, given: _YoloSet, path: Path, label: Path
) -> tuple[list[Thing], set[str]]:
    """The objects of a picture, and the classes of which one may be missing since its line is
    broken.
    """
    things: list[Thing] = []
    unsure: set[str] = set()
    try:
        frame = replace(found.frame(path, None), width=1, height=1)
    except FieldError as error:
        found.broken("", str(error).removeprefix(f"{path} "), file=path)
        return things, unsure
    lines = (
        label.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        if label.is_file()
        else []
    )
    for number, line in enumerate(lines, 1):
        words = line.split()
        try:
            if words:
                things.append(
                    Thing(
                        _yolo_class(words[0], given.names),
                        found.box(frame, *_yolo_corners(words, given.keypoints)),
                        f"L{number}",
                    )
                )
        except FieldError as error:
            found.broken("", str(error), line=number, file=label)
            unsure |= set(given.names.values())
    return things, unsure


def _yolo_class(word: str, names: dict[int, str]) -> str:
    if not word.isdecimal() or int(word) not in names:
        raise FieldError(
            f"class {word[:20]} is not one of the {len(names)} that have a name; correct the number, or name it"
        )
    return names[int(word)]


def _yolo_corners(words: list[str], keypoints: bool) -> tuple[float, float, float, float]:
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise FieldError(
            f"{' '.join(words)[:60]!r} holds what is no number; an object is `class cx cy w h`"
        ) from None
    if len(values) == 4 or (keypoints and len(values) > 4):
        x, y, w, h = values[:4]
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if len(values) < 6 or len(values) % 2:
        raise FieldError(
            f"has {len(words)} values; an object is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …` for an outline"
        )
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _yolo_label(path: Path) -> Path:
    """labels/ for the last images/ of a picture's path; beside it where there are none."""
    parts = list(path.parts)
    beside = path.with_suffix(".txt")
    if "images" not in parts[:-1]:
        return beside
    parts[len(parts) - 2 - parts[:-1][::-1].index("images")] = "labels"
    mirrored = Path(*parts).with_suffix(".txt")
    return beside if beside.is_file() and not mirrored.is_file() else mirrored


def _yolo_set(found: Found) -> _YoloSet:
    """From data.yaml, as given or in the folder, or else from the folder and its classes.txt."""
    source = found.source
    if source.is_file() and source.suffix not in (".yaml", ".yml"):
        raise DataError(
            f"{source}: neither a folder nor a data.yaml; give the folder that holds images and labels"
        )
    described = (
        [source] if source.is_file() else sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    )
    data = (
        _yaml(described[0])
        if len(described) == 1
        else next((_yaml(p) for p in described if p.stem in ("data", "dataset")), {})
    )
    base = source.parent if source.is_file() else source
    root = base / str(data.get("path") or "")
    root = root if root.is_dir() else base
    pictures = _yolo_listed(
        found, root, {k: data[k] for k in ("train", "val", "valid", "test") if data.get(k)}
    )
    if not pictures:
        every = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES)
        apart = [p for p in every if "images" in p.relative_to(root).parts[:-1]]
        pictures = {p: _split_of(p.relative_to(root)) for p in apart or every}
    splits = sorted(set(pictures.values()) - {""})
    if found.split is not None:
        if found.split not in splits:
            raise UsageError(
                f"--split {found.split}: {source} has {', '.join(splits) or 'no splits'}"
            )
        pictures = {p: split for p, split in pictures.items() if split == found.split}
    elif len(splits) > 1:
        found.told[f"splits written together ({', '.join(splits)}; --split takes one)"] = len(
            splits
        )
    return _YoloSet(root, _yolo_names(found, data, base, root), pictures, "kpt_shape" in data)


def _split_of(path: Path) -> str:
    return next((part for part in path.parts[:-1] if part in ("train", "val", "valid", "test")), "")


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: must hold names and the folders of pictures, not {type(data).__name__}"
        )
    return data


def _yolo_names(found: Found, data: dict[str, Any], base: Path, root: Path) -> dict[int, str]:
    names = data.get("names")
    if names is None:
        files = [
            p
            for p in (base / "classes.txt", root / "classes.txt", root / "labels" / "classes.txt")
            if p.is_file()
        ]
        if not files:
            raise DataError(
                f"{found.source}: its classes have no names; add data.yaml with names, or classes.txt with one a line"
            )
        names = files[0].read_text(encoding="utf-8-sig").splitlines()
        while names and not names[-1].strip():
            names.pop()
    try:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(number): class_name(str(name)) for number, name in pairs}
    except (FieldError, TypeError, ValueError) as error:
        raise DataError(
            f"{found.source}: names: must be a list of names, or number: name ({error})"
        ) from error


def _yolo_listed(found: Found, root: Path, entries: dict[str, Any]) -> dict[Path, str]:
    """The pictures that data.yaml names: folders, or text files with one path a line, each for a
    split.
    """
    pictures: dict[Path, str] = {}
    for split, entry in entries.items():
        for name in entry if isinstance(entry, list) else [entry]:
            place = root / str(name)
            if not place.exists() and str(name).startswith("../"):  # as Roboflow writes it
                place = root / str(name)[3:]
            if place.is_dir():
                pictures |= {
                    p: split for p in sorted(place.rglob("*")) if p.suffix.lower() in SUFFIXES
                }
            elif place.is_file():
                for line in filter(str.strip, place.read_text(encoding="utf-8-sig").splitlines()):
                    own = (
                        place.parent / line.strip()
                        if line.startswith("./")
                        else root / line.strip()
                    )
                    pictures[own] = split
            else:
                found.skipped[f"splits that are not there ({split}: {name})"] += 1
    return pictures


# -------------------------------------------------------------------------------------------------
# Visual-CoT and official


def viscot(found: Found) -> None:
    """Visual-CoT's metadata, one object a line or one list: question, answer, image, width, height,
    bboxs in pixels, dataset, split.
    """
    rows = []
    for line, item, data in _rows(found):
        if found.split is None or not isinstance(data, dict) or data.get("split") == found.split:
            with found.row("", line, item):
                rows.append((line, item, *_viscot_row(found, data)))
    found.learn((path, size) for *_, path, size in rows)
    for line, item, data, path, size in rows:
        row = Row(data)
        question = row.need("question", plain_text)
        answer = row.need("answer", plain_text)
        for error in row.errors:
            found.broken(error.field, str(error), line, item)
        with found.row("bboxs", line, item):
            frame = found.frame(path, size)
            corners = [numbers(box, 4) for box in data.get("bboxs") or []]
            boxes = tuple(dict.fromkeys(found.box(frame, a, b, c, d) for a, b, c, d in corners))
            kind = str(data["dataset"]) if data.get("dataset") else None
            name = "-".join(
                str(part) for part in (kind, data.get("split"), path.stem, line or item) if part
            )
            if question is not None and answer is not None:
                found.samples.append(
                    Sample(name, (path,), question.strip(), answer.strip(), None, boxes, kind)
                )
    if found.split is not None and not rows:
        raise UsageError(f"--split {found.split}: no row of {found.source} has it")


def _rows(found: Found) -> Iterator[tuple[int | None, int | None, Any]]:
    """Each object with its line, or of a list with its item."""
    text = found.text()
    if text.lstrip().startswith("["):
        yield from ((None, item, data) for item, data in enumerate(found.json(), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = parse_json(line)
        except FieldError as error:
            found.broken("", str(error), number)
            continue
        yield number, None, data


def _viscot_row(found: Found, data: Any) -> tuple[dict[str, Any], Path, tuple[float, float] | None]:
    if not isinstance(data, dict):
        raise FieldError("must be an object with question, answer, image and bboxs")
    name, dataset = data.get("image"), data.get("dataset")
    if not isinstance(name, str) or not name or "\0" in name:
        raise FieldError("image: is missing; it must name the picture")
    if not isinstance(data.get("bboxs") or [], list):
        raise FieldError("bboxs: must be a list of [x0, y0, x1, y1] in pixels")
    in_its_folder = f"{dataset}/{name}" if isinstance(dataset, str) and dataset else name
    path = found.folder / name if (found.folder / name).is_file() else found.find(in_its_folder)
    size = size_of(data, "width", "height")
    found.tells(path, size)
    return data, path, size


def lvr(found: Found) -> None:
    """The official list, as `lvr_lite.data.samples` reads it; its boxes are of the upright picture
    unless said otherwise.
    """
    placed, problems = placed_samples(found.source, found.images)
    found.problems += problems
    for one in placed:
        sample = one.sample
        with found.row("", one.line, one.item):
            frame = replace(found.frame(sample.images[0], None), width=1, height=1)
            found.samples.append(
                replace(sample, boxes=tuple(found.box(frame, *box) for box in sample.boxes))
            )


READERS: dict[str, Callable[[Found], None]] = {
    "coco": coco,
    "yolo": yolo,
    "labelstudio": labelstudio,
    "viscot": viscot,
    "lvr": lvr,
}
