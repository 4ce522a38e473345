"""What the readers of other formats share: finding pictures, telling which pixels boxes are of,
collecting what is whole and what is not.

What a format says about a picture's size tells whether its boxes are of the stored or of the
upright pixels (EXIF orientation); where nothing tells, they are taken as those of the other
pictures of the file, or as upright: so annotation tools show pictures, and so YOLO trainers read
them. May import: the standard library, the core.
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
from typing import Any

from lvr_lite.data.boxes import Box, upright
from lvr_lite.data.convert.detections import Picture, Thing, not_there
from lvr_lite.data.rows import FieldError, Problem, numbers, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import stored_shape

SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)  # of pictures, where a folder is searched
_SLACK = 0.01  # of a side: so far a box may reach over the edge by rounding; it is cut there


@dataclass(frozen=True)
class Frame:
    """The pixels that boxes are of: their width and height, and the EXIF orientation that is still
    to be applied.
    """

    width: float
    height: float
    orientation: int


@dataclass
class Found:
    """What is read from a source: samples that have questions, pictures that have only boxes,
    broken rows, and what was left out.
    """

    source: Path
    images: Path | None = None  # the pictures' folder
    boxes_are: str | None = None  # "stored" or "upright"
    split: str | None = None
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    shapes: dict[Path, tuple[tuple[int, int], int]] = field(default_factory=dict)
    otherwise: str = "upright"  # what boxes are of where nothing tells
    index: dict[str, list[Path]] | None = None

    def broken(
        self,
        where: str,
        message: str,
        line: int | None = None,
        item: int | None = None,
        file: Path | None = None,
    ) -> None:
        self.problems.append(Problem(file or self.source, where, message, line, item))

    @contextmanager
    def row(
        self,
        where: str = "",
        line: int | None = None,
        item: int | None = None,
        file: Path | None = None,
    ) -> Iterator[None]:
        """A row that may be broken: it is named, and reading goes on."""
        try:
            yield
        except FieldError as error:
            self.broken(where, str(error), line, item, file)

    def text(self) -> str:
        try:
            return self.source.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.source}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error

    def json(self) -> Any:
        try:
            return json.loads(self.text())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.source}: not valid JSON ({error}); export it again") from error

    @property
    def folder(self) -> Path:
        """Of the pictures: as given; above a folder of annotations; or the source's."""
        beside = self.source.absolute().parent
        return self.images or (beside.parent if beside.name == "annotations" else beside)

    def find(self, name: str) -> Path:
        """The picture of a name: at that place in the folder, or the one in it whose path has most
        of its end in common.

        Raises FieldError where there is none, or no single one.
        """
        name = name.replace("\\", "/")
        try:
            if (self.folder / name).is_file():
                return self.folder / name
        except (
            OSError
        ) as error:  # a name that no file can have, such as a whole picture written as text
            raise FieldError(f"{name[:40]}… names no picture ({error.strerror})") from error
        if self.index is None:
            self.index = defaultdict(list)
            for folder, _, files in os.walk(self.folder):
                for file in files:
                    self.index[file].append(Path(folder) / file)
        wanted = Path(name).parts[::-1]

        def alike(path: Path) -> int:
            same = [a == b for a, b in zip(path.absolute().parts[::-1], wanted, strict=False)]
            return same.index(False) if False in same else len(same)

        alikes = [(alike(path), path) for path in self.index.get(Path(name).name, [])]
        most = max((common for common, _ in alikes), default=0)
        best = sorted(path for common, path in alikes if common == most)
        if not best:
            raise FieldError(
                f"{name} is not in {self.folder}; name the folder of the pictures with --images"
            )
        if len(best) > 1:
            raise FieldError(
                f"{name} may be {best[0]} or {best[1]}; name the folder of the right one with --images"
            )
        return best[0]

    def shape(self, path: Path) -> tuple[tuple[int, int], int]:
        """((width, height) as stored, EXIF orientation 1 to 8), from the header alone. Raises
        FieldError.
        """
        if path not in self.shapes:
            try:
                self.shapes[path] = stored_shape(path)
            except DataError as error:
                raise FieldError(str(error)) from error
        return self.shapes[path]

    def learn(self, said: Iterable[tuple[Path, tuple[float, float] | None]]) -> None:
        """From the pictures whose size tells: what boxes are of where it does not."""
        telling = Counter(own for path, size in said if (own := self.tells(path, size)) is not None)
        if len(telling) == 1:
            self.otherwise = next(iter(telling))

    def tells(self, path: Path, said: tuple[float, float] | None) -> str | None:
        """What the size that a source says tells of a turned picture. Raises FieldError where it
        is of another picture.
        """
        stored, orientation = self.shape(path)
        if said is None:
            return None
        sizes = {"stored": stored, "upright": stored[::-1] if orientation >= 5 else stored}
        alike = [name for name, size in sizes.items() if _same_shape(size, said)]
        if not alike:
            one = f"{stored[0]} x {stored[1]} pixels"
            raise FieldError(
                f"{path} has {one}, and its boxes are of a picture of {said[0]:g} x {said[1]:g}; find the right picture"
            )
        return alike[0] if len(alike) == 1 else None

    def frame(self, path: Path, said: tuple[float, float] | None) -> Frame:
        """The pixels that the boxes of a picture are of. said: the width and height that the source
        has for it. Raises FieldError.
        """
        stored, orientation = self.shape(path)
        told = self.tells(path, said)
        boxes_are = self.boxes_are or told or self.otherwise
        if orientation > 1 and not (self.boxes_are or told):
            self.told[
                f"turned pictures whose boxes are taken as {self.otherwise} (--boxes-are)"
            ] += 1
        width, height = said or (
            stored if boxes_are == "stored" or orientation < 5 else stored[::-1]
        )
        if self.boxes_are and told not in (None, boxes_are):
            width, height = (
                height,
                width,
            )  # the user knows better than the source's size, which is of the other one
        return Frame(width, height, orientation if boxes_are == "stored" else 1)

    def box(
        self, frame: Frame, x0: float, y0: float, x1: float, y1: float, cut: bool = False
    ) -> Box:
        """A box in pixels of the frame, on the upright picture. cut: what is outside is meant to be
        lost. Raises FieldError.
        """
        corners = (x0, y0, x1, y1)
        shown = f"[{', '.join(f'{v:.6g}' for v in corners)}]"
        if not all(math.isfinite(v) for v in corners):
            raise FieldError(f"{shown} holds a value that is no number; write the box again")
        if x1 <= x0 or y1 <= y0:
            raise FieldError(f"{shown} is empty or inverted; width and height must be more than 0")
        w, h = frame.width, frame.height
        over = max(-x0 / w, -y0 / h, x1 / w - 1, y1 / h - 1)
        inside = (
            min(max(x0 / w, 0), 1),
            min(max(y0 / h, 0), 1),
            min(max(x1 / w, 0), 1),
            min(max(y1 / h, 0), 1),
        )
        if (over > _SLACK and not cut) or inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise FieldError(
                f"{shown} lies outside the picture of {w:g} x {h:g}; correct or remove the box"
            )
        if over > 1e-4:
            self.told["boxes cut at the edge"] += 1
        a, b, c, d = (round(v, 8) for v in upright(inside, frame.orientation))
        return a, b, c, d

    def picture(
        self,
        name: str,
        path: Path,
        things: list[Thing],
        unsure: Iterable[str],
        absent: Iterable[str],
    ) -> None:
        """A picture that has only boxes. Boxes that are there twice would be counted twice."""
        once = {(t.name, t.box): t for t in reversed(things)}
        if len(once) < len(things):
            self.skipped["boxes that are there twice"] += len(things) - len(once)
        there, unknown = {t.name for t in things}, frozenset(unsure)
        lacks = not_there(sorted(set(absent) - there - unknown), there | unknown)
        self.pictures.append(Picture(name, path, tuple(reversed(once.values())), unknown, lacks))


def _same_shape(size: tuple[int, int], said: tuple[float, float]) -> bool:
    """Whether a picture has this size, or was scaled since, to within a pixel."""
    return abs(size[0] * said[1] - size[1] * said[0]) <= max(*size, *said) if size != said else True


def size_of(data: dict[str, Any], width: str, height: str) -> tuple[float, float] | None:
    """The width and height that an object has, if it has both. Raises FieldError where they are
    none.
    """
    if data.get(width) is None or data.get(height) is None:
        return None
    w, h = numbers([data[width], data[height]], 2)
    if not (0 < w < math.inf and 0 < h < math.inf):
        raise FieldError(f"{width} and {height} must be more than 0, not {w:g} and {h:g}")
    return w, h


def class_name(name: Any) -> str:
    """A class as questions name it. Raises FieldError."""
    try:
        words = plain_text(name)
    except FieldError as error:
        raise FieldError(f"the name of a class {error}") from error
    return " ".join(words.replace("_", " ").split())
