"""What hypothesis does to bytes, to JSON and to text: a few changes at drawn places.

May import: hypothesis.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Draw = st.DrawFn
# Where one value inside a JSON value stands: keys and indices from the top.
Path = tuple["str | int", ...]

# Lengths and numbers at which programs err.
NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64, 10**30, 10**400,
)  # fmt: skip
FLOATS = (0.5, -0.0, 1e-320, 1e308, 1.5, 1000.5, float("nan"), float("inf"), float("-inf"))
# Names of files, texts of code, of control, of templates and of expressions.
TEXTS = (
    "", " ", ".", "..", "/", "../secret", "../../secret", "../../../etc/passwd", "/etc/passwd",
    "/etc/hostname", "C:\\Windows\\win.ini", "\\\\host\\share\\x", "file:///etc/passwd", "a\0b",
    "http://127.0.0.1:9/x.png", "s3://bucket/x", "~", "~root/x", "con", "x" * 300, "x/" * 3000,
    "\ud800", "\u202e\u0000", "é" * 20, "e\u0301", "\ufeff{}", "\r\n", "\x1b[31m[bold]red[/]",
    "[/bold]", "<|image_pad|>", "<|lvr_start|>", "<|im_end|>", "%s%n", "{0.__class__}", "{{ 7*7 }}",
    "{% for i in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{% include '/etc' %}",
    "__import__('os').system('true')", "9^9^9^9", "((((((((((", "-" * 5000 + "1", "1e999999999",
    "nan", "inf", "None", "null", "true", "0x10", "1_000", "٣", "1e400", "(1/3)^(1/3)",
    "!!python/x", "&a [*a, *a]", "*a", "@", "`", "- - - -", "*", "?", "(a+)+$", "$(touch x)", "-x",
    "--help", "int8", "fp32", "uint64", "float8", "BF16", "U4", "lvr.json", "onnx/decoder.onnx",
)  # fmt: skip
KEYS = ("", "__class__", "version", "image", "id", "boxes", "shape", "x", "extends", "0", "\ud800")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(FLOATS),
    st.sampled_from(TEXTS),
    st.integers(-5, 70),
    st.floats(-2, 1200),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), inner, max_size=4),
    ),
    max_leaves=8,
)


# ---------------------------------------------------------------------------------------- bytes


@st.composite
def changed_bytes(draw: Draw, data: bytes, most: int = 4, near: int | None = None) -> bytes:
    """`data` with up to so many changes. near: only the first so many bytes are changed."""
    for _ in range(draw(st.integers(1, most))):
        data = _change(draw, data, near)
    return data


def _change(draw: Draw, data: bytes, near: int | None) -> bytes:
    end = min(len(data), near or len(data))
    place = draw(st.integers(0, max(end - 1, 0)))
    length = draw(st.sampled_from((1, 1, 2, 4, 8, 64, 1000)))
    before, rest = data[:place], data[place:]
    how = draw(
        st.sampled_from(("flip", "set", "number", "cut", "drop", "double", "insert", "move"))
    )
    if how == "flip" and rest:
        return before + bytes([rest[0] ^ (1 << draw(st.integers(0, 7)))]) + rest[1:]
    if how == "set":
        return (
            before
            + bytes([draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))]) * length
            + rest[length:]
        )
    if how == "number":
        packed = _packed(draw)
        return before + packed + rest[len(packed) :]
    if how == "cut":
        return before
    if how == "drop":
        return before + rest[length:]
    if how == "double":
        times = draw(st.sampled_from((2, 2, 3, 1000, 20000)))
        return before + rest[:length] * times + rest[length:]
    if how == "insert":
        return before + draw(st.binary(max_size=16)) + rest
    other = draw(st.integers(0, max(end - 1, 0)))
    return before + data[other : other + length] + rest[length:]


def _packed(draw: Draw) -> bytes:
    form = draw(st.sampled_from(("<H", ">H", "<I", ">I", "<Q", ">Q")))
    number = draw(st.sampled_from(NUMBERS)) % (1 << 8 * struct.calcsize(form))
    return struct.pack(form, number)


# ----------------------------------------------------------------------------------------- JSON


@st.composite
def changed_json(draw: Draw, value: Any, most: int = 3) -> Any:
    """A JSON value in which up to so many values are replaced, removed, added or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        value = _change_json(draw, value)
    return value


def _change_json(draw: Draw, value: Any) -> Any:
    paths = [path for path in _paths(value) if path]
    if not paths:
        return draw(values)
    path = draw(st.sampled_from(paths))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    how = draw(
        st.sampled_from(("replace", "replace", "replace", "remove", "other", "wrap", "rename"))
    )
    if how == "replace":
        holder[key] = draw(values)
    elif how == "remove":
        del holder[key]
    elif how == "other":
        holder[key] = _at(value, draw(st.sampled_from(paths)))
    elif how == "wrap":
        holder[key] = draw(st.sampled_from(([holder[key]], {"x": holder[key]}, [holder[key]] * 3)))
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from((*KEYS, *TEXTS[:20])))] = holder.pop(key)
    else:
        holder.insert(int(key), draw(values))
    # What was put within itself would be endless; written and read again it is a tree.
    return json.loads(json.dumps(value))


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return json.loads(json.dumps(value))


def _paths(value: Any, above: Path = ()) -> Iterator[Path]:
    yield above
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*above, key))
    elif isinstance(value, list):
        # Of long lists, such as merges of a tokenizer, the first and the last.
        for index in sorted({*range(min(len(value), 8)), *range(len(value))[-2:]}):
            yield from _paths(value[index], (*above, index))


def to_bytes(value: Any) -> bytes:
    """JSON as UTF-8, halves of surrogate pairs too where they are not escaped."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def json_file(draw: Draw, data: bytes) -> bytes:
    """A JSON file that was changed as a value, and now and then as bytes or by deep nesting."""
    how = draw(st.sampled_from(("value", "value", "value", "value", "bytes", "deep", "empty")))
    if how == "bytes":
        return bytes(draw(changed_bytes(data)))
    if how == "empty":
        return bytes(
            draw(st.sampled_from((b"", b"{}", b"[]", b"null", b"\xef\xbb\xbf{}", b"\xff\xfe")))
        )
    changed = to_bytes(draw(changed_json(json.loads(data))))
    if how == "deep":
        depth = draw(st.sampled_from((500, 20_000, 200_000)))
        ends = draw(st.sampled_from(((b"[", b"]"), (b'{"a":', b"}"))))
        place = changed.find(b":") + 1
        nested = ends[0] * depth + b"1" + ends[1] * depth
        changed = changed[:place] + nested + b"," + changed[place:]
        return changed if draw(st.booleans()) else nested
    return changed


@st.composite
def json_lines_file(draw: Draw, data: bytes) -> bytes:
    """A file of JSON lines, of which one or two are changed."""
    lines = data.splitlines()
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = draw(json_file(lines[place])) if _is_json(lines[place]) else lines[place]
    return (draw(st.sampled_from((b"\n", b"\n", b"\n", b"\r\n", b"\n\n"))).join(lines)) + draw(
        st.sampled_from((b"\n", b"\n", b""))
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# ----------------------------------------------------------------------------------------- text


@st.composite
def text_file(draw: Draw, data: bytes) -> bytes:
    """A text file in which words are replaced, or bytes are changed."""
    if draw(st.booleans()):
        return bytes(draw(changed_bytes(data)))
    words = data.split(b" ")
    for _ in range(draw(st.integers(1, 3))):
        word = draw(st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS).map(str)))
        words[draw(st.integers(0, len(words) - 1))] = word.encode("utf-8", "surrogatepass")
    return b" ".join(words)
