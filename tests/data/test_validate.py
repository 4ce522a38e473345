"""Every planted fault of a data file is found at its line, and a clean file gives no word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from lvr_lite.data.convert.convert import Options, convert
from lvr_lite.data.rows import Problem
from lvr_lite.data.validate import validate
from lvr_lite.errors import DataError
from lvr_lite.model.checkpoint import processor_of
from lvr_lite.toy.make import write_scenes

TINY = processor_of("tiny")


def problems_of(*files: Path, test: Path | None = None) -> list[Problem]:
    return [problem for _, problems in validate(files, TINY, test) for problem in problems]


def picture(path: Path, seed: int, size: tuple[int, int] = (96, 64)) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def good(number: int, **changes: Any) -> dict[str, Any]:
    sample = {
        "id": f"s{number}",
        "image": f"images/{number}.png",
        "question": "what colour is the star",
        "answer": "red",
        "choices": ["red", "blue"],
        "boxes": [[0.1, 0.2, 0.5, 0.6]],
        "type": "colour",
        "pair": None,
    }
    return {k: v for k, v in {**sample, **changes}.items() if v is not ...}


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


FAULTS: list[tuple[Any, str]] = [
    ("{'id': 'x'}", "not valid JSON"),
    ("[1, 2]", "must be an object"),
    ({"id": ...}, "id: is missing"),
    ({"id": "s0"}, "id: 's0' is already taken by line 1"),
    ({"image": "images/gone.png"}, "does not exist"),
    ({"image": "images/text.png"}, "not a picture that Pillow can read"),
    ({"image": "images/empty.png"}, "an empty file"),
    ({"image": "images/cut.png"}, "a damaged picture"),
    ({"image": "images/long.png"}, "one side more than 200 times the other"),
    ({"question": " "}, "question: is empty"),
    ({"question": "what is <|image_pad|>"}, "question: contains <|image_pad|>"),
    ({"answer": 4}, "answer: must be text, not a number"),
    ({"answer": "green"}, "answer: 'green' is not among the choices"),
    ({"choices": ["red", "red"]}, "choices: 'red' is there twice"),
    ({"choices": []}, "choices: must be a list of at least one answer"),
    ({"boxes": [[10, 20, 50, 60]]}, "looks like pixels"),
    ({"boxes": [[-0.1, 0.2, 0.5, 0.6]]}, "lies outside the picture"),
    ({"boxes": [[0.5, 0.2, 0.1, 0.6]]}, "is inverted"),
    ({"boxes": [[0.5, 0.2, 0.5, 0.6]]}, "is empty; width and height"),
    ({"boxes": [[0.5, 0.2, 0.6]]}, "must be four numbers"),
    ({"boxes": [[0.1, float("nan"), 0.5, 0.6]]}, "holds NaN"),
    ({"boxes": ..., "bbox": [0.1, 0.2, 0.5, 0.6]}, "bbox: is not a field here; 'boxes' is meant"),
    (
        {"image": "images/1.png", "answer": "blue"},
        "answer: 'blue', and line 2 answers 'red' to the same question about the same picture",
    ),
    ({"image": "images/copy.bmp", "answer": "blue"}, "answer: 'blue', and line 2 answers 'red'"),
    (
        {"image": "images/tested.png"},
        "is also in {test} (line 1); a picture may be in one of them only",
    ),
    ({"image": "images/tested-turned.jpg.png", "question": "and here"}, "is also in {test}"),
]
NOTES: list[tuple[dict[str, Any], str]] = [
    (
        {"boxes": [[0.5, 0.5, 0.55, 0.55]]},
        "note: boxes[0]: covers 0.015 of a visual token (3 x 2 of the picture)",
    ),
    ({"boxes": [[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]]}, "note: boxes[1]: is the whole picture"),
    ({"boxes": [[0.1, 0.2, 0.5, 0.6]] * 2}, "note: boxes[1]: is there twice"),
    (
        {"image": "images/1.png"},
        "note: question: asked and answered in line 2 about the same picture",
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    for i in range(3 + len(FAULTS) + len(NOTES)):
        picture(images / f"{i}.png", i)
    with Image.open(images / "1.png") as one:
        one.save(images / "copy.bmp")
    (images / "text.png").write_text("no picture at all")
    (images / "empty.png").write_bytes(b"")
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:-200])
    Image.new("RGB", (804, 4)).save(images / "long.png")
    picture(images / "tested.png", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(images / "tested.png") as tested:
        tested.transpose(Image.Transpose.ROTATE_90).save(
            images / "tested-turned.jpg.png", exif=exif
        )
    return tmp_path


def test_each_of_the_planted_faults_is_found_at_its_line_and_nothing_else(folder: Path) -> None:
    test = write(folder / "test.jsonl", good(900, image="images/tested.png"))
    faults = [
        fault if isinstance(fault, str) else good(i, **fault)
        for i, (fault, _) in enumerate(FAULTS, 2)
    ]
    path = write(folder / "train.jsonl", good(0), good(1), *faults)
    problems = problems_of(path, test=test)
    assert len(FAULTS) >= 20
    assert [(p.line, p.note) for p in problems] == [(i, False) for i in range(3, 3 + len(FAULTS))]
    for problem, (_, message) in zip(problems, FAULTS, strict=True):
        assert message.replace("{test}", str(test)) in str(problem)
        assert str(problem).startswith(f"{path}:{problem.line}: ")
        assert "\n" not in str(problem)
    ((samples, _),) = validate([path], TINY, test)
    assert samples == 2


def test_what_training_would_not_get_wrong_is_a_note(folder: Path) -> None:
    notes = [good(i, **change) for i, (change, _) in enumerate(NOTES, 2)]
    path = write(folder / "train.jsonl", good(0), good(1), *notes)
    problems = problems_of(path)
    assert [(p.line, p.note) for p in problems] == [(i, True) for i in range(3, 3 + len(NOTES))]
    for problem, (_, message) in zip(problems, NOTES, strict=True):
        assert message in str(problem)


def test_whether_a_box_is_small_depends_on_the_model(folder: Path) -> None:
    path = write(folder / "train.jsonl", good(0, boxes=[[0.5, 0.5, 0.8, 0.8]]))
    assert problems_of(path) == []
    image = replace(TINY.image, min_pixels=28, max_pixels=28 * 28)
    ((_, problems),) = validate([path], replace(TINY, image=image))
    assert [p.field for p in problems] == ["boxes[0]"]


def test_clean_scenes_give_no_word(tmp_path: Path) -> None:
    train, test = (
        write_scenes(tmp_path / "a", 60, 0, "train"),
        write_scenes(tmp_path / "b", 60, 0, "test"),
    )
    assert problems_of(train, test) == []
    assert problems_of(train, test=test) == []


def test_converted_sets_give_no_word(tmp_path: Path) -> None:
    images, annotations = [], []
    for i in range(12):
        picture(tmp_path / "images" / f"{i}.png", i, (320, 240))
        images.append({"id": i, "file_name": f"{i}.png", "width": 320, "height": 240})
        boxes = [[10 + 5 * i, 20, 80, 60], [200, 100 + i, 50, 90]]
        annotations += [
            {"id": 2 * i + j, "image_id": i, "category_id": 1 + (i + j) % 3, "bbox": box}
            for j, box in enumerate(boxes)
        ]
    source = tmp_path / "instances.json"
    categories = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "bird"), 1)]
    source.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    convert(source, tmp_path / "set.jsonl", "coco", Options(test_share=0.3, per_image=20))
    assert problems_of(tmp_path / "set-train.jsonl", tmp_path / "set-test.jsonl") == []


def test_files_that_are_given_together_may_share_no_picture(folder: Path) -> None:
    one = write(folder / "one.jsonl", good(0), good(1))
    two = write(folder / "two.jsonl", good(2), good(3, image="images/copy.bmp"))
    (problem,) = problems_of(one, two)
    assert (
        str(problem) == f"{one}:2: image: {folder}/images/1.png is also in {two} (line 2); "
        "a picture may be in one of them only"
    )


def test_an_official_list_is_checked_with_its_pictures(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "<lvr>\n<answer> A star. </answer>"},
    ]
    items = [
        {
            "question_id": i,
            "image": [f"images/{name}"],
            "conversations": turns,
            "bboxes": [[0.1, 0.2, 0.5, 0.6]],
        }
        for i, name in enumerate(("0.png", "cut.png"))
    ]
    path = folder / "lvr.json"
    path.write_text(json.dumps(items))
    (problem,) = problems_of(path)
    assert str(problem).startswith(
        f"{path}: item 2: image: {folder}/images/cut.png: a damaged picture"
    )


def test_a_test_set_that_is_wrong_itself_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        problems_of(write(folder / "one.jsonl", good(0)), test=folder / "none.jsonl")


@pytest.mark.parametrize("token", ["<row_1_col_1>", "<end_of_utterance>", "[PAD]", "<tool_call>"])
def test_every_control_token_of_the_model_is_named(folder: Path, token: str) -> None:
    processor = processor_of("tiny")
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.add_special_tokens(["<row_1_col_1>", "<end_of_utterance>"])
    tokenizer.add_tokens(["[PAD]", "<tool_call>", "plain"])
    picture = folder / "token.png"
    Image.new("RGB", (60, 60)).save(picture)
    fields = {"image": "token.png", "answer": "plain"}
    lines = [
        {"id": "1", "question": "plain row_1_col_1"} | fields,
        {"id": "2", "question": f"what {token} is"} | fields,
    ]
    path = folder / "tokens.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    ((good, problems),) = validate([path], replace(processor, tokenizer=tokenizer))
    assert good == 1
    assert [str(p) for p in problems] == [
        f"{path}:2: question: contains {token}, which the model reads as a control token; "
        "leave it out"
    ]
