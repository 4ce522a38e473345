"""Files of samples: read, checked, indexed. May import: the standard library and what stands above
`data`.

    project JSONL     one object a line: {"id", "image": path or [paths], "question", "answer",
                      "choices", "boxes", "type", "pair"}
    official LVR      one JSON list (`data.official`)

The first character tells which one a file is: "[" begins the list. Paths of pictures are relative
to the file. Other fields may be there and are ignored, unless their names look like a field that is
meant (`bboxes` in the JSONL).
"""

from __future__ import annotations

import codecs
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lvr_lite.data.foreign_names import reject_foreign_names
from lvr_lite.data.official import from_official
from lvr_lite.data.rows import (
    BoxCheck,
    FieldError,
    JsonObject,
    Line,
    Problem,
    Row,
    box_of_any_scale,
    json_lines,
    json_reason,
    kind_of,
    normalized_box,
    parse_json,
    parse_line,
    plain_text,
    text,
    utf8_error,
)
from lvr_lite.data.samples import LazySamples, Sample
from lvr_lite.errors import DataError

# pictures of which a check remembers whether they exist
REMEMBERED = 1 << 14


@dataclass(frozen=True)
class PlacedSample:
    """A sample and where it stands in its file.

    line, item: the line, or the item of a list, from 1.
    start, end: of a line, in bytes.
    """

    sample: Sample
    line: int | None
    item: int | None
    start: int = 0
    end: int = 0

    @property
    def place(self) -> str:
        return f"line {self.line}" if self.line else f"item {self.item}"


def read_samples(path: Path | str) -> list[Sample]:
    """All samples of a file in either format.

    Raises DataError with the first problem: file, line or item, field, what is wrong and what to
    do.
    """
    placed, problems = placed_samples(Path(path))
    _raise_first(path, problems)
    return [one.sample for one in placed]


def placed_samples(
    path: Path, images: Path | None = None, fractions: bool = True
) -> tuple[list[PlacedSample], list[Problem]]:
    """The good samples of a file and all problems that show without opening pictures, in the order
    of the file.

    images: the folder that paths are relative to, if not the file's.
    fractions: whether boxes are checked to be fractions; else they may be of any scale.
    """
    checker = _Checker(path, images, fractions)
    checker.run()
    return checker.placed, checker.problems


class SampleFile(LazySamples):
    """All samples of a file, read again from the file each time: a million take some 25 MB of
    memory. Those of an official list, which is one JSON value, stay in memory.

    pictures: of each sample a number that stands for its pictures; the same paths, the same number.
    boxed: of each sample whether it has boxes.

    Raises DataError as `read_samples` does, and where the file changes while it is in use.
    """

    def __init__(self, path: Path) -> None:
        indexer = _Indexer(path)
        indexer.run()
        _raise_first(path, indexer.problems)
        self.pictures = indexer.pictures
        self.boxed = indexer.boxed
        self._path = path
        self._starts = indexer.starts
        self._ends = indexer.ends
        self._listed = [placed.sample for placed in indexer.placed]
        self._items = [placed.item for placed in indexer.placed]

    def __len__(self) -> int:
        return len(self.boxed)

    def place(self, index: int) -> str:
        if self._listed:
            return f"{self._path}: item {self._items[index]}"
        # Counted when it is asked for, which only errors do.
        with self._path.open("rb") as file:
            before = file.read(self._starts[index]).count(b"\n")
        return f"{self._path}:{before + 1}"

    def read(self, index: int) -> Sample:
        if self._listed:
            return self._listed[index]
        # Opened each time: worker processes that share an open file share its position too.
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.read(self._ends[index] - self._starts[index])
        try:
            value = parse_line(line)
        except FieldError:
            value = None
        sample = _from_line(value, self._path.parent) if isinstance(value, dict) else None
        if not isinstance(sample, Sample):
            raise DataError(f"{self._path}: was changed while it was read; start again")
        return sample


def _raise_first(path: Path | str, problems: list[Problem]) -> None:
    if not problems:
        return
    others = len(problems) - 1
    more = f" ({others} more: lvr-lite data validate {path} lists all)" if others else ""
    raise DataError(f"{problems[0]}{more}")


# ----------------------------------------------------------------------------------------------
# one pass over a file


class _Checker:
    """Collects the good samples of one file and its problems.

    images: the folder that paths of pictures are relative to, the file's own by default.
    fractions: whether boxes must be fractions.
    """

    def __init__(self, path: Path, images: Path | None = None, fractions: bool = True) -> None:
        self.path = path
        self._box = normalized_box if fractions else box_of_any_scale
        self.images = images or path.parent
        self.placed: list[PlacedSample] = []
        self.problems: list[Problem] = []
        self._id_hashes: set[int] = set()
        # id -> where it is first; filled once an id comes twice
        self._first_places: dict[str, str] = {}
        # of pictures that were named lately
        self._exists: dict[Path, bool] = {}

    def run(self) -> None:
        try:
            with self.path.open("rb") as file:
                first = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
                file.seek(0)
                if first == b"[":
                    self._check_list(file.read())
                else:
                    self._check_lines(file)
        except OSError as error:
            reason = f"cannot be read ({error.strerror or error})"
            self._report(FieldError(reason, "name a JSONL file of samples"))

    def add(self, placed: PlacedSample) -> None:
        """One more good sample."""
        self.placed.append(placed)

    def _check_lines(self, file: BinaryIO) -> None:
        blank = True
        for line in json_lines(file):
            blank = False
            try:
                value = parse_line(line.data)
            except FieldError as error:
                self._report(error, line.number)
                continue
            self._check_object(value, line)
        if blank:
            self._report(FieldError("empty", "it must hold one sample a line"))

    def _check_list(self, data: bytes) -> None:
        try:
            values = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            self._report(utf8_error(error), line=1 + data[: error.start].count(b"\n"))
            return
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            self._report(
                FieldError(
                    f"not a valid JSON list ({json_reason(error)})", "mend or write it again"
                ),
                line,
            )
            return
        if not values:
            self._report(FieldError("an empty list", "it must hold samples"))
        for item, value in enumerate(values, 1):
            self._check_object(value, item)

    def _check_object(self, value: object, place: Line | int) -> None:
        """One object of the file: one more sample, or its problems. place: a line, or an item."""
        line = place.number if isinstance(place, Line) else None
        item = None if isinstance(place, Line) else place
        if not isinstance(value, dict):
            kind = kind_of(value)
            error = FieldError(f"must be an object with the fields of a sample, not {kind}")
            self._report(error, line, item)
            return
        sample = self._converted(value, item)
        errors = self._errors_beside(sample) if isinstance(sample, Sample) else sample
        for error in errors:
            self._report(error, line, item)
        if isinstance(sample, list) or errors:
            return
        if isinstance(place, Line):
            self.add(PlacedSample(sample, line, item, place.start, place.end))
        else:
            self.add(PlacedSample(sample, line, item))

    def _converted(
        self,
        value: JsonObject,
        item: int | None,
    ) -> Sample | list[FieldError]:
        if item is None:
            return _from_line(value, self.images, self._box)
        return from_official(value, self.images, item, self._box)

    def _errors_beside(self, sample: Sample) -> list[FieldError]:
        """What shows only beside the other samples and the disk."""
        errors = []
        if hash(sample.id) in self._id_hashes:
            errors.append(
                FieldError(
                    f"{sample.id!r} is already taken by {self._first_place(sample.id)}",
                    "give every sample its own",
                    "id",
                )
            )
        self._id_hashes.add(hash(sample.id))
        remedy = "paths are relative to the data file's folder"
        errors += [
            FieldError(f"{path} does not exist", remedy, "image")
            for path in sample.images
            if not self._is_file(path)
        ]
        return errors

    def _is_file(self, path: Path) -> bool:
        if path not in self._exists:
            if len(self._exists) >= REMEMBERED:
                self._exists.clear()
            self._exists[path] = path.is_file()
        return self._exists[path]

    def _first_place(self, sample_id: str) -> str:
        """Where the first sample of this id is. The file is read once more, for all ids: few files
        hold an id twice.
        """
        if not self._first_places:
            content = self.path.read_bytes().decode("utf-8-sig", errors="replace")
            listed = content.lstrip().startswith("[")
            values = json.loads(content) if listed else map(_json_or_none, content.split("\n"))
            for number, value in enumerate(values, 1):
                if not isinstance(value, dict):
                    continue
                sample = self._converted(value, number if listed else None)
                if isinstance(sample, Sample):
                    self._first_places.setdefault(
                        sample.id, f"{'item' if listed else 'line'} {number}"
                    )
        return self._first_places[sample_id]

    def _report(
        self,
        error: FieldError,
        line: int | None = None,
        item: int | None = None,
    ) -> None:
        self.problems.append(
            Problem(
                self.path,
                error.field,
                str(error),
                line,
                item,
            )
        )


class _Indexer(_Checker):
    """Keeps of each line where it is, which pictures it names, and whether it has boxes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.starts = array("q")
        self.ends = array("q")
        self.pictures = array("q")
        self.boxed = bytearray()

    def add(self, placed: PlacedSample) -> None:
        if placed.line is None:
            super().add(placed)
        else:
            self.starts.append(placed.start)
            self.ends.append(placed.end)
        self.pictures.append(hash(placed.sample.images))
        self.boxed.append(bool(placed.sample.boxes))


def _json_or_none(line: str) -> object:
    try:
        return parse_json(line)
    except FieldError:
        return None


def _from_line(
    data: JsonObject, folder: Path, box: BoxCheck = normalized_box
) -> Sample | list[FieldError]:
    """An object of the project's JSONL: the sample, or what is wrong with it."""
    row = Row(data)
    reject_foreign_names(row)
    sample_id = row.need("id", text)
    images = row.images(folder)
    question = row.need("question", plain_text)
    answer = row.need("answer", plain_text)
    choices = row.choices()
    boxes = row.boxes("boxes", box)
    if choices is not None and answer and answer not in choices:
        row.reject(
            "answer",
            f"{answer!r} is not among the choices ({', '.join(choices)[:80]})",
            "write it as it stands there",
        )
    kind = row.get("type", text)
    pair = row.get("pair", text)
    if row.errors or sample_id is None or question is None or answer is None:
        return row.errors
    return Sample(sample_id, images, question, answer, choices, boxes, kind, pair)
