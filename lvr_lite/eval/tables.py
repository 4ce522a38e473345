"""Data files read row by row: JSONL, CSV and TSV, parquet. May import: the core; pyarrow where
needed.

A file is read through once for its texts, and again, one row at a time, for the pictures that lie
in it, so that few of them are in memory. What is wrong with a row is told in one line in its place;
what is wrong with a whole file is a DataError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lvr_lite.errors import DataError

LARGEST_FIELD = 1 << 30  # bytes of a cell: a picture of 8K in base64 has some 50 million
UNREAD = "not read yet"  # a field of parquet that holds a whole picture
Fields = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a row stands. number: line or row, from 1; at: what finds it again."""

    where: str
    number: int
    at: int


class Source(Protocol):
    """A data file: its rows as fields, or in one line what is wrong with the row; and one row
    again, for its pictures.
    """

    path: Path

    def rows(self) -> Iterator[tuple[Place, Fields | str]]: ...

    def again(self, place: Place) -> Fields: ...


class Lines:
    """JSONL."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[tuple[Place, Fields | str]]:
        with self.path.open("rb") as file:
            at, number = file.tell(), 0
            while line := file.readline():
                number += 1
                if line.strip():
                    yield Place(f"{self.path}:{number}", number, at), self._fields(line)
                at = file.tell()

    def _fields(self, line: bytes) -> Fields | str:
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return "is not UTF-8"
        except (ValueError, RecursionError) as error:
            return f"not valid JSON ({error})"
        return (
            fields
            if isinstance(fields, dict)
            else "must be an object with the fields of a question"
        )

    def again(self, place: Place) -> Fields:
        with self.path.open("rb") as file:
            file.seek(place.at)
            fields = self._fields(file.readline())
        if isinstance(fields, str):
            raise DataError("the file has changed since it was read first")
        return fields


class Delimited:
    """CSV or TSV with a header, quoted as spreadsheets and pandas quote."""

    def __init__(self, path: Path, delimiter: str, needed: Sequence[str]) -> None:
        self.path, self.delimiter, self.needed = path, delimiter, needed
        self.columns: list[str] = []
        csv.field_size_limit(LARGEST_FIELD)

    def rows(self) -> Iterator[tuple[Place, Fields | str]]:
        with self.path.open("rb") as file:
            reader = self._reader(file)
            self.columns = [name.removeprefix("\ufeff").strip() for name in next(reader, [])]
            self.columns = [
                "Index" if name == "lndex" else name for name in self.columns
            ]  # so is MMVP's misspelt in some copies
            _need_columns(self.path, self.columns, self.needed)
            while True:
                place = Place(
                    f"{self.path}:{reader.line_num + 1}", reader.line_num + 1, file.tell()
                )
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield place, f"not valid {self.path.suffix[1:].upper()} ({error})"
                    continue
                if cells:
                    yield place, self._fields(cells)

    def _reader(self, file: Any) -> Any:
        lines = (
            line.decode("utf-8", "surrogateescape") for line in iter(file.readline, b"")
        )  # readline, so that tell() tells where
        return csv.reader(lines, delimiter=self.delimiter)

    def _fields(self, cells: list[str]) -> Fields | str:
        if len(cells) > len(self.columns):
            return f"has {len(cells)} cells for {len(self.columns)} columns; a text that holds the delimiter must be in quotes"
        return dict(zip(self.columns, cells, strict=False))

    def again(self, place: Place) -> Fields:
        with self.path.open("rb") as file:
            file.seek(place.at)
            fields = self._fields(next(self._reader(file), []))
        if isinstance(fields, str):
            raise DataError("the file has changed since it was read first")
        return fields


class Parquet:
    """Parquet. Of pictures (columns "image…") only their paths are read at first, and their bytes
    again and in order, so that few of them are in memory.
    """

    BATCH = 8

    def __init__(self, path: Path, needed: Sequence[str]) -> None:
        from pyarrow import ArrowException, parquet, types

        self.path, self._errors = path, (ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise DataError(
                f"{path}: not a whole parquet file ({_first_line(error)}); copy it again"
            ) from error
        schema = self._file.schema_arrow
        _need_columns(path, schema.names, needed)
        self._images = [name for name in schema.names if name.startswith("image")]
        self._unread = [
            n
            for n in self._images
            if not (
                types.is_struct(schema.field(n).type)
                and schema.field(n).type.get_field_index("path") >= 0
            )
        ]
        self._batches: Iterator[Any] = iter(())
        self._first = 0
        self._rows: list[Fields] = []

    def rows(self) -> Iterator[tuple[Place, Fields | str]]:
        columns = [
            f"{n}.path" if n in self._images else n
            for n in self._file.schema_arrow.names
            if n not in self._unread
        ]
        number = 0
        try:
            for batch in self._file.iter_batches(columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield (
                        Place(f"{self.path}: row {number}", number, number - 1),
                        fields | dict.fromkeys(self._unread, UNREAD),
                    )
        except self._errors as error:
            raise DataError(
                f"{self.path}: cannot be read beyond row {number} ({_first_line(error)}); copy it again"
            ) from error

    def again(self, place: Place) -> Fields:
        try:
            if place.at < self._first or not self._rows:
                self._batches, self._first, self._rows = (
                    self._file.iter_batches(self.BATCH, columns=self._images),
                    0,
                    [],
                )
            while place.at >= self._first + len(self._rows):
                self._first += len(self._rows)
                self._rows = next(self._batches).to_pylist()
        except self._errors as error:
            raise DataError(
                f"image: cannot be read ({_first_line(error)}); copy the file again"
            ) from error
        return self._rows[place.at - self._first]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def _need_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in columns]:
        raise DataError(
            f"{path}: has no column {', '.join(missing)} (it has {', '.join(columns)[:120] or 'none'}); use the published file"
        )
