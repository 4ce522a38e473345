"""Public benchmarks as they are published: folders of pictures with CSV, JSONL, TSV or parquet. May
import: the core.

    mmvp      Questions.csv (Index, Question, Options, Correct Answer), "MMVP Images/1.jpg" …; items 1 and 2, 3 and 4, … are pairs
    vstar     test_questions.jsonl (image, text, label, category, question_id), pictures beside it
    blink     a folder a subtask with val-*.parquet, or *.jsonl (idx, question, sub_task, image_1 … image_4, choices, answer)
    hrbench   hr_bench_4k and hr_bench_8k, .tsv or .parquet (index, question, answer, category, A, B, C, D, image, cycle_category): every
              question four times, its options turned on by one

A row that cannot be asked is kept as `Broken`. Prompts are those of the paper's evaluation (arXiv
2509.24251), and so are the options' capital letters.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.eval import score
from lvr_lite.eval.tables import Delimited, Fields, Lines, Parquet, Place, Source
from lvr_lite.model.images import open_picture, read_picture

BENCHMARKS = ("mmvp", "vstar", "blink", "hrbench")
MAX_TOKENS = 64  # of an answer: a letter in a sentence
INSTRUCTION = "Answer with the option's letter from the given choices directly."
PICTURE = re.compile(r"\.(?:jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)
HOLDS = {
    "mmvp": 'Questions.csv and the folder "MMVP Images" (or MMVP_Images, or images)',
    "vstar": "test_questions.jsonl and the pictures that it names",
    "blink": "a folder for each subtask, such as Counting, with val-*.parquet or *.jsonl in it",
    "hrbench": "hr_bench_4k.tsv or hr_bench_8k.tsv, or both (or the same as .parquet)",
}


@dataclass(frozen=True)
class Row:
    """One question. sample: its answer is the letter, its choices the options' words, its pair what
    is asked together (a pair of MMVP, the four rotations of HRBench), its images paths, or for
    pictures inside a data file where they stand. where: "file:line".
    """

    sample: Sample
    where: str
    pictures: Callable[[], tuple[Image.Image, ...]]


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


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's rows, and those that cannot be asked, both in their order."""

    name: str
    folder: Path
    rows: list[Row]
    broken: list[Broken]

    def items(self) -> Iterator[tuple[Sample, Callable[[], tuple[Image.Image, ...]]]]:
        """Samples, and what opens their pictures: DataError, naming row and field, where that
        cannot be done.
        """
        return ((row.sample, row.pictures) for row in self.rows)

    def unopened(self, opened: Sequence[tuple[str, str]]) -> list[Broken]:
        """All that was not asked, given the rows whose pictures turned out not to open: (id,
        problem).
        """
        where = {row.sample.id: row.where for row in self.rows}
        return [
            *self.broken,
            *(Broken(sample, where[sample], problem) for sample, problem in opened),
        ]


def read(name: str, folder: Path | str, limit: int | None = None) -> Benchmark:
    """A benchmark's first `limit` rows, or all. Raises DataError, one line, where the folder lacks
    a file or no row can be asked.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--path {folder}: no such folder; it must hold {HOLDS[name]}")
    found = list(
        {"mmvp": _mmvp, "vstar": _vstar, "blink": _blink, "hrbench": _hrbench}[name](folder)
    )[:limit]
    rows: dict[str, Row] = {}
    broken: list[Broken] = []
    for row in found:
        if isinstance(row, Broken):
            broken.append(row)
        elif row.sample.id in rows:
            broken.append(
                Broken(
                    None,
                    row.where,
                    f"the id {row.sample.id} is already taken by {rows[row.sample.id].where}",
                )
            )
        else:
            rows[row.sample.id] = row
    benchmark = Benchmark(name, folder, list(rows.values()), broken)
    if not rows:
        raise none_readable(benchmark, broken)
    return benchmark


def none_readable(benchmark: Benchmark, broken: Sequence[Broken]) -> DataError:
    first = (
        f"none of {len(broken)} rows can be asked; the first: {broken[0]}"
        if broken
        else "the files hold no rows"
    )
    return DataError(f"--path {benchmark.folder}: {first}")


def grade(sample: Sample, answer: str) -> float:
    """1.0 where the answer chooses the right letter (`score.chosen_letter`), 0.0 otherwise."""
    return float(score.chosen_letter(answer, sample.choices or ()) == sample.answer)


# -----------------------------------------------------------------------------------------------------------------
# scores


def scores(name: str, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The benchmark's own scores first, each {"name", "n", "accuracy", "interval"}; `answers` as
    the `eval` JSON has them, with "pair".
    """
    if name == "mmvp":
        return [_share("single items", answers), _all_right("pairs, both right", answers, 2)]
    if name == "vstar":
        return [_share("all questions", answers)]
    if name == "blink":
        kinds = by_type(name, answers)
        mean, low, high = score.mean_of_shares(
            [(sum(a["score"] for a in answers if a["type"] == k), kinds[k]["n"]) for k in kinds]
        )
        return [
            _told("mean over subtasks", len(kinds), mean, low, high),
            _share("all questions", answers),
        ]
    found = []
    for size in sorted({a["type"].split()[0] for a in answers}):
        rows = [a for a in answers if a["type"].split()[0] == size]
        found += [
            _share(f"{size}, all rows", rows, turned=True),
            _all_right(f"{size}, all four rotations right", rows, 4),
        ]
    return found


def by_type(name: str, answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each category or subtask {"n", "accuracy", "interval"}."""
    kinds = {
        kind: [a for a in answers if a["type"] == kind]
        for kind in sorted({a["type"] for a in answers})
    }
    shares = {
        kind: _share("", of_kind, turned=name == "hrbench") for kind, of_kind in kinds.items()
    }
    return {
        kind: {k: share[k] for k in ("n", "accuracy", "interval")} for kind, share in shares.items()
    }


def _share(name: str, answers: Sequence[dict[str, Any]], turned: bool = False) -> dict[str, Any]:
    """turned: rows are turns of the same questions, which make the interval no narrower than one
    row a question would.
    """
    right, n = sum(a["score"] for a in answers), len(answers)
    mean, questions = right / max(1, n), len({a["pair"] for a in answers}) if turned else n
    return _told(name, n, mean, *score.wilson(mean * questions, questions))


def _all_right(name: str, answers: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    whole = score.together(((a["pair"], a["score"] == 1) for a in answers), size)
    return _told(
        name, len(whole), sum(whole) / max(1, len(whole)), *score.wilson(sum(whole), len(whole))
    )


def _told(name: str, n: int, mean: float, low: float, high: float) -> dict[str, Any]:
    return {
        "name": name,
        "n": n,
        "accuracy": round(mean, 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def _lvr(model: str, name: str, *by_steps: float) -> list[tuple[str, dict[str, float]]]:
    return [
        (f"{model}, {steps} steps", {name: share})
        for steps, share in zip((4, 8, 16), by_steps, strict=True)
    ]


_VSTAR, _BLINK = (
    ("all questions", "direct_attributes", "relative_position"),
    ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation"),
)
# Of arXiv 2509.24251, in percent, by the names of scores and types here. MMVP is scored there by
# single items, V* over 191 questions.
PUBLISHED: dict[str, list[tuple[str, dict[str, float]]]] = {
    "mmvp": [
        ("Qwen2.5-VL-7B", {"single items": 66.7}),
        ("7B, SFT, same data", {"single items": 65.7}),
        *_lvr("LVR-7B", "single items", 72.0, 71.7, 71.7),
        *_lvr("LVR-3B", "single items", 54.7, 56.0, 56.0),
        *_lvr("LVR-3B with RL", "single items", 55.3, 55.3, 58.0),
    ],
    "vstar": [
        ("Qwen2.5-VL-7B", dict(zip(_VSTAR, (78.5, 81.7, 73.7), strict=True))),
        ("7B, SFT, same data", dict(zip(_VSTAR, (79.1, 82.6, 73.7), strict=True))),
        ("LVR-7B, 4 steps", dict(zip(_VSTAR, (81.2, 84.4, 76.3), strict=True))),
        ("LVR-7B, 8 steps", dict(zip(_VSTAR, (81.7, 84.4, 77.6), strict=True))),
        ("LVR-7B, 16 steps", dict(zip(_VSTAR, (80.6, 81.7, 79.0), strict=True))),
        *_lvr("LVR-3B", "all questions", 64.9, 65.5, 66.5),
        *_lvr("LVR-3B with RL", "all questions", 65.5, 67.0, 66.5),
    ],
    "blink": [
        ("Qwen2.5-VL-7B", dict(zip(_BLINK, (66.7, 26.0, 52.0, 38.8, 87.4), strict=True))),
        ("7B, SFT, same data", dict(zip(_BLINK, (67.5, 26.7, 45.3, 33.6, 88.8), strict=True))),
        ("LVR-7B, 4 steps", dict(zip(_BLINK, (69.2, 28.7, 52.7, 42.5, 89.5), strict=True))),
        ("LVR-7B, 8 steps", dict(zip(_BLINK, (70.0, 29.3, 52.0, 42.5, 86.0), strict=True))),
        ("LVR-7B, 16 steps", dict(zip(_BLINK, (70.8, 27.3, 52.7, 41.8, 87.4), strict=True))),
    ],
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------
# the four benchmarks


class _Flaw(Exception):
    """What is wrong with a row, before it is known where the row stands."""


Stored = tuple[Source, Place]


def _mmvp(folder: Path) -> Iterator[Row | Broken]:
    path = folder / "Questions.csv"
    images = next(
        (folder / n for n in ("MMVP Images", "MMVP_Images", "images") if (folder / n).is_dir()),
        None,
    )
    if not path.is_file() or images is None:
        raise _lacks("mmvp", folder)

    def row(fields: Fields, place: Place) -> Row:
        index = _text(fields, "Index")
        if not index.isdecimal() or int(index) < 1:
            raise _Flaw(f"Index: {index!r} is no number from 1 on")
        options = score.lettered_options(_text(fields, "Options"))
        if not options:
            raise _Flaw(f"Options: {fields['Options']!r} shows no options (a) and (b)")
        answer = _answer(fields, "Correct Answer", options)
        shown = re.sub(
            r"\(([a-z])\)", lambda m: f"{m.group(1).upper()}.", fields["Options"].strip()
        )
        question = f"{_text(fields, 'Question')}\nOptions:\n{shown}\n{INSTRUCTION}"
        names = (images / f"{int(index)}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG"))
        picture = next((p for p in names if p.is_file()), images / f"{int(index)}.jpg")
        sample = Sample(
            str(int(index)),
            (picture,),
            question,
            answer,
            tuple(options),
            pair=f"pair-{(int(index) + 1) // 2}",
        )
        return Row(sample, place.where, partial(_open_files, sample.images))

    return _rows(
        Delimited(path, ",", ("Index", "Question", "Options", "Correct Answer")), row, "Index"
    )


def _vstar(folder: Path) -> Iterator[Row | Broken]:
    path = folder / "test_questions.jsonl"
    if not path.is_file():
        raise _lacks("vstar", folder)

    def row(fields: Fields, place: Place) -> Row:
        text, picture = _text(fields, "text"), folder / _text(fields, "image")
        options = score.lettered_options(text)
        if not options:
            raise _Flaw("text: shows no options (A), (B) …")
        question = text if INSTRUCTION in text else f"{text}\n{INSTRUCTION}"
        kind = _text(fields, "category")
        answer = _answer(fields, "label", options)
        sample = Sample(
            f"{kind}-{_text(fields, 'question_id')}",
            (picture,),
            question,
            answer,
            tuple(options),
            type=kind,
        )
        return Row(sample, place.where, partial(_open_files, sample.images))

    return _rows(Lines(path), row, "question_id")


def _blink(folder: Path) -> Iterator[Row | Broken]:
    def data_files(place: Path) -> list[Path]:
        return sorted(place.glob("val*.parquet")) or sorted(
            p for p in place.glob("*.jsonl") if not p.name.startswith("test")
        )

    found = [
        (place.name, path)
        for place in sorted(p for p in folder.iterdir() if p.is_dir())
        for path in data_files(place)
    ]
    found = found or [
        (path.stem if path.suffix == ".jsonl" else folder.name, path) for path in data_files(folder)
    ]
    if not found:
        raise _lacks("blink", folder)
    return chain.from_iterable(_blink_file(subtask, path) for subtask, path in found)


def _blink_file(subtask: str, path: Path) -> Iterator[Row | Broken]:
    source: Source = (
        Parquet(path, ("question", "choices", "answer", "image_1"))
        if path.suffix == ".parquet"
        else Lines(path)
    )

    def row(fields: Fields, place: Place) -> Row:
        kind = str(fields.get("sub_task") or subtask)
        options = fields.get("choices")
        if (
            not isinstance(options, list)
            or len(options) < 2
            or not all(str(o).strip() for o in options)
        ):
            raise _Flaw(
                "choices: is missing"
                if options is None
                else "choices: must be a list of two answers or more"
            )
        options = [_plain("choices", str(o)) for o in options]
        names = [f"image_{i}" for i in range(1, 5) if i == 1 or fields.get(f"image_{i}")]
        shown = "".join(
            f"{letter}. {option}\n" for letter, option in zip(score.LETTERS, options, strict=False)
        )
        question = f"{_text(fields, 'question')}\nOptions:\n{shown}\n{INSTRUCTION}"
        images = tuple(
            _shown_path(fields.get(name), path, f"{place.where}:{name}") for name in names
        )
        key = str(fields.get("idx") or f"{kind}-{place.number}")
        sample = Sample(
            key, images, question, _answer(fields, "answer", options), tuple(options), type=kind
        )
        return Row(sample, place.where, partial(_open_values, source, place, tuple(names)))

    return _rows(source, row, "idx")


HR_COLUMNS = ("index", "question", "answer", "category", "A", "B", "C", "D", "image")


def _hrbench(folder: Path) -> Iterator[Row | Broken]:
    files = [
        p
        for pattern in ("*", "*/*")
        for p in sorted(folder.glob(pattern))
        if p.suffix in (".tsv", ".parquet")
    ]
    found: list[Row | Broken] = []
    for size in ("4K", "8K"):
        of_size = [p for p in files if size.lower() in p.name.lower()]
        found += _hrbench_set(
            size, [p for p in of_size if p.suffix == ".tsv"] or of_size
        )  # published as both; a TSV needs no pyarrow
    if not found:
        raise _lacks("hrbench", folder)
    return iter(found)


def _hrbench_set(size: str, paths: Sequence[Path]) -> Iterator[Row | Broken]:
    turns: Counter[tuple[str, ...]] = Counter()
    groups: dict[tuple[str, ...], str] = {}
    mates: dict[str, list[Stored]] = {}  # by group: the rows that show the same picture
    by_index: dict[str, Stored] = {}

    def row(source: Source, fields: Fields, place: Place) -> Row:
        index, kind = _text(fields, "index"), _text(fields, "category")
        options, question = [_text(fields, letter) for letter in "ABCD"], _text(fields, "question")
        # Questions with the same words and options, about other pictures, are told apart by
        # counting: the n-th one in each turn.
        turn = (question, *options, str(fields.get("cycle_category", "")))
        group = groups.setdefault(
            (question, *sorted(options), str(turns[turn])), f"{size} {len(groups)}"
        )
        turns[turn] += 1
        mates.setdefault(group, []).append((source, place))
        by_index.setdefault(index, (source, place))
        shown = "".join(
            f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True)
        )
        answer = _answer(fields, "answer", options)
        sample = Sample(
            f"{size}-{index}", (Path(f"{place.where}:image"),), f"{question}\nOptions:\n{shown}{INSTRUCTION}", answer, tuple(options),
            type=f"{size} {kind}", pair=group,
        )  # fmt: skip
        return Row(
            sample, place.where, partial(_open_shared, (source, place), mates[group], by_index)
        )

    for path in paths:
        source: Source = (
            Delimited(path, "\t", HR_COLUMNS)
            if path.suffix == ".tsv"
            else Parquet(path, HR_COLUMNS)
        )
        yield from _rows(source, partial(row, source), "index")


def _lacks(name: str, folder: Path) -> DataError:
    return DataError(
        f"--path {folder}: is not {name} as it is published; the folder must hold {HOLDS[name]}"
    )


def _rows(source: Source, row: Callable[[Fields, Place], Row], key: str) -> Iterator[Row | Broken]:
    """Every row of a file through `row`. key: the field that names a row which cannot be asked."""

    def taken(place: Place, fields: Fields | str) -> Row | Broken:
        if isinstance(fields, str):
            return Broken(None, place.where, fields)
        try:
            return row(fields, place)
        except _Flaw as flaw:
            named = fields.get(key)
            return Broken(None if named in (None, "") else str(named), place.where, str(flaw))

    return (taken(place, fields) for place, fields in source.rows())


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if value is None or isinstance(value, dict | list):
        raise _Flaw(f"{name}: is missing" if value is None else f"{name}: must be text")
    return _plain(name, str(value).strip())


def _plain(name: str, text: str) -> str:
    if not text:
        raise _Flaw(f"{name}: is empty")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise _Flaw(f"{name}: is not UTF-8")
    if special := re.search(r"<\|\w+\|>", text):
        raise _Flaw(f"{name}: contains {special.group()}, which a model reads as a control token")
    return text


def _answer(fields: Fields, name: str, options: Sequence[str]) -> str:
    """The letter, of "(a)", "A" or "A."."""
    given = _text(fields, name)
    letter = given.strip("().: ").upper()
    letters = score.LETTERS[: len(options)]
    if len(letter) != 1 or letter not in letters:
        raise _Flaw(f"{name}: {given!r} is not among the options ({', '.join(letters)})")
    return letter


# -----------------------------------------------------------------------------------------------------------------
# pictures


def _shown_path(value: Any, file: Path, place: str) -> Path:
    """What an answer's record names a picture by: its own path, or where it stands in a data
    file.
    """
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    return (
        _beside(file, path)
        if isinstance(path, str) and PICTURE.search(path) and file.suffix == ".jsonl"
        else Path(place)
    )


def _beside(file: Path, picture: str) -> Path:
    """A picture's path relative to a data file, or to the folder above it: a subtask's file may
    tell paths from the benchmark's folder.
    """
    above = file.parent.parent / picture
    return (
        above
        if above.is_file() and not (file.parent / picture).is_file()
        else file.parent / picture
    )


def _open_files(paths: Sequence[Path]) -> tuple[Image.Image, ...]:
    try:
        return tuple(open_picture(path) for path in paths)
    except DataError as error:
        raise DataError(f"image: {error}") from error


def _open_values(source: Source, place: Place, names: Sequence[str]) -> tuple[Image.Image, ...]:
    """The pictures of some fields of a row; of fields after the first, those that are null are
    none.
    """
    fields = source.again(place)
    given = [name for name in names if name == names[0] or fields.get(name) not in (None, "")]
    return tuple(_picture(fields.get(name), name, source.path) for name in given)


def _open_shared(
    own: Stored, mates: Sequence[Stored], by_index: dict[str, Stored]
) -> tuple[Image.Image, ...]:
    """The picture of a row of HRBench: its own, that of the row whose index stands in its place, or
    of another turn of the question.
    """

    def stored(row: Stored) -> Any:
        source, place = row
        return source.again(place).get("image")

    value = stored(own)
    if isinstance(value, str) and len(value) < 16 and value.strip() in by_index:
        value = stored(by_index[value.strip()])
    others = (mate for mate in mates if mate != own)
    while value in (None, "") and (mate := next(others, None)) is not None:
        value = stored(mate)
    return (_picture(value, "image", own[0].path),)


def _picture(value: Any, name: str, file: Path) -> Image.Image:
    """The picture of a field of a data file: bytes, base64, a path (`_beside`), or {"bytes",
    "path"} of these.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value in (None, "", b""):
        raise DataError(f"{name}: is empty, where a picture must be")
    if isinstance(value, str) and PICTURE.search(value):
        return _open_files([_beside(file, value)])[0]
    if isinstance(value, str):
        try:
            value = base64.b64decode(re.sub(r"\s", "", value.split("base64,")[-1]), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{name}: is neither a picture's path nor base64 ({error})") from error
    if not isinstance(value, bytes):
        raise DataError(f"{name}: must be a picture, not {type(value).__name__}")
    return read_picture(io.BytesIO(value), name)
