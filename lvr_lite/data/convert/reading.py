"""What the readers of other formats share: finding pictures, deciding which pixels boxes are of,
and collecting what is whole and what is not.

The pixels of a picture that its EXIF orientation rotates are either the stored or the upright ones.
Where a format states the picture's size, the size shows which ones its boxes are of. Where nothing
shows it, they are those of the file's other pictures, or else the upright ones: annotation tools
show pictures upright, and YOLO trainers read them so. May import: the standard library and what
stands above `data`.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lvr_lite.data.boxes import Box, upright
from lvr_lite.data.convert.detections import Detection, Picture, absent_classes
from lvr_lite.data.rows import FieldError, JsonObject, Problem, numbers, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import stored_shape

# How far a box may reach over the edge by rounding, as a part of the side. It is cut there.
_SLACK = 0.01

# width and height of a picture in pixels, as a source states them
Size = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """The pixels that boxes are of: their width and height, and the EXIF orientation that is still
    to be applied.
    """

    width: float
    height: float
    orientation: int


@dataclass
class Import:
    """What is read from one source.

    images: the folder of the pictures, if it was given.
    boxes_are: "stored" or "upright" where the user knows it.
    split: the one of the source's own splits that is read, or None for all.
    samples: what has questions of its own. pictures: what has only boxes.
    problems: broken rows.
    omissions, remarks: what was left out, and what else the user should know; each how often.
    default_pixels: what boxes are of where no size shows it.
    """

    source: Path
    images: Path | None = None
    boxes_are: str | None = None
    split: str | None = None
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    omissions: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    default_pixels: str = "upright"
    _shapes: dict[Path, tuple[tuple[int, int], int]] = field(default_factory=dict)
    _paths_by_name: dict[str, list[Path]] | None = None

    def report(
        self,
        error: FieldError,
        field: str = "",
        line: int | None = None,
        item: int | None = None,
        file: Path | None = None,
    ) -> None:
        """One more broken row.

        field: where the error itself names none.
        file: the broken one, if it is not the source.
        """
        name = error.field or field
        self.problems.append(
            Problem(
                file or self.source,
                name,
                str(error),
                line,
                item,
            )
        )

    @contextmanager
    def row(
        self,
        field: str = "",
        line: int | None = None,
        item: int | None = None,
    ) -> Iterator[None]:
        """A row that may be broken: it is reported, and reading goes on."""
        try:
            yield
        except FieldError as error:
            self.report(error, field, line, item)

    def text(self) -> str:
        """The source's text. Raises DataError."""
        try:
            return self.source.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.source}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error

    def json(self) -> object:
        """The source's JSON value. Raises DataError."""
        try:
            value: object = json.loads(self.text())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.source}: not valid JSON ({error}); export it again") from error
        return value

    @property
    def folder(self) -> Path:
        """The folder of the pictures: as given; the one above a folder of annotations; or the
        source's.
        """
        beside = self.source.absolute().parent
        return self.images or (beside.parent if beside.name == "annotations" else beside)

    # ------------------------------------------------------------------------------------------
    # pictures

    def find(self, name: str) -> Path:
        """The picture of a name: at that place in the folder, or the one in it whose path has the
        longest end in common with the name.

        Raises FieldError where there is none, or no single one.
        """
        name = name.replace("\\", "/")
        try:
            if (self.folder / name).is_file():
                return self.folder / name
        except OSError as error:
            # A name that no file can have, such as a whole picture written as text.
            raise FieldError(f"{name[:40]}… names no picture ({error.strerror})") from error
        if self._paths_by_name is None:
            self._paths_by_name = _paths_by_name(self.folder)
        wanted = Path(name).parts[::-1]
        ranked = [
            (_common_parts(path, wanted), path)
            for path in self._paths_by_name.get(Path(name).name, [])
        ]
        most = max((common for common, _ in ranked), default=0)
        best = sorted(path for common, path in ranked if common == most)
        if not best:
            raise FieldError(
                f"{name} is not in {self.folder}", "name the folder of the pictures with --images"
            )
        if len(best) > 1:
            raise FieldError(
                f"{name} may be {best[0]} or {best[1]}",
                "name the folder of the right one with --images",
            )
        return best[0]

    def shape(self, path: Path) -> tuple[tuple[int, int], int]:
        """((width, height) as stored, EXIF orientation 1 to 8), from the header alone. Raises
        FieldError.
        """
        if path not in self._shapes:
            try:
                self._shapes[path] = stored_shape(path)
            except DataError as error:
                raise FieldError(str(error)) from error
        return self._shapes[path]

    def can_read(self, path: Path) -> bool:
        """Whether the header of a picture was read."""
        return path in self._shapes

    # ------------------------------------------------------------------------------------------
    # pixels

    def pixels_of(self, path: Path, size: Size | None) -> str | None:
        """Which pixels the stated size is of, "stored" or "upright"; None where it does not show.
        Raises FieldError where the size is of another picture.
        """
        stored, orientation = self.shape(path)
        if size is None:
            return None
        shapes = {"stored": stored, "upright": stored[::-1] if orientation >= 5 else stored}
        fitting = [pixels for pixels, shape in shapes.items() if _same_shape(shape, size)]
        if not fitting:
            raise FieldError(
                f"{path} has {stored[0]} x {stored[1]} pixels, and its boxes are of a picture "
                f"of {size[0]:g} x {size[1]:g}",
                "find the right picture",
            )
        return fitting[0] if len(fitting) == 1 else None

    def learn_pixels(self, sizes: Iterable[tuple[Path, Size | None]]) -> None:
        """Take what the pictures with a telling size agree on as the default for the others."""
        shown = {self.pixels_of(path, size) for path, size in sizes} - {None}
        if len(shown) == 1:
            self.default_pixels = str(shown.pop())

    def frame(self, path: Path, size: Size | None) -> Frame:
        """The pixels that the boxes of a picture are of. size: as the source states it. Raises
        FieldError.
        """
        stored, orientation = self.shape(path)
        shown = self.pixels_of(path, size)
        pixels = self.boxes_are or shown or self.default_pixels
        if orientation > 1 and not (self.boxes_are or shown):
            taken = f"turned pictures whose boxes are taken as {self.default_pixels}"
            self.remarks[f"{taken} (--boxes-are)"] += 1
        sideways = pixels == "upright" and orientation >= 5
        width, height = size or (stored[::-1] if sideways else stored)
        if self.boxes_are and shown not in (None, pixels):
            # The user knows better than the stated size, which is of the other pixels.
            width, height = height, width
        return Frame(width, height, orientation if pixels == "stored" else 1)

    def box(self, frame: Frame, corners: Box, cut: bool = False) -> Box:
        """A box on the upright picture, normalized.

        corners: x0, y0, x1, y1 in pixels of the frame.
        cut: the part outside the picture is meant to be lost.

        Raises FieldError.
        """
        shown = f"[{', '.join(f'{v:.6g}' for v in corners)}]"
        if not all(math.isfinite(v) for v in corners):
            raise FieldError(f"{shown} holds a value that is no number", "write the box again")
        x0, y0, x1, y1 = corners
        if x1 <= x0 or y1 <= y0:
            raise FieldError(
                f"{shown} is empty or inverted", "width and height must be more than 0"
            )
        parts = (x0 / frame.width, y0 / frame.height, x1 / frame.width, y1 / frame.height)
        over = max(
            -parts[0],
            -parts[1],
            parts[2] - 1,
            parts[3] - 1,
        )
        left, top, right, bottom = (min(max(part, 0), 1) for part in parts)
        if (over > _SLACK and not cut) or left >= right or top >= bottom:
            raise FieldError(
                f"{shown} lies outside the picture of {frame.width:g} x {frame.height:g}",
                "correct or remove the box",
            )
        if over > 1e-4:
            self.remarks["boxes cut at the edge"] += 1
        turned = upright((left, top, right, bottom), frame.orientation)
        a, b, c, d = (round(v, 8) for v in turned)
        return a, b, c, d

    def add_picture(
        self,
        name: str,
        path: Path,
        detections: list[Detection],
        unsure: Iterable[str],
        classes: Iterable[str],
    ) -> None:
        """A picture that has only boxes.

        unsure: classes of which the picture may show more than `detections`.
        classes: those that it is known to lack where it has no detection of them.
        """
        # A box that is there twice would be counted twice.
        once = {(d.name, d.box): d for d in reversed(detections)}
        if len(once) < len(detections):
            self.omissions["boxes that are there twice"] += len(detections) - len(once)
        unknown = frozenset(unsure)
        present = {detection.name for detection in detections}
        absent = absent_classes(sorted(set(classes) - present - unknown), present | unknown)
        self.pictures.append(
            Picture(
                name,
                path,
                tuple(reversed(once.values())),
                unknown,
                absent,
            )
        )


def _paths_by_name(folder: Path) -> dict[str, list[Path]]:
    paths: defaultdict[str, list[Path]] = defaultdict(list)
    for place, _, names in os.walk(folder):
        for name in names:
            paths[name].append(Path(place) / name)
    return paths


def _common_parts(path: Path, wanted: tuple[str, ...]) -> int:
    """How many parts, from the end on, a path shares with the reversed parts `wanted`."""
    same = [
        a == b
        for a, b in zip(
            path.absolute().parts[::-1],
            wanted,
            strict=False,
        )
    ]
    return same.index(False) if False in same else len(same)


def _same_shape(shape: tuple[int, int], size: Size) -> bool:
    """Whether a picture has this size, or was scaled since, to within a pixel."""
    if shape == size:
        return True
    return abs(shape[0] * size[1] - shape[1] * size[0]) <= max(*shape, *size)


def size_of(data: JsonObject, width: str, height: str) -> Size | None:
    """The width and height that an object states, if it states both. Raises FieldError where they
    are none.
    """
    if data.get(width) is None or data.get(height) is None:
        return None
    w, h = numbers([data[width], data[height]], 2)
    if not (0 < w < math.inf and 0 < h < math.inf):
        raise FieldError(f"{width} and {height} must be more than 0, not {w:g} and {h:g}")
    return w, h


def class_name(name: object) -> str:
    """A class as questions name it. Raises FieldError."""
    try:
        words = plain_text(name)
    except FieldError as error:
        raise FieldError(f"the name of a class {error}") from error
    return " ".join(words.replace("_", " ").split())
