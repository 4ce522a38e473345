"""One row of a data file and the checks of its fields: a line of JSONL, an item of a JSON list, a
row of CSV or of parquet. May import: the standard library.

A check takes a value and returns it with its type, or raises `FieldError`. `Row` applies checks to
named fields and collects what they raise, so that all mistakes of a row are reported at once.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from lvr_lite.data.boxes import Box
from lvr_lite.errors import printable

JsonObject = dict[str, object]
T = TypeVar("T")

_BLANK = b"\xef\xbb\xbf \t\r\n\v\f"
# The image token, the markers of latents and those of the chat: as text, a model would read them
# as what they stand for.
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
# What other trainers put in the place of a picture (LLaVA, Qwen-VL, InternVL, MiniCPM-V, ms-swift)
# and LVR's in that of latents.
_MARK = re.compile(
    r"<(?:(?:image|video)(?:[-_ ]?\d+|[-_ ]?(?:placeholder|token|pad|here))?|lvr"
    r"|ref-object|bbox)>|\[IMG\]",
    re.IGNORECASE,
)
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class FieldError(Exception):
    """What is wrong with a row or with one of its fields, before file and line are known.

    reason: what is wrong. remedy: what to do about it, or "". field: its name, or "" for the row.
    """

    def __init__(self, reason: str, remedy: str = "", field: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy
        self.field = field


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a data file.

    line: counted from 1, or None.
    item: place in a JSON list, counted from 1, or None.
    note: worth knowing, but nothing that training would get wrong.
    """

    file: Path
    field: str
    message: str
    line: int | None = None
    item: int | None = None
    note: bool = False

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        item = f": item {self.item}" if self.item else ""
        note = ": note" if self.note else ""
        field = f"{self.field}: " if self.field else ""
        return printable(f"{self.file}{line}{item}{note}: {field}{self.message}")


# ----------------------------------------------------------------------------------------------
# lines of JSON


@dataclass(frozen=True)
class Line:
    """A line of a JSONL file.

    number: counted from 1.
    start, end: its place in the file, in bytes.
    """

    number: int
    start: int
    end: int
    data: bytes


def json_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that are not blank, one in memory at a time."""
    end = 0
    for number, data in enumerate(file, 1):
        start = end
        end += len(data)
        if data.strip(_BLANK):
            yield Line(number, start, end, data)


def parse_line(data: bytes) -> object:
    """The JSON value of a line. Raises FieldError where it is not UTF-8 or not one JSON value."""
    try:
        return parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise utf8_error(error) from error


def parse_json(line: str) -> object:
    """The JSON value of a line's text. Raises FieldError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FieldError(
            f"not valid JSON ({json_reason(error)})", "every line must be one whole object"
        ) from error


# What an escape of half a pair looks like in JSON.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def refuse_half_characters(source: str, value: object) -> None:
    """Raises FieldError where a JSON value holds half of a surrogate pair, which no file can.

    source: the text of the value.
    """
    if not _HALF.search(source):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            "holds half of a surrogate pair, which is no character", "write the file again as UTF-8"
        ) from error


def json_reason(error: Exception) -> str:
    """Why a text is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def utf8_error(error: UnicodeDecodeError) -> FieldError:
    byte = error.object[error.start]
    return FieldError(f"not UTF-8 (byte 0x{byte:02x})", "save the file as UTF-8")


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    return _KINDS[type(value)]


# ----------------------------------------------------------------------------------------------
# checks of one value: each raises FieldError


def text(value: object) -> str:
    """Text that is not blank."""
    if not isinstance(value, str):
        raise FieldError(f"must be text, not {kind_of(value)}: write it in quotes")
    if not value.strip():
        raise FieldError("is empty", "write its text or remove the sample")
    if has_lone_surrogate(value):
        raise FieldError(
            "holds half of a surrogate pair, which is no character", "write the file again as UTF-8"
        )
    return value


def has_lone_surrogate(value: str) -> bool:
    return not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value)


def plain_text(value: object) -> str:
    """Text in which no part is a control token of a model, or a mark that another trainer puts in
    the place of a picture.
    """
    checked = text(value)
    if mark := _MARK.search(checked):
        raise FieldError(
            f"contains {mark.group()}, which would be read as letters",
            "leave it out: pictures stand before the question, and latent steps before the "
            "answer, by themselves",
        )
    if token := _CONTROL_TOKEN.search(checked):
        raise FieldError(
            f"contains {token.group()}, which a model reads as a control token", "leave it out"
        )
    return checked


def identifier(value: object) -> str:
    """An id as text: 7, 7.0 and "7" are one id. Raises FieldError for what is none."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
        name = str(value).strip()
        if has_lone_surrogate(name):
            raise FieldError(
                "holds half of a surrogate pair, which is no character", "name it anew"
            )
        return name
    raise FieldError(f"{json.dumps(value)[:60]} is no id", "write a whole number or text")


def flag(value: object) -> bool:
    """Yes or no, as true, 1, "1" or "true" and their opposites; null is no. Raises FieldError."""
    word = str(value).strip().lower()
    if value is None or word in ("", "false", "0", "0.0", "no"):
        return False
    if word in ("true", "1", "1.0", "yes"):
        return True
    raise FieldError(f"{json.dumps(value)[:60]} is neither yes nor no", "write 0 or 1")


def as_on_disk(path: Path) -> Path:
    """The file of a name, whose letters with accents may be composed (NFC, as Windows and Linux
    write them) or not (NFD, as macOS did): the form that is on disk, or else the path as it is.
    """
    name = str(path)
    if name.isascii() or exists(path):
        return path
    forms = (Path(unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    return next((form for form in forms if exists(form)), path)


def exists(path: Path) -> bool:
    """Whether a file is there; of a name that no file can have, none is."""
    try:
        return path.exists()
    except OSError:
        return False


def numbers(value: object, count: int) -> list[float]:
    """Exactly `count` numbers, which may be written as text. A whole number that no float can hold
    becomes infinity.
    """
    if isinstance(value, list):
        value = [_number_in(v) for v in value]
    if not _are_numbers(value, count):
        raise FieldError(f"must be {count} numbers, not {json.dumps(value)[:60]}")
    assert isinstance(value, list)
    return [float(v) if isinstance(v, float) or abs(v) < 1e300 else math.inf for v in value]


def _number_in(value: object) -> object:
    """The number that a text is; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


# Reads a box of a file's value, or raises FieldError.
BoxCheck = Callable[[object], Box]


def normalized_box(value: object) -> Box:
    """[x0, y0, x1, y1] from 0 to 1, not empty."""
    if not _are_numbers(value, 4):
        shown = json.dumps(value)[:60]
        raise FieldError(f"must be four numbers [x0, y0, x1, y1], not {shown}")
    assert isinstance(value, list)
    shown = f"[{', '.join(str(v)[:12] for v in value)}]"
    x0, y0, x1, y1 = value
    if any(v != v for v in value):
        raise FieldError(f"{shown} holds NaN", "write the box again")
    if max(value) > 1.5:
        pixels = max(value) > 1000
        kinds = "pixels" if pixels else "pixels, or like the scale 0 to 1000"
        divisor = "" if pixels else ", or both by 1000"
        flags = "pixels" if pixels else "pixels or thousandths"
        raise FieldError(
            f"{shown} looks like {kinds}",
            f"divide x by the picture's width and y by its height (as shown upright){divisor}; "
            f"`lvr-lite data convert --from lvr` does it, with --boxes {flags}",
        )
    if min(value) < 0 or max(value) > 1:
        raise FieldError(f"{shown} lies outside the picture", "coordinates must be between 0 and 1")
    if x0 > x1 or y0 > y1:
        raise FieldError(
            f"{shown} is inverted", "write x0, y0 (upper left) before x1, y1 (lower right)"
        )
    if x0 == x1 or y0 == y1:
        raise FieldError(f"{shown} is empty", "width and height must be more than 0")
    return float(x0), float(y0), float(x1), float(y1)


def box_of_any_scale(value: object) -> Box:
    """[x0, y0, x1, y1] in a unit that is applied later."""
    x0, y0, x1, y1 = numbers(value, 4)
    return x0, y0, x1, y1


def _are_numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    )


# ----------------------------------------------------------------------------------------------
# a row


class Row:
    """The fields of one row. `errors` collects what is wrong with those that were read."""

    def __init__(self, values: JsonObject) -> None:
        self.values = values
        self.errors: list[FieldError] = []

    def reject(self, field: str, reason: str, remedy: str = "") -> None:
        """Notes an error that no check of a single field can see."""
        self.errors.append(FieldError(reason, remedy, field))

    def require(self, field: str, check: Callable[[object], T]) -> T:
        """The value of a field that must be there. Raises FieldError, which names the field."""
        value = self.values.get(field)
        if value is not None:
            return _checked(field, value, check)
        if field in self.values:
            raise FieldError("is null", "it must be given", field)
        raise FieldError("is missing", "every sample needs it", field)

    def need(
        self,
        field: str,
        check: Callable[[object], T],
    ) -> T | None:
        """The value of a field that must be there; None where it is wrong, with the error noted."""
        try:
            return self.require(field, check)
        except FieldError as error:
            self.errors.append(error)
            return None

    def get(
        self,
        field: str,
        check: Callable[[object], T],
    ) -> T | None:
        """The value of a field that may be missing or null; None too where it is wrong."""
        return None if self.values.get(field) is None else self.need(field, check)

    def check(
        self,
        field: str,
        value: object,
        check: Callable[[object], T],
    ) -> T | None:
        """A value that stands deeper in the row, under the name `field`; None where it is wrong."""
        try:
            return _checked(field, value, check)
        except FieldError as error:
            self.errors.append(error)
            return None

    def each(
        self,
        field: str,
        values: list[object],
        check: Callable[[object], T],
    ) -> list[T]:
        """The values of a list that are right."""
        checked = [
            self.check(
                f"{field}[{i}]",
                value,
                check,
            )
            for i, value in enumerate(values)
        ]
        return [value for value in checked if value is not None]

    def images(self, folder: Path) -> tuple[Path, ...]:
        """The field `image`: a path or a list of paths, relative to `folder`."""
        value = self.need("image", _anything)
        if value is None:
            return ()
        if isinstance(value, list):
            if not value:
                self.reject("image", "is an empty list", "name at least one picture")
            names = self.each("image", value, text)
        else:
            name = self.check("image", value, text)
            names = [] if name is None else [name]
        if any("\0" in name for name in names):
            self.reject("image", "holds a zero byte, which no path can", "write the path again")
            return ()
        return tuple(as_on_disk(folder / name) for name in names)

    def choices(self) -> tuple[str, ...] | None:
        """The field `choices`: all answers there are, or None."""
        values = self.get("choices", _answers)
        if values is None:
            return None
        choices = self.each("choices", values, text)
        doubled = next((choice for choice in choices if choices.count(choice) > 1), None)
        if doubled is not None:
            self.reject("choices", f"{doubled!r} is there twice", "list every answer once")
        return tuple(choices)

    def boxes(self, field: str, check: BoxCheck = normalized_box) -> tuple[Box, ...]:
        """A field that holds a list of boxes; () where it is missing or null."""
        values = self.get(field, _boxes)
        return () if values is None else tuple(self.each(field, values, check))


def _checked(
    field: str,
    value: object,
    check: Callable[[object], T],
) -> T:
    try:
        return check(value)
    except FieldError as error:
        raise FieldError(error.reason, error.remedy, field) from error


def _anything(value: object) -> object:
    return value


def _answers(value: object) -> list[object]:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else kind_of(value)
        raise FieldError(f"must be a list of at least one answer, or null, not {kind}")
    return value


def _boxes(value: object) -> list[object]:
    if not isinstance(value, list):
        raise FieldError(f"must be a list of [x0, y0, x1, y1], not {kind_of(value)}")
    if _are_numbers(value, 4):
        raise FieldError(
            "is one box, and must be a list of boxes", "write it as [[x0, y0, x1, y1]]"
        )
    return value
