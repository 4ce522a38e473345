"""Public benchmarks in small: sets in each published format, scores worked out by hand, rows that
are broken, runs that were stopped.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, UsageError
from lvr_lite.eval import benchmarks, score
from lvr_lite.eval.benchmark_files import Question
from lvr_lite.eval.comparing import compare
from lvr_lite.eval.plan import Plan
from lvr_lite.eval.report import show
from lvr_lite.eval.statistics import bootstrap_mean, bootstrap_ratio, grouped
from lvr_lite.eval.suite import exact, lettered
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.families import Grid
from tests.command_line import Call
from tests.fakes import Around, Table, never

INSTRUCTION = "Answer with the option's letter from the given choices directly."


def jpeg(
    colour: tuple[int, int, int] = (90, 0, 0),
    size: tuple[int, int] = (56, 28),
    turned: bool = False,
) -> bytes:
    """turned: stored on its side, with the orientation that sets it upright."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6 if turned else 1
    Image.new("RGB", size, colour).save(out, "JPEG", exif=exif)
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# the published formats


def write_mmvp(
    folder: Path, count: int = 6, images: str = "MMVP Images", header: str = "Index"
) -> Path:
    """Right are (a), (b), (a), …"""
    (folder / images).mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([header, "Question", "Options", "Correct Answer"])
        for i in range(1, count + 1):
            (folder / images / f"{i}.jpg").write_bytes(jpeg((i, 0, 0)))
            rows.writerow(
                [
                    i,
                    f'Is door no. {i}, the "red" one, open?',
                    "(a) Open (b) Closed",
                    "(a)" if i % 2 else "(b)",
                ]
            )
    return folder


def write_vstar(
    folder: Path,
    categories: Sequence[str] = ("direct_attributes",) * 3 + ("relative_position",) * 2,
) -> Path:
    """Right are A, B, C, D, A."""
    lines = []
    for i, category in enumerate(categories):
        (folder / category).mkdir(parents=True, exist_ok=True)
        (folder / category / f"sa_{i}.jpg").write_bytes(jpeg())
        options = "(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather"
        text = f"What is thing {i} made of?\n{options}\n{INSTRUCTION}"
        lines.append(
            {
                "image": f"{category}/sa_{i}.jpg",
                "text": text,
                "label": "ABCDA"[i],
                "category": category,
                "question_id": i,
            }
        )
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def blink_rows(subtask: str, count: int, pictures: int) -> list[dict[str, Any]]:
    """Right are (A), (B), (A), …"""
    return [
        {
            "idx": f"val_{subtask}_{i}",
            "question": f"{subtask} {i}: which one?",
            "sub_task": subtask,
            "choices": ["the left", "the right"],
            "answer": "(B)" if i % 2 else "(A)",
            "prompt": "not asked",
            **{
                f"image_{k}": {"bytes": jpeg((i, k, 0), (28 * k, 28)), "path": None}
                if k <= pictures
                else None
                for k in range(1, 5)
            },
        }
        for i in range(count)
    ]


def write_blink(folder: Path, counts: dict[str, tuple[int, int]], form: str = "parquet") -> Path:
    """counts: items and pictures of each subtask."""
    for subtask, (count, pictures) in counts.items():
        (folder / subtask).mkdir(parents=True)
        rows = blink_rows(subtask, count, pictures)
        if form == "parquet":
            write_parquet(folder / subtask / "val-00000-of-00001.parquet", rows)
            continue
        for row in rows:
            for name in [n for n in row if n.startswith("image") and row[n]]:
                path = folder / subtask / f"{row['idx']}_{name}.jpg"
                path.write_bytes(row[name]["bytes"])
                row[name] = path.name
        (folder / subtask / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = list(rows[0])
    columns = {
        n: pa.array([r[n] for r in rows], picture if n.startswith("image_") else None)
        for n in names
    }
    pyarrow.parquet.write_table(pa.table(columns), path)


COLOURS = ("red", "blue", "green", "white")


def hr_rows(questions: int, start: int = 0, once: bool = False) -> list[dict[str, Any]]:
    """Each question four times, its options turned on by one; the right answer is red. once: the
    picture in the first of the four alone.
    """
    rows = []
    for q in range(questions):
        for turn in range(4):
            options = COLOURS[turn:] + COLOURS[:turn]
            rows.append(
                {
                    "index": start + 4 * q + turn,
                    "question": f"What colour is car {start + q}?",
                    "answer": "ABCD"[options.index("red")],
                    "category": "cross" if q % 2 else "single",
                    **dict(zip("ABCD", options, strict=True)),
                    "cycle_category": turn,
                    "image": ""
                    if once and turn
                    else base64.b64encode(jpeg((q, 0, 0), (28 * (q + 1), 28))).decode(),
                }
            )
    return rows


def write_hr(folder: Path, **sets: list[dict[str, Any]]) -> Path:
    """sets: rows by "4k" and "8k"."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, rows in sets.items():
        with (folder / f"hr_bench{size}.tsv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "mmvp": write_mmvp,
    "vstar": write_vstar,
    "blink": lambda folder: write_blink(folder, {"Counting": (2, 1), "Jigsaw": (3, 3)}, "jsonl"),
    "hrbench": lambda folder: write_hr(folder, _4k=hr_rows(2), _8k=hr_rows(1, 100)),
}


# --------------------------------------------------------------------------------------------------
# answering


def table(benchmark: benchmarks.Benchmark, answers: Sequence[str], latent_steps: int = 0) -> Table:
    """A runtime that says the given letters, in the order of the rows."""
    return Table(
        dict(zip((row.sample.question for row in benchmark.rows), answers, strict=True)),
        latent_steps,
    )


def run(name: str, folder: Path, answers: Sequence[str], **plan: Any) -> dict[str, Any]:
    model = table(benchmarks.read(name, folder), answers)
    return compare("tiny", [], Plan(name, path=str(folder), **plan), lambda _: model)


def named(result: dict[str, Any]) -> dict[str, tuple[int, float]]:
    return {one["name"]: (one["n"], one["accuracy"]) for one in result["scores"]}


def shown(result: dict[str, Any]) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=140))
    return out.getvalue()


def test_mmvp_is_scored_by_single_items_and_by_pairs_each_under_its_name(tmp_path: Path) -> None:
    result = run("mmvp", write_mmvp(tmp_path / "m"), ["A", "(b)", "A. Open", "A", "B", "A"])
    assert named(result) == {"single items": (6, 0.5), "pairs, both right": (3, 0.3333)}
    assert result["accuracy"] == 0.5
    assert result["pair_accuracy"] == pytest.approx(1 / 3)
    assert result["n"] == 6
    assert result["of"] == 6
    assert result["scores"][0]["interval"] == [round(v, 4) for v in score.wilson(3, 6)]
    text = shown(result)
    for part in (
        "single items",
        "pairs, both right",
        "50.0 [18.8, 81.2]",
        "Qwen2.5-VL-7B, published",
        "66.7",
        "2509.24251",
    ):
        assert part in text


def test_vstar_is_scored_by_category(tmp_path: Path) -> None:
    result = run("vstar", write_vstar(tmp_path / "v"), ["A", "B", "leather", "D", "B"])
    assert named(result) == {"all questions": (5, 0.6)}
    assert {k: (v["n"], v["accuracy"]) for k, v in result["by_type"].items()} == {
        "direct_attributes": (3, 0.6667),
        "relative_position": (2, 0.5),
    }
    assert result["pair_accuracy"] is None
    assert "81.7" in shown(result)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_blink_is_scored_by_subtask_and_by_the_mean_over_subtasks(
    form: str, tmp_path: Path
) -> None:
    folder = write_blink(tmp_path / "b", {"Counting": (2, 1), "Jigsaw": (4, 3)}, form)
    result = run("blink", folder, ["A", "B", "A", "A", "B", "A"])
    assert {k: (v["n"], v["accuracy"]) for k, v in result["by_type"].items()} == {
        "Counting": (2, 1.0),
        "Jigsaw": (4, 0.25),
    }
    assert named(result) == {"mean over subtasks": (2, 0.625), "all questions": (6, 0.5)}
    assert [len(row.pictures()) for row in benchmarks.read("blink", folder).rows] == [
        1,
        1,
        3,
        3,
        3,
        3,
    ]


@pytest.mark.parametrize("once", [False, True])
def test_hrbench_is_scored_by_rows_and_by_rotations_of_each_set_apart(
    once: bool, tmp_path: Path
) -> None:
    folder = write_hr(tmp_path / "h", _4k=hr_rows(2, once=once), _8k=hr_rows(1, 100, once))
    right = [row["answer"] for row in hr_rows(1)]
    assert right == ["A", "D", "C", "B"]
    result = run("hrbench", folder, [*right, "A", "A", "A", "A", "D", "D", "D", "D"])
    assert named(result) == {
        "4K, all rows": (8, 0.625),
        "4K, all four rotations right": (2, 0.5),
        "8K, all rows": (4, 0.25),
        "8K, all four rotations right": (1, 0.0),
    }
    kinds = {k: (v["n"], v["accuracy"]) for k, v in result["by_type"].items()}
    assert kinds == {"4K single": (4, 1.0), "4K cross": (4, 0.25), "8K single": (4, 0.25)}
    assert result["pair_accuracy"] is None
    assert result["scores"][0]["interval"] == [
        round(v, 4) for v in score.wilson(1.25, 2)
    ]  # two questions, not eight
    widths = [row.pictures()[0].width for row in benchmarks.read("hrbench", folder).rows]
    assert widths == [28] * 4 + [56] * 4 + [28] * 4


def test_hrbench_as_parquet_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "h" / "data").mkdir(parents=True)
    rows = hr_rows(3, once=True)
    write_parquet(tmp_path / "h" / "data" / "hr_bench_4k.parquet", rows)
    one, two = (
        benchmarks.read("hrbench", tmp_path / "h"),
        benchmarks.read("hrbench", write_hr(tmp_path / "t", _4k=rows)),
    )
    assert [replace(r.sample, images=()) for r in one.rows] == [
        replace(r.sample, images=()) for r in two.rows
    ]
    assert [r.pictures()[0].tobytes() for r in one.rows] == [
        r.pictures()[0].tobytes() for r in two.rows
    ]


def test_published_twice_a_set_is_asked_once(tmp_path: Path) -> None:
    folder = write_hr(tmp_path / "h", _4k=hr_rows(1))
    (folder / "hr_bench_4k.parquet").write_bytes(b"not read")
    assert len(benchmarks.read("hrbench", folder).rows) == 4


@pytest.mark.parametrize("cycle", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_rotations_are_put_together_where_two_questions_have_the_same_words(
    cycle: bool, blocks: bool, tmp_path: Path
) -> None:
    """blocks: all questions in their first rotation, then all in their second, …"""
    rows = [row | {"question": "What colour is the car?"} for row in hr_rows(2)]
    rows = sorted(rows, key=lambda row: row["index"] % 4) if blocks else rows
    rows = (
        rows if cycle else [{k: v for k, v in row.items() if k != "cycle_category"} for row in rows]
    )
    rows_read = benchmarks.read("hrbench", write_hr(tmp_path / "h", _4k=rows)).rows
    by_group: dict[Any, set[int]] = {}
    for row in rows_read:
        by_group.setdefault(row.sample.pair, set()).add(row.pictures()[0].width)
    assert sorted(map(sorted, by_group.values())) == [[28], [56]]


def test_a_rows_picture_may_be_named_by_another_rows_index(tmp_path: Path) -> None:
    rows = hr_rows(2)
    rows[5]["image"], rows[6]["image"] = "4", "0"
    rows_read = benchmarks.read("hrbench", write_hr(tmp_path / "h", _4k=rows)).rows
    assert [row.pictures()[0].width for row in rows_read[4:]] == [56, 56, 28, 56]


def test_prompts_are_the_papers(tmp_path: Path) -> None:
    first = {
        name: benchmarks.read(name, write(tmp_path / name)).rows[0].sample
        for name, write in WRITERS.items()
    }
    assert (
        first["mmvp"].question
        == f'Is door no. 1, the "red" one, open?\nOptions:\nA. Open B. Closed\n{INSTRUCTION}'
    )
    assert (
        first["vstar"].question
        == "What is thing 0 made of?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
        + INSTRUCTION
    )
    assert (
        first["blink"].question
        == f"Counting 0: which one?\nOptions:\nA. the left\nB. the right\n\n{INSTRUCTION}"
    )
    assert (
        first["hrbench"].question
        == f"What colour is car 0?\nOptions:\nA. red\nB. blue\nC. green\nD. white\n{INSTRUCTION}"
    )
    assert {(s.answer, len(s.choices or ())) for s in first.values()} == {("A", 2), ("A", 4)}


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_are_set_upright_wherever_they_lie(name: str, tmp_path: Path) -> None:
    folder = WRITERS[name](tmp_path / "set")
    if name == "hrbench":
        write_hr(
            folder,
            _4k=[
                row | {"image": base64.b64encode(jpeg(turned=True)).decode()} for row in hr_rows(1)
            ],
        )
    for path in folder.rglob("*.jpg"):
        path.write_bytes(jpeg(turned=True))
    assert benchmarks.read(name, folder).rows[0].pictures()[0].size == (28, 56)


@pytest.mark.parametrize(
    ("images", "header"),
    [("images", "Index"), ("MMVP_Images", "\ufeffIndex"), ("MMVP Images", "lndex")],
)
def test_copies_of_mmvp_with_other_names_are_read(images: str, header: str, tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m", images=images, header=header)
    assert [row.sample.pair for row in benchmarks.read("mmvp", folder).rows] == ["pair-1"] * 2 + [
        "pair-2"
    ] * 2 + ["pair-3"] * 2


def test_blink_as_jsonl_may_name_pictures_from_the_benchmarks_folder_or_hold_them(
    tmp_path: Path,
) -> None:
    folder = write_blink(tmp_path / "b", {"Counting": (2, 2)}, "jsonl")
    path = folder / "Counting" / "val.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {f"image_{k}": f"Counting/{rows[0][f'image_{k}']}" for k in (1, 2)}
    rows[1] |= {
        "image_1": {"bytes": base64.b64encode(jpeg(size=(84, 28))).decode()},
        "image_2": {"path": rows[1]["image_2"]},
    }
    del rows[1]["sub_task"], rows[1]["idx"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_read = benchmarks.read("blink", folder).rows
    assert [[p.width for p in row.pictures()] for row in rows_read] == [[28, 56], [84, 56]]
    assert [(row.sample.id, row.sample.type) for row in rows_read] == [
        ("val_Counting_0", "Counting"),
        ("Counting-2", "Counting"),
    ]
    assert [path.is_file() for row in rows_read for path in row.sample.images] == [
        True,
        True,
        False,
        True,
    ]
    path.rename(folder / "Counting.jsonl")
    assert [row.sample.type for row in benchmarks.read("blink", folder).rows] == ["Counting"] * 2


# --------------------------------------------------------------------------------------------------
# broken rows


def problems(benchmark: benchmarks.Benchmark) -> list[str]:
    """Of all rows, those whose pictures cannot be opened included; "file:line: problem", without
    the folder.
    """

    def problem(row: Question) -> str:
        try:
            row.pictures()
        except DataError as error:
            return str(error)
        return ""

    unopened = [(row.sample.id, error) for row in benchmark.rows if (error := problem(row))]
    return [str(b).replace(f"{benchmark.folder}/", "") for b in benchmark.unopened(unopened)]


def test_every_broken_row_of_mmvp_is_named(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    with (folder / "Questions.csv").open("a") as file:
        file.write(
            '7,"Two\nlines?",(a) Open (b) Closed,(c)\n8,cut\n'
            "x,q,(a) Open (b) Closed,(a)\n3,q,(a) Open (b) Closed,(a)\n"
        )
        file.write(
            "9,q,Open or closed,(a)\n10,one,two,three,four,five\n"
            "11,<|image_pad|>,(a) Open (b) Closed,(a)\n12,,(a) x (b) y,(a)\n"
        )
    (folder / "MMVP Images" / "2.jpg").unlink()
    (folder / "MMVP Images" / "5.jpg").write_text("no picture")
    benchmark = benchmarks.read("mmvp", folder)
    assert [p.split("; ")[0] for p in problems(benchmark)] == [
        "Questions.csv:8: Correct Answer: '(c)' is not among the options (A, B)",
        "Questions.csv:10: Options: is missing",
        "Questions.csv:11: Index: 'x' is no number from 1 on",
        "Questions.csv:12: the id 3 is already taken by Questions.csv:4",
        "Questions.csv:13: Options: 'Open or closed' shows no options (a) and (b)",
        "Questions.csv:14: has 6 cells for 4 columns",
        "Questions.csv:15: Question: contains <|image_pad|>, "
        "which a model reads as a control token",
        "Questions.csv:16: Question: is empty",
        "Questions.csv:3: image: MMVP Images/2.jpg: no such picture",
        "Questions.csv:6: image: MMVP Images/5.jpg: not a picture that Pillow can read",
    ]


def test_broken_rows_are_counted_and_are_in_no_score(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    (folder / "MMVP Images" / "2.jpg").unlink()
    with (folder / "Questions.csv").open("a") as file:
        file.write("7,q,(a) Open (b) Closed,(c)\n")
    result = run("mmvp", folder, ["A", "B", "A", "B", "A", "A"])
    assert named(result) == {"single items": (5, 0.8), "pairs, both right": (2, 0.5)}
    assert (result["n"], result["of"], [b["id"] for b in result["broken"]]) == (5, 7, ["7", "2"])
    assert [a["id"] for a in result["answers"]] == ["1", "3", "4", "5", "6"]
    text = shown(result)
    assert "5 of 7 rows were asked" in text
    assert "Questions.csv:8: Correct Answer: '(c)' is not among the options (A, B)" in text
    assert "2.jpg: no such picture" in text


def test_every_broken_row_of_vstar_is_named(tmp_path: Path) -> None:
    folder = write_vstar(tmp_path / "v")
    good = json.loads((folder / "test_questions.jsonl").read_text().splitlines()[0])
    bad: list[Any] = [
        {k: v for k, v in good.items() if k != field}
        for field in ("text", "label", "category", "question_id", "image")
    ]
    bad += [
        good | {"label": "E", "question_id": 7},
        good | {"text": "no options", "question_id": 8},
        [],
        good,
        good | {"image": "x.jpg", "question_id": 9},
    ]
    with (folder / "test_questions.jsonl").open("ab") as file:
        file.write("\n".join(json.dumps(b) for b in bad).encode() + b'\n\n{"image": \n\xff\n')
    assert [p.split(" (")[0].split(";")[0] for p in problems(benchmarks.read("vstar", folder))] == [
        "test_questions.jsonl:6: text: is missing",
        "test_questions.jsonl:7: label: is missing",
        "test_questions.jsonl:8: category: is missing",
        "test_questions.jsonl:9: question_id: is missing",
        "test_questions.jsonl:10: image: is missing",
        "test_questions.jsonl:11: label: 'E' is not among the options",
        "test_questions.jsonl:12: text: shows no options",
        "test_questions.jsonl:13: must be an object with the fields of a question",
        "test_questions.jsonl:14: the id direct_attributes-0 is already taken "
        "by test_questions.jsonl:1",
        "test_questions.jsonl:17: not valid JSON",
        "test_questions.jsonl:18: not UTF-8",
        "test_questions.jsonl:15: image: x.jpg: no such picture",
    ]


def test_every_broken_row_of_blink_is_named(tmp_path: Path) -> None:
    (tmp_path / "b" / "Counting").mkdir(parents=True)
    rows = blink_rows("Counting", 7, 2)
    rows[1]["answer"], rows[2]["choices"], rows[3]["image_1"], rows[5]["question"] = (
        "hidden",
        None,
        None,
        "",
    )
    rows[4]["image_2"] = {"bytes": jpeg()[:200], "path": None}
    write_parquet(tmp_path / "b" / "Counting" / "val-00000-of-00001.parquet", rows)
    file = "Counting/val-00000-of-00001.parquet"
    assert [p.split(" (")[0] for p in problems(benchmarks.read("blink", tmp_path / "b"))] == [
        f"{file}: row 2: answer: 'hidden' is not among the options",
        f"{file}: row 3: choices: is missing",
        f"{file}: row 6: question: is empty",
        f"{file}: row 4: image_1: is empty, where a picture must be",
        f"{file}: row 5: image_2: a damaged picture",
    ]


def test_every_broken_row_of_hrbench_is_named(tmp_path: Path) -> None:
    rows = hr_rows(3)
    rows[0]["answer"], rows[1]["B"], rows[2]["image"] = "E", "", "@@not base64@@"
    rows[8] |= {"image": base64.b64encode(b"no picture").decode()}
    for row in rows[4:8]:
        row["image"] = ""
    assert [
        p.split(" (")[0].split(" that ")[0]
        for p in problems(benchmarks.read("hrbench", write_hr(tmp_path / "h", _4k=rows)))
    ] == [
        "hr_bench_4k.tsv:2: answer: 'E' is not among the options",
        "hr_bench_4k.tsv:3: B: is empty",
        "hr_bench_4k.tsv:4: image: is neither a picture's path nor base64",
        *(
            f"hr_bench_4k.tsv:{line}: image: is empty, where a picture must be"
            for line in (6, 7, 8, 9)
        ),
        "hr_bench_4k.tsv:10: image: not a picture",
    ]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "mmvp",
            "Questions.csv",
            'the folder must hold Questions.csv and the folder "MMVP Images"',
        ),
        ("mmvp", "column", "Questions.csv: has no column Options"),
        ("mmvp", "rows", "none of 6 rows can be asked; the first: "),
        ("mmvp", "empty", "the files hold no rows"),
        ("vstar", "test_questions.jsonl", "the folder must hold test_questions.jsonl"),
        ("blink", "*/val.jsonl", "the folder must hold a folder for each subtask"),
        ("hrbench", "*.tsv", "the folder must hold hr_bench_4k.tsv or hr_bench_8k.tsv"),
    ],
)
def test_a_folder_that_is_not_the_benchmark_is_one_line_and_no_model_is_opened(
    name: str, damage: str, message: str, tmp_path: Path
) -> None:
    folder = WRITERS[name](tmp_path / "set")
    text = (folder / "Questions.csv").read_text() if name == "mmvp" else ""
    if damage == "column":
        (folder / "Questions.csv").write_text(text.replace("Options", "Choices"))
    elif damage == "rows":
        (folder / "Questions.csv").write_text(text.replace("(b) Closed", "Closed"))
    elif damage == "empty":
        (folder / "Questions.csv").write_text(text.splitlines()[0])
    else:
        for path in list(folder.glob(damage)):
            path.unlink()
    with pytest.raises(DataError) as raised:
        compare("tiny", [], Plan(name, path=str(folder)), never)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_where_no_picture_opens_there_is_no_score(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    for path in (folder / "MMVP Images").iterdir():
        path.unlink()
    with pytest.raises(
        DataError,
        match=r"none of 6 rows can be asked; "
        r"the first: .*Questions\.csv:2: image: .*1\.jpg: no such picture",
    ):
        run("mmvp", folder, ["A"] * 6)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"suite": "mmvp"}, "--suite mmvp needs --path DIR, a folder that holds Questions.csv"),
        ({"suite": "scenes", "path": "x"}, "--path x: is for --suite mmvp, vstar, blink, hrbench"),
        ({"prompt": "plain"}, "--prompt plain: is for --suite mmvp, vstar, blink, hrbench"),
        (
            {"suite": "mmvp", "path": "x", "prompt": "kind"},
            "--prompt kind: must be direct or plain",
        ),
        ({"look": "sometimes"}, "look must be auto, always or never"),
        ({"look": "never", "steps": (0, 4)}, "look never forbids latent steps"),
        ({"steps": (0, -1)}, "--steps -1: latent steps must be 0 or more"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        Plan(**plan)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["mmvp", "vstar", "blink", "hrbench"])
def test_the_plain_prompt_is_the_direct_one_without_its_sentence(name: str, tmp_path: Path) -> None:
    folder = WRITERS[name](tmp_path / "set")
    direct = [row.sample for row in benchmarks.read(name, folder).rows]
    plain = [row.sample for row in benchmarks.read(name, folder, prompt="plain").rows]
    for one, other in zip(direct, plain, strict=True):
        assert INSTRUCTION in one.question
        assert other.question == one.question.replace(INSTRUCTION, "").strip()
        assert replace(other, question=one.question) == one


def test_the_prompt_is_told_and_others_are_not_compared(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    asked = {p: benchmarks.read("mmvp", folder, prompt=p) for p in ("direct", "plain")}
    results = {}
    for prompt, benchmark in asked.items():
        plan = Plan("mmvp", path=str(folder), prompt=prompt)
        model = table(benchmark, ["A"] * 6)
        results[prompt] = compare("tiny", [], plan, lambda _, model=model: model)  # type: ignore[misc]
        told = results[prompt]
        assert (told["prompt"], told["max_tokens"]) == (
            prompt,
            {"direct": 64, "plain": 256}[prompt],
        )
    (tmp_path / "plain.json").write_text(json.dumps(results["plain"]))
    with pytest.raises(UsageError, match="was asked with --prompt plain, not direct"):
        compare("tiny", [str(tmp_path / "plain.json")], Plan("mmvp", path=str(folder)), never)


def test_a_limit_is_of_rows(tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    model = table(benchmarks.read("mmvp", folder), ["A"] * 6)
    result = compare("tiny", [], Plan("mmvp", 4, path=str(folder)), lambda _: model)
    assert (result["n"], result["of"]) == (4, 4)
    with pytest.raises(UsageError, match="--limit must be 1 or more"):
        compare("tiny", [], Plan("mmvp", 0, path=str(folder)), never)


# ------------------------------------------------------------------------------------- several K,
# stopping and going on


class Counting(Around):
    """Counts how often pictures are encoded and stops after so many batches."""

    def __init__(self, model: Runtime, batches: int = 1000) -> None:
        super().__init__(model)
        self.encoded = 0
        self.left = batches

    def encode(self, pixel_values: np.ndarray, grids: list[Grid]) -> np.ndarray:
        self.encoded += 1
        return super().encode(pixel_values, grids)

    def start(self, batch: int, capacity: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        super().start(batch, capacity)


def test_several_steps_are_asked_in_one_go_and_pictures_are_seen_once(tmp_path: Path) -> None:
    folder = write_vstar(tmp_path / "v")
    model = Counting(table(benchmarks.read("vstar", folder), list("ABCDA"), latent_steps=2))
    counts: list[int] = []
    result = compare(
        "tiny",
        [],
        Plan("vstar", steps=(0, 2, 4), batch=2, path=str(folder)),
        lambda _: model,
        counts.append,
        counts.append,
    )
    assert model.encoded == 5
    assert counts == [5, 2, 2, 1]  # all, and then those that are done
    assert [(run["steps"], run["n"], run["accuracy"]) for run in result["by_steps"]] == [
        (0, 5, 1.0),
        (2, 5, 1.0),
        (4, 5, 1.0),
    ]
    assert (result["steps"], result["answers"]) == (0, result["by_steps"][0]["answers"])
    text = shown(result)
    assert all(f"K = {k}" in text for k in (0, 2, 4))
    assert "table, 4 steps, n = 5" in text


def test_several_steps_are_for_every_suite(tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(jpeg())
    lines = [
        {
            "id": str(i),
            "image": "p.jpg",
            "question": f"question {i}",
            "answer": "red",
            "type": "t",
            "pair": "p",
        }
        for i in range(2)
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = Table({"question 0": "red", "question 1": "blue"}, latent_steps=2)
    result = compare(
        "tiny", [], Plan(str(tmp_path / "mine.jsonl"), steps=(0, 1), skills=0), lambda _: model
    )
    assert [
        (run["steps"], run["accuracy"], run["pair_accuracy"]) for run in result["by_steps"]
    ] == [(0, 0.5, 0.0), (1, 0.5, 0.0)]
    text = shown(result)
    for part in ("K = 0", "K = 1", "pairs, both right", "50.0 [9.4, 90.5]"):
        assert part in text
    assert "published" not in text


def test_steps_are_refused_for_a_model_without_latents_before_it_is_asked(tmp_path: Path) -> None:
    folder = write_vstar(tmp_path / "v")
    model = Counting(table(benchmarks.read("vstar", folder), list("ABCDA")))
    with pytest.raises(UsageError, match="--steps 4: table was not tuned for latent steps"):
        compare("tiny", [], Plan("vstar", steps=(0, 4), path=str(folder)), lambda _: model)
    assert model.encoded == 0


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    answers = ["A", "B", "B", "B", "A", "A"]
    benchmark = benchmarks.read("mmvp", folder)
    plan = Plan("mmvp", steps=(0, 2), batch=2, path=str(folder), journal=journal)
    with pytest.raises(KeyboardInterrupt):
        compare("tiny", [], plan, lambda _: Counting(table(benchmark, answers, 2), batches=3))
    with journal.open("a") as file:
        file.write('{"id": "4", "ste')  # cut by the kill
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 6 + 1  # two items with both K, two with the first alone
    answering = table(benchmark, answers, 2)
    rest = Counting(answering)
    result = compare("tiny", [], plan, lambda _: rest)
    assert (rest.encoded, answering.batches) == (4, [2, 2, 2])
    assert result == compare(
        "tiny", [], replace(plan, journal=None), lambda _: table(benchmark, answers, 2)
    )
    lines_written = [json.loads(line) for line in journal.read_text().splitlines()][1:]
    assert sorted((t["id"], t["steps"]) for t in lines_written) == [
        (str(i), k) for i in range(1, 7) for k in (0, 2)
    ]
    assert {"id", "steps", "question", "answer", "expected", "correct", "images"} <= set(
        lines_written[0]
    )
    assert lines_written[0]["images"] == [str(folder / "MMVP Images" / "1.jpg")]
    again = Counting(table(benchmark, answers, 2))
    assert compare("tiny", [], plan, lambda _: again) == result
    assert again.encoded == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 3}, "is about max_tokens 64, not 3"),
        ({"suite": "vstar"}, "is about suite mmvp, not vstar"),
        ({"path": "copy"}, "is about data "),
    ],
)
def test_answers_under_other_settings_are_refused_and_left_as_they_are(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    write_mmvp(tmp_path / "copy")
    write_vstar(folder)
    plan = Plan("mmvp", path=str(folder), journal=journal)
    compare("tiny", [], plan, lambda _: table(benchmarks.read("mmvp", folder), ["A"] * 6))
    before = journal.read_bytes()
    if "path" in change:
        change = {"path": str(tmp_path / "copy")}
    with pytest.raises(UsageError, match="name another file, or remove it") as raised:
        compare("tiny", [], replace(plan, **change), never)
    assert message in str(raised.value)
    assert journal.read_bytes() == before


def test_answers_of_another_model_or_to_another_question_are_refused(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    plan = Plan("mmvp", path=str(folder), journal=journal)
    model = table(benchmarks.read("mmvp", folder), ["A"] * 6)
    compare("tiny", [], plan, lambda _: model)
    with pytest.raises(UsageError, match="is of another model"):
        compare(str(small_checkpoint), [], plan, never)
    path = folder / "Questions.csv"
    path.write_text(path.read_text().replace("no. 2", "no. 22"))
    with pytest.raises(UsageError, match="the question 2 has changed since"):
        compare("tiny", [], plan, lambda _: model)


@pytest.mark.parametrize(
    "text", ["mine", "mine\n", "{}\n", '{"schema": "lvr-lite/answers", "version": 2}\n', "[]\n"]
)
def test_a_file_of_something_else_is_not_added_to(text: str, tmp_path: Path) -> None:
    folder = write_mmvp(tmp_path / "m")
    (tmp_path / "f").write_text(text)
    with pytest.raises(DataError, match=r"--answers .*f.*name another file"):
        compare("tiny", [], Plan("mmvp", path=str(folder), journal=tmp_path / "f"), never)
    assert (tmp_path / "f").read_text() == text


def test_a_damaged_line_of_answers_is_named(tmp_path: Path) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    plan = Plan("mmvp", path=str(folder), journal=journal)
    compare("tiny", [], plan, lambda _: table(benchmarks.read("mmvp", folder), ["A"] * 6))
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:], ""]))
    with pytest.raises(DataError, match=r"answers\.jsonl:3: not what"):
        compare("tiny", [], plan, never)


@pytest.mark.parametrize(
    "damage",
    [
        {"looks": {"now": 1}},
        {"visual_tokens": [[3], [4]]},
        {"tokens": "12"},
        {"score": 2},
        {"correct": 1},
        {"answer": None},
        {"more": 1},
    ],
)
def test_a_line_of_answers_with_a_field_of_another_kind_is_named(
    damage: dict[str, Any], tmp_path: Path
) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    plan = Plan("mmvp", path=str(folder), journal=journal)
    compare("tiny", [], plan, lambda _: table(benchmarks.read("mmvp", folder), ["A"] * 6))
    lines = journal.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | damage)
    journal.write_text("\n".join([*lines, ""]), encoding="utf-8")
    with pytest.raises(DataError, match=r"answers\.jsonl:3: not what"):
        compare("tiny", [], plan, never)


def test_a_line_of_answers_that_is_nested_without_end_is_named(tmp_path: Path) -> None:
    folder, journal = write_mmvp(tmp_path / "m"), tmp_path / "answers.jsonl"
    plan = Plan("mmvp", path=str(folder), journal=journal)
    compare("tiny", [], plan, lambda _: table(benchmarks.read("mmvp", folder), ["A"] * 6))
    with journal.open("a", encoding="utf-8") as file:
        file.write("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl:8: not what"):
        compare("tiny", [], plan, never)


# --------------------------------------------------------------------------------------------------
# side by side


def test_two_models_are_compared_on_rows_that_both_could_be_asked(tmp_path: Path) -> None:
    folder, earlier = write_mmvp(tmp_path / "m"), tmp_path / "earlier.json"
    missing = (folder / "MMVP Images" / "6.jpg").rename(folder / "6.jpg")
    earlier.write_text(json.dumps(run("mmvp", folder, ["B", "B", "A", "A", "A", "A"])))
    missing.rename(folder / "MMVP Images" / "6.jpg")
    model = table(benchmarks.read("mmvp", folder), ["A", "B", "A", "A", "A", "B"])
    result = compare("tiny", [str(earlier)], Plan("mmvp", path=str(folder)), lambda _: model)
    (other,) = result["against"]
    assert (result["n"], other["n"], other["accuracy"], other["difference"]) == (6, 5, 0.6, 0.2)
    with pytest.raises(UsageError, match="is about the suite mmvp, not vstar"):
        compare("tiny", [str(earlier)], Plan("vstar", path=str(write_vstar(tmp_path / "v"))), never)
    with pytest.raises(UsageError, match="not about the same items"):
        compare("tiny", [str(earlier)], Plan("mmvp", 2, path=str(folder)), never)


def test_rotations_of_a_question_count_as_one_in_a_comparison(tmp_path: Path) -> None:
    folder, right = write_hr(tmp_path / "h", _4k=hr_rows(2)), [row["answer"] for row in hr_rows(2)]
    wrong = ["ABCD"["BCDA".index(letter)] for letter in right]
    answers = {"tiny": [*right], "other": [*wrong[:4], *right[4:]]}
    benchmark, other_model = (
        benchmarks.read("hrbench", folder),
        str(Path(str(benchmarks.__file__)).parents[1] / "toy" / "model"),
    )
    plan = Plan("hrbench", path=str(folder), steps=(0,))
    result = compare(
        "tiny",
        [other_model],
        plan,
        lambda name: table(benchmark, answers["tiny" if name == "tiny" else "other"]),
    )
    (other,) = result["against"]
    assert (other["n"], other["difference"], other["p"]) == (
        8,
        0.5,
        1.0,
    )  # one question of two, not four rows of eight (p = 0.125)
    assert other["interval"] == [0.0, 1.0]


def test_groups_of_one_are_drawn_as_items_are() -> None:
    values = np.random.default_rng(0).integers(-1, 2, 50).astype(float)
    alone = grouped(values, [str(i) for i in range(50)])
    assert bootstrap_ratio(*alone, 0, 20_000) == pytest.approx(
        bootstrap_mean(values, 0, 20_000), abs=0.03
    )
    sums, sizes = grouped(np.array([1.0, 2.0, 4.0]), ["b", "a", "b"])
    assert (sums.tolist(), sizes.tolist()) == ([2.0, 5.0], [1, 2])


# --------------------------------------------------------------------------------------------------
# people's own multiple choice


@pytest.mark.parametrize(
    ("question", "choices", "answer", "reply", "right"),
    [
        ("Which?\n(A) red\n(B) blue", ("red", "blue"), "blue", "B", 1.0),
        ("Which?\n(A) red\n(B) blue", ("red", "blue"), "blue", "blue", 1.0),
        ("Which?\n(A) red\n(B) blue", ("red", "blue"), "blue", "A", 0.0),
        ("Which? A. red B. blue", ("A", "B"), "B", "B. blue", 1.0),
        ("Which? A. red B. blue", ("A", "B"), "B", "b", 1.0),
        ("Which letter, red or blue", ("red", "blue"), "blue", "B", 0.0),  # no letters were shown
        (
            "Which?\n(A) blue\n(B) red",
            ("red", "blue"),
            "blue",
            "B",
            0.0,
        ),  # other letters than the choices' order
        ("Which?\n(A) red\n(B) blue", None, "blue", "B", 0.0),
    ],
)
def test_a_letter_counts_in_a_file_where_the_question_shows_letters(
    question: str, choices: tuple[str, ...] | None, answer: str, reply: str, right: float
) -> None:
    sample = Sample("s", (), question, answer, choices)
    assert lettered(sample, reply) == right
    assert exact(sample, answer) == lettered(sample, answer) == 1.0


def test_a_file_is_scored_with_letters_and_scenes_are_not(tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(jpeg())
    question = "Which?\n(A) red\n(B) blue"
    line = {
        "id": "x",
        "image": "p.jpg",
        "question": question,
        "answer": "blue",
        "choices": ["red", "blue"],
    }
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    plan = Plan(str(tmp_path / "mine.jsonl"))
    result = compare("tiny", [], plan, lambda _: Table({question: "(B)"}))
    assert (result["accuracy"], result["answers"][0]["expected"]) == (1.0, "blue")


# --------------------------------------------------------------------------------------------------
# the command line


@pytest.mark.parametrize(("model", "steps"), [("small_checkpoint", "0"), ("small_fp32", "0,2")])
def test_a_checkpoint_and_a_bundle_are_scored_alike(
    model: str, steps: str, request: pytest.FixtureRequest, call: Call, tmp_path: Path
) -> None:
    folder = write_mmvp(tmp_path / "m")
    out = tmp_path / "eval.json"
    journal = tmp_path / "answers.jsonl"
    (folder / "MMVP Images" / "4.jpg").unlink()
    suite = ("--suite", "mmvp", "--path", folder, "--steps", steps, "--max-tokens", 4)
    files = ("--answers", journal, "--json", out)
    done = call("eval", request.getfixturevalue(model), *suite, *files)
    assert done.code == 0, done.err
    assert "5 of 6 rows were asked" in done.out
    assert "pairs, both right" in done.out
    result = json.loads(out.read_text())
    runs = result.get("by_steps", [result])
    assert [run["steps"] for run in runs] == [int(k) for k in steps.split(",")]
    for one in runs:
        right = [
            score.chosen_letter(a["answer"], ("Open", "Closed")) == a["expected"]
            for a in one["answers"]
        ]
        assert (one["n"], one["of"], one["accuracy"]) == (5, 6, round(sum(right) / 5, 4))
    assert len(journal.read_text().splitlines()) == 1 + 5 * len(runs)


def test_parquet_without_pyarrow_is_one_line(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    (tmp_path / "b" / "Counting").mkdir(parents=True)
    (tmp_path / "b" / "Counting" / "val-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = call("eval", "tiny", "--suite", "blink", "--path", tmp_path / "b")
    assert done.code == 1
    assert done.error.startswith(
        'this command needs the package pyarrow: pip install "lvr-lite[benchmarks]"'
    )


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "b" / "Counting").mkdir(parents=True)
    (tmp_path / "b" / "Counting" / "val-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"parquet: not a whole parquet file"):
        benchmarks.read("blink", tmp_path / "b")
