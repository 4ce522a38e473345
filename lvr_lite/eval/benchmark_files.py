"""Readers of public benchmarks as they are published: folders of pictures with CSV, JSONL, TSV or
parquet. May import: Pillow and what stands above `eval`.

    mmvp      Questions.csv (Index, Question, Options, Correct Answer), "MMVP Images/1.jpg" …;
              items 1 and 2, 3 and 4, … are pairs
    vstar     test_questions.jsonl (image, text, label, category, question_id), pictures beside it
    blink     a folder a subtask with val-*.parquet, or *.jsonl (idx, question, sub_task,
              image_1 … image_4, choices, answer)
    hrbench   hr_bench_4k and hr_bench_8k, .tsv or .parquet (index, question, answer, category,
              A, B, C, D, image, cycle_category): every question four times, its options rotated
              by one

Prompts are those of the paper's evaluation (arXiv 2509.24251), and so are the options' capital
letters.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PureWindowsPath

from PIL import Image

from lvr_lite.data.rows import FieldError, Row, has_lone_surrogate, plain_text
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.eval import score
from lvr_lite.eval.tables import Delimited, JsonLines, Parquet, Place, Table
from lvr_lite.model.images import open_for_model, read_picture

INSTRUCTION = "Answer with the option's letter from the given choices directly."
MMVP_COLUMNS = ("Index", "Question", "Options", "Correct Answer")
BLINK_COLUMNS = ("question", "choices", "answer", "image_1")
HRBENCH_COLUMNS = ("index", "question", "answer", "category", "A", "B", "C", "D", "image")

_PICTURE_NAME = re.compile(r"\.(?:jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)

Pictures = tuple[Image.Image, ...]
StoredRow = tuple[Table, Place]


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    sample: its answer is the letter, its choices are the options' words. Its pair names what is
        asked together: a pair of MMVP, the four rotations of HRBench. Its images are paths, or for
        pictures inside a data file where they stand.
    where: "file:line".
    pictures: opens them. Raises DataError, naming row and field.
    """

    sample: Sample
    where: str
    pictures: Callable[[], Pictures]

    def plain(self) -> Question:
        """The same without INSTRUCTION, which some models answer without a look."""
        question = self.sample.question.replace(INSTRUCTION, "").strip()
        return replace(self, sample=replace(self.sample, question=question))


@dataclass(frozen=True)
class Broken:
    """A row that cannot be asked. id: None where the row does not even tell that."""

    id: str | None
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"

    def to_json(self) -> dict[str, str | None]:
        return {"id": self.id, "where": self.where, "problem": self.problem}


def read_rows(name: str, folder: Path) -> Iterator[Question | Broken] | None:
    """Every row of a benchmark, in order; None where the folder lacks a file. Raises DataError
    where a file is damaged or lacks a column.
    """
    return _READERS[name](folder)


def _ask_all(
    table: Table, ask: Callable[[Row, Place], Question], key: str
) -> Iterator[Question | Broken]:
    """Every row of a table as a question. key: the field that names a row that cannot be asked."""
    for place, row in table.rows():
        if isinstance(row, FieldError):
            yield Broken(None, place.where, row.reason)
            continue
        try:
            yield ask(row, place)
        except FieldError as error:
            field = f"{error.field}: " if error.field else ""
            name = row.values.get(key)
            row_id = None if name in (None, "") else str(name)
            yield Broken(row_id, place.where, f"{field}{error.reason}")


# ----------------------------------------------------------------------------------------------
# checks of cells


def _cell(value: object) -> str:
    """A cell as plain text; a number counts as text."""
    if isinstance(value, dict | list):
        raise FieldError("must be text")
    words = str(value).strip()
    if has_lone_surrogate(words):
        raise FieldError("is not UTF-8")
    return plain_text(words)


def _path_below(value: object) -> str:
    """A picture's path below the folder of a benchmark."""
    name = _cell(value)
    if not is_below(name):
        raise FieldError(f"{name[:200]} leads out of the benchmark's folder")
    return name


def is_below(name: str) -> bool:
    """Whether a path, on any system, is relative and never goes up."""
    path = PureWindowsPath(name)
    return not path.anchor and ".." not in path.parts and "\0" not in name


def _options(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(str(v).strip() for v in value):
        raise FieldError("must be a list of two answers or more")
    return [plain_text(str(option)) for option in value]


def _letter(row: Row, field: str, options: Sequence[str]) -> str:
    """The right option's letter, of "(a)", "A" or "A."."""
    answer = row.require(field, _cell)
    letter = answer.strip("().: ").upper()
    letters = score.LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        raise FieldError(f"{answer!r} is not among the options ({', '.join(letters)})", field=field)
    return letter


def _with_letters(options: Sequence[str]) -> str:
    """One line an option, as the paper's prompts show them."""
    lettered = zip(score.LETTERS, options, strict=False)
    return "".join(f"{letter}. {option}\n" for letter, option in lettered)


# ----------------------------------------------------------------------------------------------
# the four benchmarks


def _mmvp(folder: Path) -> Iterator[Question | Broken] | None:
    path = folder / "Questions.csv"
    folders = [folder / name for name in ("MMVP Images", "MMVP_Images", "images")]
    images = next((images for images in folders if images.is_dir()), None)
    if not path.is_file() or images is None:
        return None
    return _ask_all(Delimited(path, ",", MMVP_COLUMNS), partial(_ask_mmvp, images), "Index")


def _ask_mmvp(images: Path, row: Row, place: Place) -> Question:
    index = row.require("Index", _cell)
    if not (index.isdecimal() and len(index) < 10 and int(index) >= 1):
        raise FieldError(f"{index!r} is no number from 1 on", field="Index")
    number = int(index)
    shown = row.require("Options", _cell)
    options = score.lettered_options(shown)
    if not options:
        raise FieldError(f"{row.values['Options']!r} shows no options (a) and (b)", field="Options")
    answer = _letter(row, "Correct Answer", options)
    shown = re.sub(
        r"\(([a-z])\)",
        lambda mark: f"{mark.group(1).upper()}.",
        shown,
    )
    names = [images / f"{number}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG")]
    picture = next((path for path in names if path.is_file()), names[0])
    pair = f"pair-{(number + 1) // 2}"
    sample = Sample(
        str(number),
        (picture,),
        f"{row.require('Question', _cell)}\nOptions:\n{shown}\n{INSTRUCTION}",
        answer,
        tuple(options),
        pair=pair,
    )
    return Question(sample, place.where, partial(_open_files, sample.images))


def _vstar(folder: Path) -> Iterator[Question | Broken] | None:
    path = folder / "test_questions.jsonl"
    if not path.is_file():
        return None
    return _ask_all(JsonLines(path), partial(_ask_vstar, folder), "question_id")


def _ask_vstar(folder: Path, row: Row, place: Place) -> Question:
    text = row.require("text", _cell)
    picture = folder / row.require("image", _path_below)
    options = score.lettered_options(text)
    if not options:
        raise FieldError("shows no options (A), (B) …", field="text")
    question = text if INSTRUCTION in text else f"{text}\n{INSTRUCTION}"
    kind = row.require("category", _cell)
    answer = _letter(row, "label", options)
    sample = Sample(
        f"{kind}-{row.require('question_id', _cell)}",
        (picture,),
        question,
        answer,
        tuple(options),
        type=kind,
    )
    return Question(sample, place.where, partial(_open_files, sample.images))


def _blink(folder: Path) -> Iterator[Question | Broken] | None:
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(place.name, path) for place in subfolders for path in _blink_files(place)]
    # One subtask's own folder may be given instead.
    files = files or [
        (path.stem if path.suffix == ".jsonl" else folder.name, path)
        for path in _blink_files(folder)
    ]
    if not files:
        return None
    return chain.from_iterable(_blink_subtask(subtask, path) for subtask, path in files)


def _blink_files(folder: Path) -> list[Path]:
    lines = sorted(p for p in folder.glob("*.jsonl") if not p.name.startswith("test"))
    return sorted(folder.glob("val*.parquet")) or lines


def _blink_subtask(subtask: str, path: Path) -> Iterator[Question | Broken]:
    parquet = path.suffix == ".parquet"
    table: Table = Parquet(path, BLINK_COLUMNS) if parquet else JsonLines(path)
    return _ask_all(table, partial(_ask_blink, subtask, table), "idx")


def _ask_blink(subtask: str, table: Table, row: Row, place: Place) -> Question:
    kind = str(row.values.get("sub_task") or subtask)
    options = row.require("choices", _options)
    more = [name for name in ("image_2", "image_3", "image_4") if row.values.get(name)]
    names = ["image_1", *more]
    text = row.require("question", _cell)
    images = tuple(
        _path_in_records(
            row.values.get(name),
            table.path,
            f"{place.where}:{name}",
        )
        for name in names
    )
    key = str(row.values.get("idx") or f"{kind}-{place.number}")
    answer = _letter(row, "answer", options)
    sample = Sample(
        key,
        images,
        f"{text}\nOptions:\n{_with_letters(options)}\n{INSTRUCTION}",
        answer,
        tuple(options),
        type=kind,
    )
    return Question(sample, place.where, partial(_open_fields, table, place, names))


def _hrbench(folder: Path) -> Iterator[Question | Broken] | None:
    paths = [*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
    rows: list[Question | Broken] = []
    for size in ("4K", "8K"):
        of_size = [path for path in paths if size.lower() in path.name.lower()]
        # Published as both; a TSV needs no pyarrow.
        files = [path for path in of_size if path.suffix == ".tsv"]
        files = files or [path for path in of_size if path.suffix == ".parquet"]
        rows += _HrbenchSize(size).rows(files)
    return iter(rows) if rows else None


class _HrbenchSize:
    """The rows of one picture size. Rotations of a question have one pair; a picture is stored in
    one of them.
    """

    def __init__(self, size: str) -> None:
        self.size = size
        # how often each rotation of each question came so far
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.pairs: dict[tuple[str, ...], str] = {}
        # of each pair the rows, which show one picture
        self.rotations: dict[str, list[StoredRow]] = {}
        self.by_index: dict[str, StoredRow] = {}

    def rows(self, paths: Sequence[Path]) -> Iterator[Question | Broken]:
        for path in paths:
            table: Table = (
                Delimited(path, "\t", HRBENCH_COLUMNS)
                if path.suffix == ".tsv"
                else Parquet(path, HRBENCH_COLUMNS)
            )
            yield from _ask_all(table, partial(self._ask, table), "index")

    def _ask(self, table: Table, row: Row, place: Place) -> Question:
        index = row.require("index", _cell)
        kind = row.require("category", _cell)
        options = [row.require(letter, _cell) for letter in "ABCD"]
        text = row.require("question", _cell)
        # Questions about different pictures may have the same words and options. They are told
        # apart by counting: the n-th one in each rotation.
        rotation = (text, *options, str(row.values.get("cycle_category", "")))
        question = (text, *sorted(options), str(self.counts[rotation]))
        pair = self.pairs.setdefault(question, f"{self.size} {len(self.pairs)}")
        self.counts[rotation] += 1
        self.rotations.setdefault(pair, []).append((table, place))
        self.by_index.setdefault(index, (table, place))
        sample = Sample(
            f"{self.size}-{index}",
            (Path(f"{place.where}:image"),),
            f"{text}\nOptions:\n{_with_letters(options)}{INSTRUCTION}",
            _letter(row, "answer", options),
            tuple(options),
            type=f"{self.size} {kind}",
            pair=pair,
        )
        open_shared = partial(_open_shared, (table, place), self.rotations[pair], self.by_index)
        return Question(sample, place.where, open_shared)


_READERS = {"mmvp": _mmvp, "vstar": _vstar, "blink": _blink, "hrbench": _hrbench}


# ----------------------------------------------------------------------------------------------
# pictures


def _path_in_records(value: object, file: Path, place: str) -> Path:
    """What the record of an answer calls a picture: its own path, or its place in a data file."""
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    named = isinstance(path, str) and _PICTURE_NAME.search(path)
    if isinstance(path, str) and named and file.suffix == ".jsonl":
        return _beside(file, path)
    return Path(place)


def _beside(file: Path, picture: str) -> Path:
    """A picture's path relative to a data file; or to the folder above it, since the file of a
    subtask may give paths from the benchmark's folder.
    """
    beside = file.parent / picture
    above = file.parent.parent / picture
    return above if above.is_file() and not beside.is_file() else beside


def _open_files(paths: Sequence[Path]) -> Pictures:
    try:
        return tuple(open_for_model(path) for path in paths)
    except DataError as error:
        raise DataError(f"image: {error}") from error


def _open_fields(table: Table, place: Place, names: Sequence[str]) -> Pictures:
    """The pictures of some fields of a row. A field after the first that is null is none."""
    fields = table.reread(place)
    present = [name for name in names if name == names[0] or fields.get(name) not in (None, "")]
    return tuple(
        _picture(
            fields.get(name),
            name,
            table.path,
        )
        for name in present
    )


def _open_shared(
    own: StoredRow, rotations: Sequence[StoredRow], by_index: dict[str, StoredRow]
) -> Pictures:
    """The picture of a row of HRBench: its own, that of the row whose index stands in its place, or
    that of another rotation of the question.
    """
    value = _stored_image(own)
    if isinstance(value, str) and len(value) < 16 and value.strip() in by_index:
        value = _stored_image(by_index[value.strip()])
    for other in rotations:
        if value not in (None, ""):
            break
        if other != own:
            value = _stored_image(other)
    return (_picture(value, "image", own[0].path),)


def _stored_image(row: StoredRow) -> object:
    table, place = row
    return table.reread(place).get("image")


def _picture(value: object, field: str, file: Path) -> Image.Image:
    """The picture of a field: bytes, base64, a path (`_beside`), or {"bytes", "path"} of these."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value in (None, "", b""):
        raise DataError(f"{field}: is empty, where a picture must be")
    if isinstance(value, str) and _PICTURE_NAME.search(value):
        if not is_below(value):
            raise DataError(f"{field}: {value[:200]} leads out of the benchmark's folder")
        return _open_files([_beside(file, value)])[0]
    if isinstance(value, str):
        code = re.sub(r"\s", "", value.split("base64,")[-1])
        try:
            value = base64.b64decode(code, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{field}: is neither a picture's path nor base64 ({error})") from error
    if not isinstance(value, bytes):
        raise DataError(f"{field}: must be a picture, not {type(value).__name__}")
    return read_picture(io.BytesIO(value), field)
