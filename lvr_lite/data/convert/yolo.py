"""Reader of Ultralytics' YOLO layout: images/… and labels/… alike below; each label file has a line
an object. May import: PyYAML in a function, the standard library and what stands above `data`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data.boxes import Box
from lvr_lite.data.convert.detections import Detection
from lvr_lite.data.convert.folders import files_below
from lvr_lite.data.convert.reading import Import, class_name
from lvr_lite.data.rows import FieldError, JsonObject, as_on_disk
from lvr_lite.errors import DataError, UsageError
from lvr_lite.model.images import SUFFIXES

# Bytes of a data.yaml, of which 1,200 classes take 20,000; values within each other; digits of a
# class's number.
LARGEST_YAML = 256 << 10
DEEPEST_YAML = 20
DIGITS = 9
SPLITS = ("train", "val", "valid", "test")


@dataclass(frozen=True)
class _DataSet:
    """What data.yaml or the folder itself says.

    root: what ids are relative to.
    names: of classes, by number.
    pictures: all of them, each with its split ("" where there is none).
    keypoints: whether lines have some after the box.
    """

    root: Path
    names: dict[int, str]
    pictures: dict[Path, str]
    keypoints: bool


def yolo(imported: Import) -> None:
    """A line is `class cx cy w h`, or `class x1 y1 x2 y2 …` for an outline, normalized."""
    data_set = _data_set(imported)
    source = imported.source
    if not data_set.pictures:
        raise DataError(
            f"{source}: holds no pictures; they belong under images/, and their labels under "
            "labels/ alike"
        )
    labels = {path: as_on_disk(_label_file(path)) for path in data_set.pictures}
    if not any(label.is_file() for label in labels.values()):
        first = next(iter(labels.values()))
        raise DataError(
            f"{source}: none of its {len(labels)} pictures has labels, the first would be "
            f"{first}; check the layout"
        )
    labels = _once(labels)
    _report_orphans(imported, labels)
    used: set[str] = set()
    pictures = []
    for path, label in labels.items():
        detections, unsure = _detections(imported, data_set, path, label)
        used.update(detection.name for detection in detections)
        pictures.append((path, detections, unsure))
    for path, detections, unsure in pictures:
        name = path.as_posix()
        if path.is_relative_to(data_set.root):
            name = path.relative_to(data_set.root).as_posix()
        if imported.can_read(path):
            imported.add_picture(
                name=name, path=path, detections=detections, unsure=unsure, classes=used, file=path
            )


def _once(labels: dict[Path, Path]) -> dict[Path, Path]:
    """Pictures that links name twice, once: under the name that has labels. labels: of each."""
    labelled = {path.resolve() for path, label in labels.items() if label.is_file()}
    return {
        path: label
        for path, label in labels.items()
        if label.is_file() or path.resolve() not in labelled
    }


def _report_orphans(imported: Import, labels: dict[Path, Path]) -> None:
    """Labels in folders of their own that have no picture. labels: of each picture."""
    folders = {
        label.parent: path.parent for path, label in labels.items() if label.parent != path.parent
    }
    for folder, pictures in sorted(folders.items()):
        beside = pictures.iterdir() if pictures.is_dir() else ()
        stems = {_composed(path.stem) for path in _pictures_among(beside)}
        for label in sorted(folder.glob("[!.]*.txt")):
            if _composed(label.stem) not in stems and label.name != "classes.txt":
                imported.report(
                    FieldError("labels without a picture", "add the picture, or remove the labels"),
                    file=label,
                )


def _composed(name: str) -> str:
    """A name in NFC, however its letters with accents are written."""
    return unicodedata.normalize("NFC", name)


def _detections(
    imported: Import, data_set: _DataSet, path: Path, label: Path
) -> tuple[list[Detection], set[str]]:
    """The objects of a picture, and the classes of which one may be missing since its line is
    broken.
    """
    try:
        frame = imported.measured(imported.frame(path, None), "fractions")
    except FieldError as error:
        reason = str(error).removeprefix(f"{path} ")
        imported.report(FieldError(reason), file=path)
        return [], set()
    detections: list[Detection] = []
    unsure: set[str] = set()
    lines = _lines(label, errors="replace") if label.is_file() else []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            name = _class_of(words[0], data_set.names)
            box = imported.box(frame, _corners(words, data_set.keypoints))
            detections.append(Detection(name, box, f"L{number}"))
        except FieldError as error:
            imported.report(error, line=number, file=label)
            unsure |= set(data_set.names.values())
    return detections, unsure


def _class_of(word: str, names: dict[int, str]) -> str:
    # NumPy and pandas write 0.0 for 0.
    word = re.sub(r"\.0+$", "", word)
    if not (word.isdecimal() and len(word) <= DIGITS and int(word) in names):
        raise FieldError(
            f"class {word[:20]} is not one of the {len(names)} that have a name",
            "correct the number, or name it",
        )
    return names[int(word)]


def _corners(words: list[str], keypoints: bool) -> Box:
    """The corners x0, y0, x1, y1 of an object's line, normalized."""
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        line = " ".join(words)
        raise FieldError(
            f"{line[:60]!r} holds what is no number",
            "an object is `class cx cy w h`",
        ) from None
    if len(values) == 4 or (keypoints and len(values) > 4):
        x, y, w, h = values[:4]
        return (
            x - w / 2,
            y - h / 2,
            x + w / 2,
            y + h / 2,
        )
    if len(values) < 6 or len(values) % 2:
        raise FieldError(
            f"has {len(words)} values",
            "an object is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …` for an outline",
        )
    xs = values[::2]
    ys = values[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def _label_file(path: Path) -> Path:
    """labels/ for the last images/ of a picture's path; beside it where there are none."""
    beside = path.with_suffix(".txt")
    *folders, name = path.parts
    places = [place for place, folder in enumerate(folders) if folder == "images"]
    if not places:
        return beside
    folders[places[-1]] = "labels"
    mirrored = Path(*folders, name).with_suffix(".txt")
    if beside.is_file() and not mirrored.is_file():
        return beside
    return mirrored


# ----------------------------------------------------------------------------------------------
# the data set


def _data_set(imported: Import) -> _DataSet:
    """From data.yaml, as given or in the folder, or else from the folder and its classes.txt."""
    source = imported.source
    if source.is_file() and source.suffix not in (".yaml", ".yml"):
        raise DataError(
            f"{source}: neither a folder nor a data.yaml; give the folder that holds images and "
            "labels"
        )
    data = _description(source)
    base = source.parent if source.is_file() else source
    root = base / str(data.get("path") or "")
    root = root if root.is_dir() else base
    pictures = _listed_pictures(imported, root, data) or _pictures_below(root)
    splits = sorted(set(pictures.values()) - {""})
    wanted = imported.split
    if wanted is not None:
        if wanted not in splits:
            there = ", ".join(splits) or "no splits"
            raise UsageError(f"--split {wanted}: {source} has {there}")
        pictures = {path: split for path, split in pictures.items() if split == wanted}
    elif len(splits) > 1:
        together = f"splits written together ({', '.join(splits)}; --split takes one)"
        imported.remarks[together] = len(splits)
    return _DataSet(
        root=root,
        names=_names(source, data, base, root),
        pictures=pictures,
        keypoints="kpt_shape" in data,
    )


def _description(source: Path) -> JsonObject:
    """The content of data.yaml; {} where there is none."""
    if source.is_file():
        return _yaml(source)
    files = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if len(files) == 1:
        return _yaml(files[0])
    return next((_yaml(path) for path in files if path.stem in ("data", "dataset")), {})


def _yaml(path: Path) -> JsonObject:
    import yaml

    try:
        if path.stat().st_size > LARGEST_YAML:
            raise DataError(f"{path}: more than {LARGEST_YAML >> 10} KiB; this is no data.yaml")
        text = path.read_text(encoding="utf-8-sig")
        _refuse_bombs(path, yaml.scan(text))
        data = yaml.safe_load(text)
    # PyYAML itself raises ValueError for a date or a number that is none.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or "nested too deeply"
        raise DataError(f"{path}: not valid YAML ({reason})") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: must hold names and the folders of pictures, not {type(data).__name__}"
        )
    return data


def _refuse_bombs(path: Path, tokens: Iterable[object]) -> None:
    """Raises DataError for what takes PyYAML minutes or memory: aliases of aliases, of which a few
    lines are a list of any length, and values within values. Neither is needed here.
    """
    import yaml

    starts = (
        *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
        *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
    )
    ends = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    depth = 0
    for token in tokens:
        depth += isinstance(token, starts) - isinstance(token, ends)
        if isinstance(token, yaml.AliasToken):
            raise DataError(f"{path}: holds aliases (*name); write the values out")
        if depth > DEEPEST_YAML:
            raise DataError(f"{path}: not valid YAML (values within {DEEPEST_YAML} others)")


def _names(
    source: Path,
    data: JsonObject,
    base: Path,
    root: Path,
) -> dict[int, str]:
    """The classes by number, from data.yaml or from classes.txt."""
    names = data.get("names")
    if names is None:
        places = (base / "classes.txt", root / "classes.txt", root / "labels" / "classes.txt")
        file = next((path for path in places if path.is_file()), None)
        if file is None:
            raise DataError(
                f"{source}: its classes have no names; add data.yaml with names, or classes.txt "
                "with one a line"
            )
        names = _lines(file, errors="replace")
        while names and not names[-1].strip():
            names.pop()
    try:
        if not isinstance(names, dict | list):
            raise TypeError(f"{type(names).__name__!r} object is not iterable")
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(number): class_name(str(name)) for number, name in pairs}
    except (FieldError, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: names: must be a list of names, or number: name ({error})"
        ) from error


def _listed_pictures(imported: Import, root: Path, data: JsonObject) -> dict[Path, str]:
    """The pictures that data.yaml names for each split: folders, or text files with one path a
    line.
    """
    pictures: dict[Path, str] = {}
    for split in SPLITS:
        entries = data.get(split) or []
        if not isinstance(entries, list):
            entries = [entries]
        for name in map(str, entries):
            place = root / name
            # Roboflow writes paths from a folder below.
            if not place.exists() and name.startswith("../"):
                place = root / name[3:]
            if place.is_dir():
                pictures |= dict.fromkeys(_pictures_among(files_below(place)), split)
            elif place.is_file() and place.suffix != ".txt":
                raise DataError(
                    f"{imported.source}: {split}: {name} is neither a folder nor a .txt that lists "
                    "pictures"
                )
            elif place.is_file():
                pictures |= dict.fromkeys(_paths_in(place, root), split)
            else:
                imported.omissions[f"splits that are not there ({split}: {name})"] += 1
    return pictures


def _paths_in(file: Path, root: Path) -> list[Path]:
    """The paths that a text file lists, one a line."""
    paths = []
    for line in _lines(file, errors="replace"):
        name = line.strip()
        if not name:
            continue
        folder = root
        if line.startswith("./"):
            folder = file.parent
        paths.append(as_on_disk(folder / name))
    return paths


def _pictures_below(root: Path) -> dict[Path, str]:
    """The pictures in folders named images, or else all, each with the split in its path."""
    every = _pictures_among(files_below(root))
    inside = {path: path.relative_to(root) for path in every}
    apart = [path for path in every if "images" in inside[path].parts[:-1]]
    return {path: _split_of(inside[path]) for path in apart or every}


def _pictures_among(paths: Iterable[Path]) -> list[Path]:
    """Those that are pictures by their names; hidden files (".…") are none."""
    shown = [path for path in paths if not path.name.startswith(".")]
    pictures = [path for path in shown if path.suffix.lower() in SUFFIXES]
    return sorted(pictures)


def _split_of(path: Path) -> str:
    for folder in path.parts[:-1]:
        if folder in SPLITS:
            return folder
    return ""


def _lines(file: Path, errors: str = "strict") -> list[str]:
    return file.read_text(encoding="utf-8-sig", errors=errors).splitlines()
