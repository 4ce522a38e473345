"""Samples: what they hold, the two file formats they are read from, and every check of them. May
import: the standard library and the core.

    project JSONL     one object a line: {"id", "image": path or [paths], "question", "answer", "choices", "boxes", "type", "pair"}
    official LVR      one JSON list of {"dataset", "split", "question_id", "image", "conversations", "bboxes"} (arXiv 2509.24251)

Which one a file is, its first character says: "[" is the list. Paths of pictures are relative to
the file. Other fields may be there and are left alone, unless their names look like a field that is
meant (`bboxes` in the JSONL).
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

from lvr_lite.data.boxes import Box
from lvr_lite.errors import DataError

REMEMBERED = 1 << 14  # pictures of which it is known whether they are there


@dataclass(frozen=True)
class Sample:
    """One question with its pictures.

    images: paths; empty where the picture is kept in memory. choices: all answers there are, or
    None. boxes: the regions of the first picture that the question is about, normalized xyxy. type:
    kind of question, for accuracy by type. pair: a name that two samples share which differ in a
    detail.
    """

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    choices: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] = ()
    type: str | None = None
    pair: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a data file. line: counted from 1, or None; item: place in an official
    list, counted from 1, or None. note: worth knowing, but nothing that training would get
    wrong.
    """

    file: Path
    field: str
    message: str
    line: int | None = None
    item: int | None = None
    note: bool = False

    def __str__(self) -> str:
        where = (
            f"{self.file}"
            + (f":{self.line}" if self.line else "")
            + (f": item {self.item}" if self.item else "")
        )
        where += ": note" if self.note else ""
        return (
            f"{where}: {self.field}: {self.message}" if self.field else f"{where}: {self.message}"
        )


def read_samples(path: Path | str, need_boxes: bool = False) -> list[Sample]:
    """All samples of a file in either format. need_boxes: a sample without boxes is a problem.

    Raises DataError with the first problem: file, line or item, field, what is wrong and what to
    do.
    """
    samples, problems = check_samples(path, need_boxes)
    _refuse(path, problems)
    return samples


class Picked(Sequence[Sample]):
    """`count` samples, each made or read when it is asked for."""

    def __init__(self, sample: Callable[[int], Sample], count: int) -> None:
        self._sample, self._count = sample, count

    @classmethod
    def of(cls, samples: Sequence[Sample], places: Sequence[int]) -> Picked:
        """Those of `samples` at these places."""
        return cls(lambda i: samples[int(places[i])], len(places))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(i) for i in range(*index.indices(self._count))]
        return self._sample(range(self._count)[index])


class Samples(Picked):
    """All samples of a file, each read from it again when it is asked for: in memory a million take
    some 25 MB. Those of an official list, which is one JSON value, are kept.

    pictures: a number of each sample's pictures, the same for the same paths. boxed: whether each
    has boxes. Raises DataError as `read_samples` does, and where the file is changed meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        index = _Index(path, False, path.parent)
        index.run()
        _refuse(path, index.problems)
        self._starts, self._ends = index.starts, index.ends
        self.pictures, self.boxed = index.pictures, index.boxed
        super().__init__(
            index.samples.__getitem__ if index.samples else self._read, len(self.boxed)
        )

    def _read(self, index: int) -> Sample:
        with self._path.open(
            "rb"
        ) as file:  # opened each time: workers that share a file share its position, too
            file.seek(self._starts[index])
            line = file.read(self._ends[index] - self._starts[index])
        try:
            sample, flaws = _from_line(json.loads(line.decode("utf-8-sig")), self._path.parent, 0)
        except ValueError:
            sample, flaws = None, []
        if sample is None or flaws:
            raise DataError(f"{self._path}: was changed while it was read; start again")
        return sample


def _refuse(path: Path | str, problems: list[Problem]) -> None:
    if problems:
        more = (
            f" ({len(problems) - 1} more: lvr-lite data validate {path} lists all)"
            if len(problems) > 1
            else ""
        )
        raise DataError(f"{problems[0]}{more}")


def check_samples(path: Path | str, need_boxes: bool = False) -> tuple[list[Sample], list[Problem]]:
    """The good samples of a file and all problems that show without opening pictures, in the order
    of the file.
    """
    checks = _checked(Path(path), need_boxes)
    return checks.samples, checks.problems


def placed_samples(
    path: Path, images: Path | None = None
) -> tuple[list[tuple[Sample, int | None, int | None]], list[Problem]]:
    """As `check_samples`, each good sample with its line or item. images: the folder that paths are
    relative to, if not the file's.
    """
    checks = _checked(path, images=images)
    return [
        (sample, *place) for sample, place in zip(checks.samples, checks.places, strict=True)
    ], checks.problems


def _checked(path: Path, need_boxes: bool = False, images: Path | None = None) -> _Checks:
    checks = _Checks(path, need_boxes, images or path.parent)
    checks.run()
    return checks


def sample_json(sample: Sample, folder: Path) -> dict[str, Any]:
    """A sample as an object of the project's JSONL, its pictures relative to `folder`, the
    file's.
    """
    paths = [Path(os.path.relpath(p, folder)).as_posix() for p in sample.images]
    return {
        "id": sample.id,
        "image": paths[0] if len(paths) == 1 else paths,
        "question": sample.question,
        "answer": sample.answer,
        "choices": list(sample.choices) if sample.choices is not None else None,
        "boxes": [list(box) for box in sample.boxes],
        "type": sample.type,
        "pair": sample.pair,
    }


_LOOKALIKES = {
    "bboxes": "boxes",
    "bboxs": "boxes",
    "bbox": "boxes",
    "box": "boxes",
    "images": "image",
    "image_path": "image",
    "options": "choices",
}
_SPECIAL = re.compile(
    r"<\|\w+\|>"
    # the image token, the latent markers, the chat's own: as text they would be read as what they stand
    # for
)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class Flaw(Exception):
    """A problem of one field, before file and line are known."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field, self.message = field, message


class _Checks:
    """One pass over one file: collects good samples and problems."""

    def __init__(self, path: Path, need_boxes: bool, images: Path) -> None:
        self.path, self.need_boxes, self.images = path, need_boxes, images
        self.samples: list[Sample] = []
        self.places: list[tuple[int | None, int | None]] = []  # line and item of each of them
        self.problems: list[Problem] = []
        self.seen: set[int] = set()  # hashes of ids
        self.firsts: dict[str, str] = {}  # id -> where it is first, once an id came twice
        self.exists: dict[Path, bool] = {}  # of pictures that were met lately

    def problem(
        self, field: str, message: str, line: int | None = None, item: int | None = None
    ) -> None:
        self.problems.append(Problem(self.path, field, message, line, item))

    def run(self) -> None:
        try:
            with self.path.open("rb") as file:
                first = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
                file.seek(0)
                self.official(file.read()) if first == b"[" else self.lines(file)
        except OSError as error:
            self.problem(
                "", f"cannot be read ({error.strerror or error}); name a JSONL file of samples"
            )

    def decoded(self, data: bytes, line: int) -> str | None:
        """Text of bytes that begin at `line`, or None with a problem noted."""
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            here = line + data[: error.start].count(b"\n")
            self.problem(
                "", f"not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8", line=here
            )
            return None

    def lines(self, file: BinaryIO) -> None:
        """The lines of a file, one in memory at a time."""
        end, blank = 0, True
        for number, data in enumerate(file, 1):
            begin, end = end, end + len(data)
            if not data.strip(b"\xef\xbb\xbf \t\r\n\v\f"):
                continue
            blank = False
            line = self.decoded(data, number)
            if line is None:
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.problem(
                    "",
                    f"not valid JSON ({_json_reason(error)}); every line must be one whole object",
                    line=number,
                )
                continue
            self.take(item, _from_line, line=number, extent=(begin, end))
        if blank:
            self.problem("", "empty; it must hold one sample a line")

    def official(self, data: bytes) -> None:
        text = self.decoded(data, 1)
        if text is None:
            return
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problem(
                "",
                f"not a valid JSON list ({_json_reason(error)}); mend or write it again",
                line=getattr(error, "lineno", None),
            )
            return
        if not items:
            self.problem("", "an empty list; it must hold samples")
        for number, item in enumerate(items, 1):
            self.take(item, _from_official, item=number)

    def take(
        self,
        data: Any,
        convert: Any,
        line: int | None = None,
        item: int | None = None,
        extent: tuple[int, int] = (0, 0),
    ) -> None:
        """One object of the file, bytes `extent` of it: a sample more, or its problems."""
        if not isinstance(data, dict):
            self.problem(
                "", f"must be an object with the fields of a sample, not {_kind(data)}", line, item
            )
            return
        sample, flaws = convert(data, self.images, line or item)
        flaws += self.surroundings(sample) if sample is not None else []
        for flaw in flaws:
            self.problem(flaw.field, flaw.message, line, item)
        if sample is not None and not flaws:
            self.keep(sample, line, item, extent)

    def keep(
        self, sample: Sample, line: int | None, item: int | None, extent: tuple[int, int]
    ) -> None:
        self.samples.append(sample)
        self.places.append((line, item))

    def surroundings(self, sample: Sample) -> list[Flaw]:
        """What can only be checked beside the other samples and the disk."""
        flaws = []
        if hash(sample.id) in self.seen:
            flaws.append(
                Flaw(
                    "id",
                    f"{sample.id!r} is already taken by {self.first_with(sample.id)}; give every sample its own",
                )
            )
        self.seen.add(hash(sample.id))
        for path in sample.images:
            if path not in self.exists:
                if len(self.exists) >= REMEMBERED:
                    self.exists.clear()
                self.exists[path] = path.is_file()
            if not self.exists[path]:
                flaws.append(
                    Flaw(
                        "image",
                        f"{path} does not exist; paths are relative to the data file's folder",
                    )
                )
        if self.need_boxes and not sample.boxes:
            flaws.append(
                Flaw(
                    "boxes",
                    f"sample {sample.id!r} has none, and they are needed here; add the regions that its question is about",
                )
            )
        return flaws

    def first_with(self, name: str) -> str:
        """Where the first sample of this id is. The file is read once more for all: ids that come
        twice are rare.
        """
        if not self.firsts:
            text = self.path.read_bytes().decode("utf-8-sig", errors="replace")
            official = text.lstrip().startswith("[")
            for number, item in enumerate(
                json.loads(text) if official else map(_loaded, text.split("\n")), 1
            ):
                if isinstance(item, dict):
                    found = (_from_official if official else _from_line)(item, self.images, number)[
                        0
                    ]
                    if found is not None:
                        self.firsts.setdefault(
                            found.id, f"{'item' if official else 'line'} {number}"
                        )
        return self.firsts[name]


class _Index(_Checks):
    """A pass that keeps of each line where it is, what pictures it names, and whether it has
    boxes.
    """

    def __init__(self, path: Path, need_boxes: bool, images: Path) -> None:
        super().__init__(path, need_boxes, images)
        self.starts, self.ends, self.pictures, self.boxed = (
            array("q"),
            array("q"),
            array("q"),
            bytearray(),
        )

    def keep(
        self, sample: Sample, line: int | None, item: int | None, extent: tuple[int, int]
    ) -> None:
        if item is not None:
            super().keep(sample, line, item, extent)
        else:
            self.starts.append(extent[0])
            self.ends.append(extent[1])
        self.pictures.append(hash(sample.images))
        self.boxed.append(bool(sample.boxes))


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_reason(error: Exception) -> str:
    return (
        f"{error.msg} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else f"{error}"
    )


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]


class Reader:
    """Takes checked fields out of one object; notes a flaw for each that is wrong and goes on."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.flaws: list[Flaw] = []

    def flaw(self, field: str, message: str) -> None:
        self.flaws.append(Flaw(field, message))

    def get(self, field: str, needed: bool) -> Any:
        value = self.data.get(field)
        if value is None and needed:
            self.flaw(
                field,
                "is null; it must be given"
                if field in self.data
                else "is missing; every sample needs it",
            )
        return value

    def text(self, field: str, needed: bool = True) -> str:
        value = self.get(field, needed)
        return "" if value is None else self.checked_text(field, value)

    def checked_text(self, field: str, value: Any) -> str:
        if not isinstance(value, str):
            self.flaw(field, f"must be text, not {_kind(value)}: write it in quotes")
        elif not value.strip():
            self.flaw(field, "is empty; write its text or remove the sample")
        elif not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
            self.flaw(
                field,
                "holds half of a surrogate pair, which is no character; write the file again as UTF-8",
            )
        else:
            return value
        return ""

    def plain_text(self, field: str, value: Any) -> str:
        """Text that a model reads as text: nothing in it may stand for something else."""
        text = self.checked_text(field, value)
        if special := _SPECIAL.search(text):
            self.flaw(
                field,
                f"contains {special.group()}, which a model reads as a control token: leave it out",
            )
        return text

    def images(self, folder: Path) -> tuple[Path, ...]:
        value = self.get("image", needed=True)
        if value is None:
            return ()
        paths = value if isinstance(value, list) else [value]
        if not paths:
            self.flaw("image", "is an empty list; name at least one picture")
        names = [
            self.checked_text(f"image[{i}]" if isinstance(value, list) else "image", p)
            for i, p in enumerate(paths)
        ]
        if any("\0" in name for name in names):
            self.flaw("image", "holds a zero byte, which no path can; write the path again")
            return ()
        return tuple(folder / name for name in names if name)

    def choices(self) -> tuple[str, ...] | None:
        value = self.get("choices", needed=False)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            self.flaw(
                "choices",
                f"must be a list of at least one answer, or null, not {'an empty list' if value == [] else _kind(value)}",
            )
            return None
        found = tuple(self.checked_text(f"choices[{i}]", c) for i, c in enumerate(value))
        doubled = next((c for c in found if c and found.count(c) > 1), None)
        if doubled is not None:
            self.flaw("choices", f"{doubled!r} is there twice; list every answer once")
        return found

    def boxes(self, field: str) -> tuple[Box, ...]:
        value = self.get(field, needed=False)
        if value is None:
            return ()
        if not isinstance(value, list):
            self.flaw(field, f"must be a list of [x0, y0, x1, y1], not {_kind(value)}")
            return ()
        boxes = [self.box(f"{field}[{i}]", box) for i, box in enumerate(value)]
        return tuple(b for b in boxes if b is not None)

    def box(self, field: str, box: Any) -> Box | None:
        if (
            not isinstance(box, list)
            or len(box) != 4
            or any(isinstance(v, bool) or not isinstance(v, int | float) for v in box)
        ):
            self.flaw(field, f"must be four numbers [x0, y0, x1, y1], not {json.dumps(box)[:60]}")
            return None
        shown = f"[{', '.join(str(v)[:12] for v in box)}]"
        x0, y0, x1, y1 = box
        if any(v != v for v in box):
            self.flaw(field, f"{shown} holds NaN; write the box again")
        elif max(box) > 1.5:
            self.flaw(
                field,
                f"{shown} looks like pixels; divide x by the picture's width and y by its height (as shown upright)",
            )
        elif min(box) < 0 or max(box) > 1:
            self.flaw(
                field, f"{shown} lies outside the picture; coordinates must be between 0 and 1"
            )
        elif x0 > x1 or y0 > y1:
            self.flaw(
                field, f"{shown} is inverted; write x0, y0 (upper left) before x1, y1 (lower right)"
            )
        elif x0 == x1 or y0 == y1:
            self.flaw(field, f"{shown} is empty; width and height must be more than 0")
        else:
            return (float(x0), float(y0), float(x1), float(y1))
        return None


Converted = tuple[Sample | None, list[Flaw]]


def _from_line(data: dict[str, Any], folder: Path, _: int) -> Converted:
    """An object of the project's JSONL."""
    read = Reader(data)
    for wrong, right in _LOOKALIKES.items():
        if wrong in data:
            read.flaw(
                wrong,
                f"is not a field here; {right!r} is meant, so rename it{' (normalized xyxy)' if right == 'boxes' else ''}",
            )
    sample_id, images = read.text("id"), read.images(folder)
    question, answer = (
        read.plain_text(f, v) if (v := read.get(f, needed=True)) is not None else ""
        for f in ("question", "answer")
    )
    choices, boxes = read.choices(), read.boxes("boxes")
    if choices is not None and answer and answer not in choices:
        read.flaw(
            "answer",
            f"{answer!r} is not among the choices ({', '.join(choices)[:80]}); write it as it stands there",
        )
    kind, pair = read.text("type", needed=False) or None, read.text("pair", needed=False) or None
    return (
        None
        if read.flaws
        else Sample(sample_id, images, question, answer, choices, boxes, kind, pair)
    ), read.flaws


def _from_official(data: dict[str, Any], folder: Path, number: int) -> Converted:
    """An item of the official LVR list. Its id is dataset-split-question_id, of what there is; its
    type is the dataset.
    """
    read = Reader(data)
    names = [
        str(data[f]) for f in ("dataset", "split", "question_id") if data.get(f) not in (None, "")
    ]
    sample_id = (
        "-".join(names)
        if data.get("question_id") not in (None, "")
        else "-".join([*names, f"item{number}"])
    )
    images, boxes = read.images(folder), read.boxes("bboxes")
    human, gpt = _turns(read)
    question, answer = (
        _official_question(read, human, len(images)),
        _official_answer(read, gpt, data.get("bboxes") or []),
    )
    kind = str(data["dataset"]) if data.get("dataset") else None
    return (
        None if read.flaws else Sample(sample_id, images, question, answer, None, boxes, kind)
    ), read.flaws


def _turns(read: Reader) -> tuple[str, str]:
    """The texts of the two turns; "" with a flaw noted where they are not there."""
    turns = read.get("conversations", needed=True)
    if turns is None:
        return "", ""
    if not isinstance(turns, list) or [
        t.get("from") if isinstance(t, dict) else None for t in turns
    ] != ["human", "gpt"]:
        read.flaw(
            "conversations",
            "must be two turns, from human and then from gpt; split longer conversations into several items",
        )
        return "", ""
    human, gpt = (
        read.checked_text(f"conversations[{i}].value", turn.get("value"))
        for i, turn in enumerate(turns)
    )
    return human, gpt


def _official_question(read: Reader, human: str, pictures: int) -> str:
    if not human:
        return ""
    field, question = "conversations[0].value", re.sub(r"^(\s*<image>)+", "", human).strip()
    marks = human.count("<image>")
    if "<image>" in question:
        read.flaw(field, "has <image> after the text; put all <image> before the question")
    elif marks and marks != pictures:
        read.flaw(field, f"has {marks} <image> for {pictures} pictures; write one for each")
    return read.plain_text(field, question)


def _official_answer(read: Reader, gpt: str, boxes: Any) -> str:
    """What stands between <answer> and </answer>, or, without them, the whole text but <lvr>."""
    if not gpt:
        return ""
    field, places = "conversations[1].value", gpt.count("<lvr>")
    if isinstance(boxes, list) and places != len(boxes):
        read.flaw(field, f"has {places} <lvr> for {len(boxes)} boxes in bboxes; write one for each")
    found = _ANSWER.search(gpt)
    return read.plain_text(field, (found.group(1) if found else gpt.replace("<lvr>", "")).strip())
