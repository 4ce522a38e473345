"""What an .onnx names outside itself, checked before anything loads it. May import: the standard
library and `sums`.

A graph may come from anywhere. Its weights lie in files that it names, and each runtime opens what
stands there: `../../x`, an absolute path, a place in memory. The file is walked here in protobuf's
wire format (protobuf.dev/programming-guides/encoding; fields as in onnx.proto of ONNX 1.23), since
devices have no onnx package. Weights are skipped, never read.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.errors import BundleError
from lvr_lite.sums import is_plain

# {message: {field number: the message that it holds}}; other fields are skipped.
MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "weight", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "weight": {},
    "tensor": {},
}
# Of a tensor: its name, its external data, whether it has any. Of an entry: key and value.
NAME, EXTERNAL, WHERE = 8, 13, 14
KEY, VALUE = 1, 2
# Of a node: its operator and the operator's domain.
OPERATOR, DOMAIN = 4, 7
# ONNX's own operators, and those that ONNX Runtime is built with.
DOMAINS = ("", "ai.onnx", "com.microsoft")
# An operator that names a file of compiled code, which a provider loads.
LOADS_CODE = ("EPContext",)
DEEPEST = 16
REFUSED = "do not use it, or export it again"

# A field: its number and its value, a number or the place of its bytes.
Field = tuple[int, "int | tuple[int, int]"]


@dataclass(frozen=True)
class Place:
    """Where a weight's values lie: a file beside the graph, from `offset` on, in bytes.

    length: None where the graph does not say.
    """

    file: Path
    offset: int
    length: int | None


def place_of(path: Path, name: str, entries: dict[str, str]) -> Place:
    """The place that a weight's external data names, checked.

    path: of the graph.
    name: of the weight.
    entries: {key: value} of its external data.

    Raises BundleError, which names the graph and the weight, for a file that is not in the graph's
    folder, and for bytes that are not in the file.
    """
    location = entries.get("location", "")
    if not is_plain(location):
        raise BundleError(
            f"{path}: weight {name} lies in {location!r}, which is no file beside the graph; "
            f"{REFUSED}"
        )
    file = path.parent / location
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise BundleError(f"{file}: is a link out of its folder; {REFUSED}")
    if not file.is_file():
        raise BundleError(f"{file}: missing, and {path.name} has weights in it; {REFUSED}")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else None
    except ValueError as error:
        raise BundleError(f"{path}: weight {name} has no readable place; {REFUSED}") from error
    size = file.stat().st_size
    if not 0 <= offset <= size or not 0 <= (length or 0) <= size - offset:
        raise BundleError(
            f"{path}: weight {name} is said to lie at bytes {offset} to {offset + (length or 0)} "
            f"of {file.name}, which has {size}; {REFUSED}"
        )
    return Place(file, offset, length)


def check_graph(path: Path, listed: Collection[str] | None = None) -> None:
    """Raises BundleError where a graph names what it must not, in one line that names it: a file
    out of its folder or not listed, bytes beyond a file's end, values of anything but a weight in
    a file, an operator that neither ONNX nor ONNX Runtime has, one that loads code; and where it
    is no graph.

    path: of the .onnx.
    listed: the names, relative to its folder, of files that it may have weights in; None: any
        there.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise BundleError(f"{path}: is empty; {REFUSED}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Walk(path, content, listed).message("model", 0, len(content), 0)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Walk:
    """One walk through a graph's file."""

    def __init__(self, path: Path, content: mmap.mmap, listed: Collection[str] | None) -> None:
        self._path = path
        self._content = content
        self._listed = listed

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        if depth > DEEPEST * 4:
            raise self._damaged("too deeply nested")
        fields = list(self._fields(start, end)) if kind in ("node", "weight", "tensor") else None
        if kind == "node":
            self._check_operator(dict(fields or ()))
        if kind in ("weight", "tensor"):
            self._check_values(kind, fields or [])
            return
        inside = MESSAGES[kind]
        for number, value in fields if fields is not None else self._fields(start, end):
            if number in inside and isinstance(value, tuple):
                self.message(inside[number], *value, depth + 1)

    def _check_operator(self, fields: dict[int, int | tuple[int, int]]) -> None:
        operator = self._text(fields.get(OPERATOR))
        domain = self._text(fields.get(DOMAIN))
        if domain not in DOMAINS or operator in LOADS_CODE:
            shown = f"{domain}:{operator}" if domain else operator
            raise BundleError(
                f"{self._path}: holds the operator {shown}, which needs code from elsewhere; "
                f"{REFUSED}"
            )

    def _check_values(self, kind: str, fields: list[Field]) -> None:
        """Of a tensor. Only a graph's own weights may lie in a file."""
        named = dict(fields)
        name = self._text(named.get(NAME))
        entries: dict[str, str] = {}
        for number, value in fields:
            if number == EXTERNAL and isinstance(value, tuple):
                entry = dict(self._fields(*value))
                entries[self._text(entry.get(KEY))] = self._text(entry.get(VALUE))
        if not entries and not named.get(WHERE):
            return
        if kind != "weight":
            raise BundleError(
                f"{self._path}: {name or 'a constant'} has its values in a file and is no weight "
                f"of the graph; {REFUSED}"
            )
        place = place_of(self._path, name, entries)
        if self._listed is not None and entries["location"] not in self._listed:
            raise BundleError(
                f"{self._path}: weight {name} lies in {place.file.name}, which the bundle does "
                f"not list; {REFUSED}"
            )

    def _text(self, value: int | tuple[int, int] | None) -> str:
        if value is None:
            return ""
        if isinstance(value, int):
            raise self._damaged("a number where text must be")
        start, end = value
        if end - start > 4096:
            raise self._damaged("a name of more than 4096 bytes")
        return self._content[start:end].decode("utf-8", errors="replace")

    def _fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of a message that lies at these places."""
        while start < end:
            tag, start = self._number(start, end)
            number, kind = tag >> 3, tag & 7
            value: int | tuple[int, int] = 0
            if kind == 0:
                value, start = self._number(start, end)
            elif kind == 2:
                length, start = self._number(start, end)
                value = (start, start + length)
                start += length
            elif kind in (1, 5):
                start += 8 if kind == 1 else 4
            else:
                raise self._damaged(f"wire type {kind}")
            if start > end:
                raise self._damaged("a field beyond the end")
            yield number, value

    def _number(self, start: int, end: int) -> tuple[int, int]:
        """A number of seven bits a byte, and the place after it."""
        value = 0
        for place in range(start, min(end, start + 10)):
            byte = self._content[place]
            value |= (byte & 127) << 7 * (place - start)
            if byte < 128:
                return value, place + 1
        raise self._damaged("a number without an end")

    def _damaged(self, reason: str) -> BundleError:
        return BundleError(f"{self._path}: not an ONNX graph ({reason}); {REFUSED}")
