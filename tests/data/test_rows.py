"""One reader of rows: it names every mistake of a row at once, or raises the first."""

from __future__ import annotations

import io
import math

import pytest

from lvr_lite.data.rows import FieldError, Row, json_lines, numbers, parse_line, plain_text, text


def test_all_mistakes_of_a_row_are_noted_with_their_fields() -> None:
    row = Row({"id": "", "question": "<|lvr|>", "answer": None, "boxes": [[0, 0, 1, 1], [0]]})
    assert row.need("id", text) is None
    assert row.need("question", plain_text) is None
    assert row.need("answer", plain_text) is None
    assert row.get("pair", text) is None
    assert row.boxes("boxes") == ((0.0, 0.0, 1.0, 1.0),)
    assert [(error.field, error.reason) for error in row.errors] == [
        ("id", "is empty"),
        ("question", "contains <|lvr|>, which a model reads as a control token"),
        ("answer", "is null"),
        ("boxes[1]", "must be four numbers [x0, y0, x1, y1], not [0]"),
    ]


def test_a_required_field_is_returned_or_named() -> None:
    row = Row({"question": "which", "answer": 3})
    assert row.require("question", plain_text) == "which"
    with pytest.raises(FieldError, match="must be text, not a number: write it in quotes") as wrong:
        row.require("answer", plain_text)
    assert wrong.value.field == "answer"
    with pytest.raises(FieldError, match="is missing") as missing:
        row.require("id", text)
    assert missing.value.field == "id"
    assert row.errors == []


def test_lines_that_hold_something_are_found_again_by_their_place() -> None:
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}'
    lines = list(json_lines(io.BytesIO(data)))
    assert [line.number for line in lines] == [1, 4]
    assert [parse_line(data[line.start : line.end]) for line in lines] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff", "not UTF-8 (byte 0xff)"),
        (b'{"a": ', "not valid JSON (Expecting value at column 7)"),
        (b"[" * 200_000, "not valid JSON ("),
    ],
)
def test_a_line_that_is_no_value_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(FieldError) as wrong:
        parse_line(line)
    assert wrong.value.reason.startswith(reason)


def test_numbers_are_exactly_so_many_and_a_boolean_is_none() -> None:
    assert numbers([1, 2.5, 10**400], 3) == [1.0, 2.5, math.inf]
    assert numbers(["1", "2.5"], 2) == [1.0, 2.5]
    for wrong in ([1, 2], [1, 2, True], [1, 2, "three"], "123", None):
        with pytest.raises(FieldError, match="must be 3 numbers"):
            numbers(wrong, 3)
