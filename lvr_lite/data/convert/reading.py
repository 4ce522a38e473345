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
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lvr_lite.data.boxes import Box, upright
from lvr_lite.data.convert.detections import Detection, Picture, absent_classes
from lvr_lite.data.convert.folders import parts_of, paths_by_name
from lvr_lite.data.rows import (
    FieldError,
    JsonObject,
    Problem,
    as_on_disk,
    numbers,
    plain_text,
    refuse_half_characters,
)
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.model.images import stored_shape

UNITS = ("pixels", "fractions", "thousandths")
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
    # whether the unit of boxes is the format's own, and not the user's word
    assumed: bool = False


@dataclass(frozen=True)
class _Place:
    """Where a source speaks of a picture first: a field or an item, for errors."""

    field: str
    item: int | None
    detections: frozenset[tuple[str, Box]]
    broken: bool


@dataclass
class Import:
    """What is read from one source.

    images: the folder of the pictures, if it was given.
    boxes_are: "stored" or "upright" where the user knows it.
    unit: one of UNITS where the user says what boxes are measured in.
    split: the one of the source's own splits that is read, or None for all.
    samples: what has questions of its own. pictures: what has only boxes.
    problems: broken rows.
    omissions, remarks: what was left out, and what else the user should know; each how often.
    default_pixels: what boxes are of where no size shows it.
    found_by_end: pictures that are not where they are named but agree with the name's end, and that
        name.
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
    # boxes in pictures of more than 1200 pixels a side, by whether they end at 1000 or before
    large_boxes: Counter[bool] = field(default_factory=Counter)
    default_pixels: str = "upright"
    unit: str | None = None
    found_by_end: dict[Path, str] = field(default_factory=dict)
    _places: dict[Path, _Place] = field(default_factory=dict)
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
            Problem(file=file or self.source, field=name, message=str(error), line=line, item=item)
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
            text = self.text()
            value: object = json.loads(text)
            refuse_half_characters(text, value)
        except (ValueError, RecursionError, FieldError) as error:
            raise DataError(f"{self.source}: not valid JSON ({error}); export it again") from error
        return value

    @property
    def folder(self) -> Path:
        """The folder of the pictures: as given; the one above a folder of annotations; or the
        source's.
        """
        if self.images is not None:
            return self.images
        beside = self.source.absolute().parent
        if beside.name == "annotations":
            return beside.parent
        return beside

    # ------------------------------------------------------------------------------------------
    # pictures

    def find(self, name: str, rooted: bool = False) -> Path:
        """The picture of a name: at that place in the folder, or the one in it whose path agrees
        with the name as far as both reach. What is found so is told in `remarks`.

        rooted: the name begins at a place of another machine or server, as a whole path does; so a
            folder that the picture's own path does not have is no other folder.

        Raises FieldError where there is none, or no single one.
        """
        name = name.replace("\\", "/")
        rooted = rooted or name.startswith("/") or re.match(r"[A-Za-z]:/", name) is not None
        place = as_on_disk(self.folder / name)
        try:
            if place.is_file():
                return place
        except OSError as error:
            # A name that no file can have, such as a whole picture written as text.
            raise FieldError(f"{name[:40]}… names no picture ({error.strerror})") from error
        if self._paths_by_name is None:
            self._paths_by_name = paths_by_name(self.folder)
        wanted = parts_of(Path(name))
        last = wanted[-1] if wanted else ""
        same_name = self._paths_by_name.get(last, [])
        best = self._best_of(same_name, wanted, rooted)
        if not best:
            other = ""
            if same_name:
                other = f" ({same_name[0]} lies in another folder)"
            raise FieldError(
                f"{name} is not in {self.folder}{other}",
                "name the folder of the pictures with --images",
            )
        if len(best) > 1:
            raise FieldError(
                f"{name} may be {best[0]} or {best[1]}",
                "name the folder of the right one with --images",
            )
        self.found_by_end.setdefault(best[0], name)
        return best[0]

    def _best_of(self, paths: list[Path], wanted: tuple[str, ...], rooted: bool) -> list[Path]:
        """Those of the paths that agree most with a name, sorted; none where none agrees."""
        by_agreement: defaultdict[int, list[Path]] = defaultdict(list)
        for path in paths:
            by_agreement[self._agreement(path, wanted, rooted)].append(path)
        most = max(by_agreement, default=0)
        if most == 0:
            return []
        # Links may lead to one file on several ways.
        once: dict[Path, Path] = {}
        for path in sorted(by_agreement[most], reverse=True):
            once[path.resolve()] = path
        return list(once.values())[::-1]

    def _agreement(self, path: Path, wanted: tuple[str, ...], rooted: bool) -> int:
        """How many parts of a picture's path and of a name agree, from the end on; 0 where they
        differ before one of them ends.

        Beginning at the folder, one part is no agreement with a name that has folders of its own.
        """
        parts = parts_of(path.absolute())
        if parts[-len(wanted) :] == wanted:
            return len(wanted)
        inside = parts_of(path.relative_to(self.folder))
        if wanted[-len(inside) :] != inside:
            return 0
        if len(inside) == 1 and not rooted:
            return 0
        return len(inside)

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
        shapes = {"stored": stored, "upright": _upright_shape(stored, orientation)}
        fitting = [pixels for pixels, shape in shapes.items() if _same_shape(shape, size)]
        if not fitting:
            width, height = stored
            stated_width, stated_height = size
            raise FieldError(
                f"{path} has {width} x {height} pixels, and its boxes are of a picture "
                f"of {stated_width:g} x {stated_height:g}",
                "find the right picture",
            )
        if len(fitting) != 1:
            return None
        return fitting[0]

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
        known = self.boxes_are or shown
        pixels = known or self.default_pixels
        if orientation > 1 and not known:
            taken = f"turned pictures whose boxes are taken as {self.default_pixels}"
            self.remarks[f"{taken} (--boxes-are)"] += 1
        still_to_turn = 1
        shape = stored
        if pixels == "stored":
            still_to_turn = orientation
        elif pixels == "upright":
            shape = _upright_shape(stored, orientation)
        width, height = size or shape
        if self.boxes_are and shown not in (None, pixels):
            # The user knows better than the stated size, which is of the other pixels.
            width, height = height, width
        return Frame(width, height, still_to_turn)

    def measured(self, frame: Frame, own_unit: str) -> Frame:
        """The frame in the unit that boxes are measured in: the user's word, or the format's
        own.
        """
        unit = self.unit or own_unit
        side = {"fractions": 1, "thousandths": 1000}.get(unit)
        assumed = self.unit is None
        if side is None:
            return replace(frame, assumed=assumed)
        return replace(frame, width=side, height=side, assumed=assumed)

    def box(self, frame: Frame, corners: Box, cut: bool = False) -> Box:
        """A box on the upright picture, normalized.

        corners: x0, y0, x1, y1 in pixels of the frame.
        cut: the part outside the picture is meant to be lost.

        Raises FieldError.
        """
        numbers_shown = ", ".join(f"{value:.6g}" for value in corners)
        shown = f"[{numbers_shown}]"
        if not all(map(math.isfinite, corners)):
            raise FieldError(f"{shown} holds a value that is no number", "write the box again")
        x0, y0, x1, y1 = corners
        if x1 <= x0 or y1 <= y0:
            raise FieldError(
                f"{shown} is empty or inverted", "width and height must be more than 0"
            )
        if frame.assumed and max(corners) <= 1 + _SLACK and frame.width > 2:
            raise FieldError(
                f"{shown} looks like fractions of the picture, and pixels are meant",
                "say what boxes are measured in with --boxes fractions (or pixels, if they are)",
            )
        left = x0 / frame.width
        top = y0 / frame.height
        right = x1 / frame.width
        bottom = y1 / frame.height
        # how far the box reaches over an edge
        over = max(
            -left,
            -top,
            right - 1,
            bottom - 1,
        )
        left, top, right, bottom = (min(max(part, 0), 1) for part in (left, top, right, bottom))
        if (over > _SLACK and not cut) or left >= right or top >= bottom:
            raise FieldError(
                f"{shown} lies outside the picture of {frame.width:g} x {frame.height:g}",
                _remedy_outside(frame, max(corners)),
            )
        if frame.assumed and max(frame.width, frame.height) > 1:
            self._note_scale(frame, max(corners))
        if over > 1e-4:
            self.remarks["boxes cut at the edge"] += 1
        turned = upright((left, top, right, bottom), frame.orientation)
        a, b, c, d = (round(v, 8) for v in turned)
        return a, b, c, d

    def _note_scale(self, frame: Frame, largest: float) -> None:
        """Counts boxes that may be of the scale 0 to 1000 in a picture of more pixels."""
        if min(frame.width, frame.height) > 1200:
            self.large_boxes[largest <= 1000] += 1

    def tell_rest(self) -> None:
        """Remarks that only all rows together give."""
        if self.found_by_end:
            path, name = next(iter(self.found_by_end.items()))
            what = f"pictures found by the end of their path alone, such as {name} at {path}"
            self.remarks[what] = len(self.found_by_end)
        within = self.large_boxes[True]
        if within >= 3 and not self.large_boxes[False]:
            what = (
                "boxes that all end at 1000 or before in larger pictures: if they are of the scale "
                "0 to 1000, say --boxes thousandths"
            )
            self.remarks[what] = within

    def add_picture(
        self,
        name: str,
        path: Path,
        detections: list[Detection],
        unsure: Iterable[str],
        classes: Iterable[str],
        place: str = "",
        item: int | None = None,
        file: Path | None = None,
        broken: bool = False,
    ) -> None:
        """A picture that has only boxes. A second record of the same file counts once where it says
        the same; else both are broken.

        unsure: classes of which the picture may show more than `detections`.
        classes: those that it is known to lack where it has no detection of them.
        place, item, file: of the record, for errors.
        broken: whether a row of the record was reported, so that it cannot be compared.
        """
        real = path.resolve()
        record = _Place(
            field=place or name,
            item=item,
            detections=frozenset((d.name, d.box) for d in detections),
            broken=broken,
        )
        first = self._places.setdefault(real, record)
        if first is not record:
            if first.broken or broken:
                return
            if first.detections == record.detections:
                self.omissions["records of a picture that is there twice"] += 1
                return
            self.pictures = [p for p in self.pictures if p.path.resolve() != real]
            where = f"item {first.item}" if first.item else first.field
            error = FieldError(
                f"{path} is the picture of {where} too, with other boxes",
                "name the right picture, or remove one of the two",
            )
            self.report(error, place, item=item, file=file)
            return
        # A box that is there twice would be counted twice.
        once = {(d.name, d.box): d for d in reversed(detections)}
        twice = len(detections) - len(once)
        if twice:
            self.omissions["boxes that are there twice"] += twice
        unknown = frozenset(unsure)
        present = {detection.name for detection in detections}
        absent = absent_classes(sorted(set(classes) - present - unknown), present | unknown)
        self.pictures.append(
            Picture(
                id=name,
                path=path,
                detections=tuple(reversed(once.values())),
                unsure=unknown,
                absent=absent,
            )
        )


def _upright_shape(stored: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of a picture after its EXIF orientation is applied."""
    width, height = stored
    if orientation >= 5:
        return height, width
    return width, height


def _same_shape(shape: tuple[int, int], size: Size) -> bool:
    """Whether a picture has this size, or was scaled since, to within a pixel."""
    if shape == size:
        return True
    width, height = shape
    stated_width, stated_height = size
    difference = abs(width * stated_height - height * stated_width)
    return difference <= max(width, height, stated_width, stated_height)


def _remedy_outside(frame: Frame, largest: float) -> str:
    """What to do about a box outside the picture. largest: of its coordinates."""
    remedy = "correct or remove the box"
    if frame.assumed and frame.width == frame.height == 1:
        return f"{remedy}, or say --boxes pixels or --boxes thousandths (the scale 0 to 1000)"
    if frame.assumed and largest <= 1000:
        return f"{remedy}, or say --boxes thousandths if boxes are of the scale 0 to 1000"
    return remedy


def size_of(data: JsonObject, width: str, height: str) -> Size | None:
    """The width and height that an object states, if it states both. Raises FieldError where they
    are none.
    """
    if data.get(width) is None or data.get(height) is None:
        return None
    try:
        w, h = numbers([data[width], data[height]], 2)
    except FieldError as error:
        raise FieldError(f"{width} and {height} {error.reason}") from error
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
