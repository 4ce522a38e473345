"""Both sample formats are read; every mistake is named with file, line or item, field, and what to
do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvr_lite.data.rows import Problem
from lvr_lite.data.sample_files import SampleFile, placed_samples, read_samples
from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.errors import DataError

GOOD: dict[str, Any] = {
    "id": "a",
    "image": "images/a.png",
    "question": "what colour is the star",
    "answer": "red",
    "choices": ["red", "blue"],
    "boxes": [[0.1, 0.2, 0.5, 0.6]],
    "type": "attribute",
    "pair": None,
}
OFFICIAL: dict[str, Any] = {
    "dataset": "flickr",
    "split": "train",
    "question_id": 7,
    "image": ["images/a.png"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "<lvr>\n<answer> A star. </answer>"},
    ],
    "bboxes": [[0.1, 0.2, 0.5, 0.6]],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def jsonl(folder: Path, *items: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in {**GOOD, **fields}.items() if v is not ...}


def official(folder: Path, *items: Any) -> Path:
    path = folder / "official.json"
    path.write_text(json.dumps(list(items), indent=1))
    return path


def official_with(
    human: str | None = None, gpt: str | None = None, **fields: Any
) -> dict[str, Any]:
    human = OFFICIAL["conversations"][0]["value"] if human is None else human
    gpt = OFFICIAL["conversations"][1]["value"] if gpt is None else gpt
    item = {
        **OFFICIAL,
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}],
        **fields,
    }
    return {k: v for k, v in item.items() if v is not ...}


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_samples(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# the project's JSONL


def test_a_line_becomes_a_sample_with_its_picture_beside_the_file(folder: Path) -> None:
    assert read_samples(jsonl(folder, GOOD)) == [
        Sample(
            "a",
            (folder / "images/a.png",),
            GOOD["question"],
            "red",
            ("red", "blue"),
            ((0.1, 0.2, 0.5, 0.6),),
            "attribute",
            None,
        )
    ]


def test_choices_boxes_type_and_pair_may_be_null_or_missing_and_pictures_several(
    folder: Path,
) -> None:
    bare = {"id": "b", "image": ["images/a.png", "images/b.png"], "question": "q", "answer": "x"}
    nulls = {
        **bare,
        "id": "c",
        "choices": None,
        "boxes": None,
        "type": None,
        "pair": None,
        "note": "other fields are left alone",
    }
    one, two = read_samples(jsonl(folder, bare, nulls))
    assert one == Sample("b", (folder / "images/a.png", folder / "images/b.png"), "q", "x")
    assert (two.choices, two.boxes, two.type, two.pair) == (None, (), None, None)


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_problem(folder: Path) -> None:
    path = folder / "w.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps(GOOD).encode()
        + b"\r\n\r\n"
        + json.dumps(changed(id="b")).encode()
    )
    assert [s.id for s in read_samples(path)] == ["a", "b"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(folder: Path) -> None:
    path = folder / "u.jsonl"
    path.write_text(
        json.dumps(changed(question="one\u2028two"), ensure_ascii=False), encoding="utf-8"
    )
    assert read_samples(path)[0].question == "one\u2028two"


def test_a_written_sample_reads_back_as_itself(folder: Path) -> None:
    samples = read_samples(
        jsonl(
            folder,
            GOOD,
            {
                **GOOD,
                "id": "b",
                "image": ["images/a.png", "images/b.png"],
                "choices": None,
                "boxes": [],
            },
        )
    )
    (folder / "deeper").mkdir()
    path = folder / "deeper" / "again.jsonl"
    path.write_text("".join(json.dumps(sample_json(s, folder / "deeper")) + "\n" for s in samples))
    again = read_samples(path)
    assert [s.images[0].resolve() for s in again] == [s.images[0].resolve() for s in samples]
    assert [sample_json(s, folder) for s in again] == [sample_json(s, folder) for s in samples]


MISTAKES = [
    (changed(id=...), "id: is missing"),
    (changed(id=5), "id: must be text, not a number"),
    (changed(image=...), "image: is missing"),
    (changed(image=[]), "image: is an empty list"),
    (changed(image=["images/a.png", 3]), "image[1]: must be text"),
    (changed(image="images/none.png"), "image: {folder}/images/none.png does not exist"),
    (changed(image="images"), "image: {folder}/images does not exist"),
    (changed(image="a\0b"), "image: holds a zero byte"),
    (changed(question=None), "question: is null"),
    (changed(question=["q"]), "question: must be text, not a list"),
    (changed(question="  "), "question: is empty"),
    (changed(question="see <|image_pad|>"), "question: contains <|image_pad|>"),
    (changed(question="<|lvr_start|>"), "question: contains <|lvr_start|>"),
    (changed(question="<|lvr|>"), "question: contains <|lvr|>"),
    (changed(question="half \ud800"), "question: holds half of a surrogate pair"),
    (changed(answer=""), "answer: is empty"),
    (changed(answer=3), "answer: must be text, not a number"),
    (changed(answer="red<|lvr_end|>", choices=None), "answer: contains <|lvr_end|>"),
    (changed(answer="Red"), "answer: 'Red' is not among the choices (red, blue)"),
    (
        changed(choices=[]),
        "choices: must be a list of at least one answer, or null, not an empty list",
    ),
    (changed(choices="red"), "choices: must be a list of at least one answer, or null, not text"),
    (changed(choices=["red", None]), "choices[1]: must be text, not null"),
    (changed(choices=["red", "red"]), "choices: 'red' is there twice"),
    (changed(type=1), "type: must be text"),
    (changed(pair=7), "pair: must be text"),
    (changed(boxes={"x": 1}), "boxes: must be a list of [x0, y0, x1, y1], not an object"),
    (changed(boxes=[0.1, 0.2, 0.3, 0.4]), "boxes: is one box, and must be a list of boxes"),
    (changed(boxes=[[0, 0, 1]]), "boxes[0]: must be four numbers"),
    (changed(boxes=[[0, 0, 1, "1"]]), "boxes[0]: must be four numbers"),
    (changed(boxes=[[0, 0, 1, True]]), "boxes[0]: must be four numbers"),
    (
        changed(boxes=[[0, 0, 1, 1], [10, 20, 110, 220]]),
        "boxes[1]: [10, 20, 110, 220] looks like pixels, or like the scale 0 to 1000; divide x by",
    ),
    (changed(boxes=[[0, 0, 10**400, 1]]), "looks like pixels"),
    (changed(boxes=[[-0.1, 0, 0.5, 1]]), "boxes[0]: [-0.1, 0, 0.5, 1] lies outside the picture"),
    (changed(boxes=[[0, 0, 1.01, 1]]), "lies outside the picture"),
    (changed(boxes=[[0.5, 0, 0.4, 1]]), "boxes[0]: [0.5, 0, 0.4, 1] is inverted"),
    (changed(boxes=[[0.5, 0, 0.5, 1]]), "boxes[0]: [0.5, 0, 0.5, 1] is empty"),
    (changed(boxes=[[float("nan"), 0, 0.5, 1]]), "holds NaN"),
    (changed(boxes=..., bboxs=[[0, 0, 1, 1]]), "bboxs: is not a field here; 'boxes' is meant"),
    (["no", "object"], "must be an object with the fields of a sample, not a list"),
    (5, "must be an object with the fields of a sample, not a number"),
]


@pytest.mark.parametrize(
    ("mistake", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_mistake_is_named_with_file_line_and_field(
    folder: Path, mistake: Any, message: str
) -> None:
    path = jsonl(folder, changed(id="first"), mistake)
    text = refusal(path)
    assert text.startswith(f"{path}:2: ")
    assert message.replace("{folder}", str(folder)) in text


def test_a_line_that_is_no_json_is_named_with_its_number(folder: Path) -> None:
    path = folder / "m.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{{'id': 'b'}}\n")
    assert refusal(path).startswith(f"{path}:3: not valid JSON (Expecting property name")
    path.write_text(json.dumps(GOOD, indent=1))
    assert refusal(path).startswith(f"{path}:1: not valid JSON")
    path.write_text('{"id": ' + "[" * 200_000)
    assert refusal(path).startswith(f"{path}:1: not valid JSON")


def test_an_id_that_comes_twice_is_named_with_both_lines(folder: Path) -> None:
    path = jsonl(folder, GOOD, changed(id="b"), GOOD)
    assert (
        refusal(path) == f"{path}:3: id: 'a' is already taken by line 1; give every sample its own"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": empty"),
        (b" \n\n", ": empty"),
        (b'{"id": "a"}\n{"id": "\xff"}', ":2: not UTF-8 (byte 0xff)"),
    ],
)
def test_an_empty_file_and_one_that_is_not_utf8_are_refused(
    folder: Path, content: bytes, message: str
) -> None:
    path = folder / "e.jsonl"
    path.write_bytes(content)
    assert any(str(problem).startswith(f"{path}{message}") for problem in placed_samples(path)[1])


def test_a_missing_file_and_a_folder_are_refused(folder: Path) -> None:
    assert refusal(folder / "no.jsonl").startswith(
        f"{folder / 'no.jsonl'}: cannot be read (No such file"
    )
    assert refusal(folder).startswith(f"{folder}: cannot be read (Is a directory")


def test_all_problems_are_collected_beside_the_good_samples(folder: Path) -> None:
    path = jsonl(
        folder, changed(answer="", boxes=[[3, 3, 9, 9]]), changed(id="good"), changed(id="good"), 5
    )
    placed, problems = placed_samples(path)
    assert [p.sample.id for p in placed] == ["good"]
    assert [(p.line, p.field) for p in problems] == [
        (1, "answer"),
        (1, "boxes[0]"),
        (3, "id"),
        (4, ""),
    ]
    assert all(
        isinstance(p, Problem) and str(p).startswith(f"{path}:{p.line}: {p.field}")
        for p in problems
    )
    assert refusal(path) == f"{problems[0]} (3 more: lvr-lite data validate {path} lists all)"


# --------------------------------------------------------------------------------------------------
# the official JSON


def test_an_official_item_becomes_a_sample(folder: Path) -> None:
    assert read_samples(official(folder, OFFICIAL)) == [
        Sample(
            "flickr-train-7",
            (folder / "images/a.png",),
            "What is it?",
            "A star.",
            None,
            ((0.1, 0.2, 0.5, 0.6),),
            "flickr",
        )
    ]


def test_stage_2_items_have_neither_image_mark_nor_boxes(folder: Path) -> None:
    (sample,) = read_samples(
        official(folder, official_with(human="What is it?", gpt="42", bboxes=..., question_id=...))
    )
    assert sample.id == "flickr-train-item1"
    assert sample.question == "What is it?"
    assert sample.answer == "42"
    assert sample.boxes == ()


def test_several_pictures_and_boxes_are_read(folder: Path) -> None:
    item = official_with(
        human="<image>\n<image>\nSame?",
        gpt="<lvr><lvr>\n<answer>no</answer>",
        image=["images/a.png", "images/b.png"],
        bboxes=[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]],
    )
    (sample,) = read_samples(official(folder, item))
    assert len(sample.images) == 2
    assert len(sample.boxes) == 2
    assert sample.question == "Same?"
    assert sample.answer == "no"


OFFICIAL_MISTAKES = [
    (official_with(bboxes=...), "conversations[1].value: has 1 <lvr> for 0 boxes"),
    (official_with(gpt="<answer>x</answer>"), "conversations[1].value: has 0 <lvr> for 1 boxes"),
    (official_with(bboxes=[[10, 10, 90, 90]]), "bboxes[0]: [10, 10, 90, 90] looks like pixels"),
    (official_with(gpt="<lvr><answer> </answer>"), "conversations[1].value: is empty"),
    (official_with(human="<image>\n"), "conversations[0].value: is empty"),
    (official_with(human="What is <image>?"), "conversations[0].value: has <image> after the text"),
    (
        official_with(human="<image><image>Which?"),
        "conversations[0].value: has 2 <image> for 1 pictures",
    ),
    (
        official_with(human="<image>\nwhat is <|image_pad|>"),
        "conversations[0].value: contains <|image_pad|>",
    ),
    (official_with(conversations=[]), "conversations: must be two turns"),
    (official_with(conversations=...), "conversations: is missing"),
    (
        official_with(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]),
        "conversations[0].value: must be text, not null",
    ),
    (official_with(image=["gone.jpg"]), "image: {folder}/gone.jpg does not exist"),
    (OFFICIAL, "id: 'flickr-train-7' is already taken by item 1"),
    ("text", "must be an object"),
]


@pytest.mark.parametrize(
    ("mistake", "message"), OFFICIAL_MISTAKES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_mistake_in_an_official_file_is_named_with_its_item(
    folder: Path, mistake: Any, message: str
) -> None:
    path = official(
        folder,
        OFFICIAL,
        {**mistake, "question_id": 8}
        if isinstance(mistake, dict) and mistake is not OFFICIAL
        else mistake,
    )
    text = refusal(path)
    assert text.startswith(f"{path}: item 2: ")
    assert message.replace("{folder}", str(folder)) in text


def test_a_broken_or_empty_official_file_is_refused(folder: Path) -> None:
    path = official(folder)
    assert refusal(path).startswith(f"{path}: an empty list")
    path.write_text('[\n{"dataset": }\n]')
    assert refusal(path).startswith(f"{path}:2: not a valid JSON list (Expecting value")


# --------------------------------------------------------------------------------------------------
# read when asked for


def test_samples_that_are_read_when_they_are_asked_for_are_those_of_the_file(folder: Path) -> None:
    lines = [
        changed(
            id=f"{i}",
            question=f"what is ü{i}",
            image=f"images/{'ab'[i % 2]}.png",
            boxes=GOOD["boxes"] if i % 3 else [],
        )
        for i in range(7)
    ]
    path = folder / "samples.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b"\r\n\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
    )
    official_file = official(folder, OFFICIAL, {**OFFICIAL, "question_id": 8})
    for file in (path, official_file):
        samples = SampleFile(file)
        assert list(samples) == samples[:] == read_samples(file)
        assert (samples[-1], samples[1:3]) == (samples[len(samples) - 1], list(samples)[1:3])
        with pytest.raises(IndexError):
            samples[len(samples)]
    samples = SampleFile(path)
    assert list(samples.boxed) == [0, 1, 1, 0, 1, 1, 0]
    assert [samples.pictures.index(n) for n in samples.pictures] == [0, 1, 0, 1, 0, 1, 0]


def test_they_are_refused_as_a_whole_and_where_the_file_changes(folder: Path) -> None:
    with pytest.raises(DataError, match=r"samples\.jsonl:2: id: 'a' is already taken by line 1"):
        SampleFile(jsonl(folder, GOOD, GOOD))
    samples = SampleFile(jsonl(folder, GOOD, changed(id="b")))
    jsonl(folder, changed(question="a longer question than before"), changed(id="b"))
    with pytest.raises(DataError, match="was changed while it was read"):
        samples[1]


def test_a_file_that_is_there_twice_over_is_read_once_more_and_not_once_for_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(folder, *[changed(id=f"{i}") for i in range(40)] * 2)
    reads: list[Path] = []
    read = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    _, problems = placed_samples(path)
    reasons = [str(p).partition("; ")[0] for p in problems]
    assert reasons == [
        f"{path}:{i + 41}: id: '{i}' is already taken by line {i + 1}" for i in range(40)
    ]
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "<image>\nwhat is red"}, "question: contains <image>, which would be read"),
        ({"bbox_2d": [[1, 2, 3, 4]]}, "bbox_2d: is not a field here; 'boxes' is meant"),
        ({"Boxes": []}, "Boxes: is not a field here; 'boxes' is meant"),
        ({"question": None, "problem": "q"}, "problem: is not a field here; 'question' is meant"),
        ({"question": None, "conversations": []}, "conversations: is not a field here; write `qu"),
        ({"question": "what is <image_1>"}, "question: contains <image_1>, which would be read"),
        ({"question": "<IMAGE> what is red"}, "question: contains <IMAGE>, which would be read"),
        ({"question": "what is <ref-object>"}, "question: contains <ref-object>, which would be"),
        ({"boundingBox": [[1, 2, 3, 4]]}, "boundingBox: is not a field here; 'boxes' is meant"),
        ({"boxes": ..., "gt_bbox": [[1, 2, 3, 4]]}, "gt_bbox: is not a field here; write its"),
        ({"boxes": ..., "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects.bbox: is not a field here"),
        ({"boxes": [], "system": "be brief"}, "system: is read by other trainers and has no"),
        ({"boxes": ..., "annotations": [{"bbox": [1, 2]}]}, "annotations[0].bbox: is not a field"),
        ({"boxes": [[10, 20, 900, 990]]}, "looks like pixels, or like the scale 0 to 1000"),
    ],
)
def test_names_and_marks_of_other_formats_are_told(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    assert message in refusal(jsonl(folder, changed(**fields)))


def test_other_data_beside_the_fields_is_left_alone(folder: Path) -> None:
    other = {"gt_bbox": [[1, 2, 3, 4]], "objects": {"bbox": [[1, 2, 3, 4]]}, "system": None}
    assert read_samples(jsonl(folder, changed(prompt="x", output="y", file_name="z", **other)))


def test_a_picture_may_be_named_in_the_other_form_of_its_letters(folder: Path) -> None:
    (folder / "images" / "a.png").rename(folder / "images" / "cafe\u0301.png")
    (sample,) = read_samples(jsonl(folder, changed(image="images/caf\u00e9.png")))
    assert sample.images[0].is_file()
