"""Data files read row by row: JSONL, CSV and TSV, parquet. May import: pyarrow, in a function.

A file is read through once for its texts. Pictures that lie inside it are read later, one row at a
time, so that few of them are in memory. What is wrong with a row is a `FieldError` in its place;
what is wrong with a whole file is a DataError.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from lvr_lite.data.rows import FieldError, JsonObject, Row, json_lines, parse_line
from lvr_lite.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

# bytes of a cell: a picture of 8K in base64 has some 50 million
LARGEST_FIELD = 1 << 30
# stands for a field of parquet that holds a whole picture
UNREAD = "not read yet"


@dataclass(frozen=True)
class Place:
    """Where a row stands.

    where: "file:line", for messages.
    number: line or row, from 1.
    offset: what finds the row again: bytes of a text file, rows of a parquet file.
    """

    where: str
    number: int
    offset: int


class Table(Protocol):
    """A data file."""

    path: Path

    def rows(self) -> Iterator[tuple[Place, Row | FieldError]]:
        """Every row, or what is wrong with it. A null is a field that is not there."""

    def reread(self, place: Place) -> JsonObject:
        """The fields of one row, pictures included. Raises DataError."""


class JsonLines:
    """JSONL."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[tuple[Place, Row | FieldError]]:
        with self.path.open("rb") as file:
            for line in json_lines(file):
                place = Place(
                    f"{self.path}:{line.number}",
                    line.number,
                    line.start,
                )
                yield place, _row(line.data)

    def reread(self, place: Place) -> JsonObject:
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return _unchanged(_row(file.readline()))


def _row(line: bytes) -> Row | FieldError:
    try:
        value = parse_line(line)
    except FieldError as error:
        return error
    if not isinstance(value, dict):
        return FieldError("must be an object with the fields of a question")
    return Row({name: field for name, field in value.items() if field is not None})


def _unchanged(row: Row | FieldError) -> JsonObject:
    if isinstance(row, FieldError):
        raise DataError("the file has changed since it was read first")
    return row.values


class Delimited:
    """CSV or TSV with a header, quoted as spreadsheets and pandas quote.

    needed: columns without which the file is refused with a DataError.
    """

    def __init__(self, path: Path, delimiter: str, needed: Sequence[str]) -> None:
        self.path = path
        self.delimiter = delimiter
        self.needed = needed
        self.columns: list[str] = []
        csv.field_size_limit(LARGEST_FIELD)

    def rows(self) -> Iterator[tuple[Place, Row | FieldError]]:
        with self.path.open("rb") as file:
            reader = self._reader(file)
            names = [name.removeprefix("\ufeff").strip() for name in next(reader, [])]
            # some copies of MMVP misspell it
            self.columns = ["Index" if name == "lndex" else name for name in names]
            _need_columns(self.path, self.columns, self.needed)
            while True:
                number = reader.line_num + 1
                place = Place(
                    f"{self.path}:{number}",
                    number,
                    file.tell(),
                )
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    form = self.path.suffix[1:].upper()
                    yield place, FieldError(f"not valid {form} ({error})")
                    continue
                if cells:
                    yield place, self._row(cells)

    def _reader(self, file: BinaryIO) -> CsvReader:
        # `readline` and not iteration, which reads ahead: `tell` must give the place of the line.
        data = iter(file.readline, b"")
        lines = (line.decode("utf-8", "surrogateescape") for line in data)
        return csv.reader(lines, delimiter=self.delimiter)

    def _row(self, cells: list[str]) -> Row | FieldError:
        if len(cells) > len(self.columns):
            return FieldError(
                f"has {len(cells)} cells for {len(self.columns)} columns; a text that holds the "
                "delimiter must be in quotes"
            )
        return Row(dict(zip(self.columns, cells, strict=False)))

    def reread(self, place: Place) -> JsonObject:
        with self.path.open("rb") as file:
            file.seek(place.offset)
            return _unchanged(self._row(next(self._reader(file), [])))


class Parquet:
    """Parquet. At first only the paths of its pictures (columns "image…") are read, later their
    bytes, a few rows at a time and in order.

    needed: columns without which the file is refused with a DataError.
    """

    # rows whose pictures are in memory together
    BATCH = 8

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        from pyarrow import ArrowException, parquet, types

        self.path = path
        self._errors = (ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise DataError(
                f"{path}: not a whole parquet file ({_first_line(error)}); copy it again"
            ) from error
        schema = self._file.schema_arrow
        _need_columns(path, schema.names, needed)
        self._images = [name for name in schema.names if name.startswith("image")]
        self._with_path = [
            name
            for name in self._images
            if types.is_struct(schema.field(name).type)
            and schema.field(name).type.get_field_index("path") >= 0
        ]
        self._batches: Iterator[Any] = iter(())
        # the rows that were read last, and the number of the first of them
        self._rows: list[JsonObject] = []
        self._first = 0

    def rows(self) -> Iterator[tuple[Place, Row | FieldError]]:
        unread = [name for name in self._images if name not in self._with_path]
        columns = [
            f"{name}.path" if name in self._with_path else name
            for name in self._file.schema_arrow.names
            if name not in unread
        ]
        number = 0
        try:
            for batch in self._file.iter_batches(columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    present = {name: field for name, field in fields.items() if field is not None}
                    row = Row(present | dict.fromkeys(unread, UNREAD))
                    yield (
                        Place(
                            f"{self.path}: row {number}",
                            number,
                            number - 1,
                        ),
                        row,
                    )
        except self._errors as error:
            raise DataError(
                f"{self.path}: cannot be read beyond row {number} ({_first_line(error)}); copy "
                "it again"
            ) from error

    def reread(self, place: Place) -> JsonObject:
        try:
            if place.offset < self._first or not self._rows:
                self._batches = self._file.iter_batches(self.BATCH, columns=self._images)
                self._rows = []
                self._first = 0
            while place.offset >= self._first + len(self._rows):
                self._first += len(self._rows)
                self._rows = next(self._batches).to_pylist()
        except self._errors as error:
            raise DataError(
                f"image: cannot be read ({_first_line(error)}); copy the file again"
            ) from error
        return self._rows[place.offset - self._first]


def _first_line(error: Exception) -> str:
    if str(error):
        return str(error).splitlines()[0][:120]
    return type(error).__name__


def _need_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in columns]:
        there = ", ".join(columns)[:120] or "none"
        raise DataError(
            f"{path}: has no column {', '.join(missing)} (it has {there}); use the published file"
        )
