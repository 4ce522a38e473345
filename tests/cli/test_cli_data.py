"""`lvr-lite data`; what is read, converted and checked is tested in tests/data."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Refused
from PIL import Image


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("data make --out OUT --split dev", 2, "--split dev: must be train or test"),
        ("data make --out OUT --as voc", 2, "--as voc: must be samples or coco"),
        ("data make --out OTHERS", 1, "others: "),
        ("data make --out PICTURE/under", 1, "cannot be written"),
        ("data convert --from voc SCENES OUT", 2, "--from voc: must be coco, yolo, labelstudio"),
        ("data validate SCENES --model nosuch", 1, "nosuch: no such folder"),
        ("data validate SCENES --against-test none.jsonl", 1, "none.jsonl: cannot be read"),
        ("data preview SCENES --model EMPTY", 1, "config.json: missing"),
        ("data preview none.jsonl", 1, "none.jsonl: cannot be read"),
        ("data preview BROKEN --out OUT", 1, "broken.jsonl:3: not valid JSON"),
        ("data preview SCENES --out PICTURE/under.png", 1, "cannot be written"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


def test_a_full_disk_leaves_no_scenes(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    done = call("data", "make", "--out", tmp_path / "scenes", "--count", 2)
    assert done.code == 1
    assert "No space left on device" in done.error
    assert list(tmp_path.iterdir()) == []


def test_scenes_are_made_validated_and_shown(call: Call, tmp_path: Path) -> None:
    options = ("--count", 3, "--seed", 2, "--split", "test")
    done = call("data", "make", "--out", tmp_path / "scenes", *options)
    path = tmp_path / "scenes" / "test.jsonl"
    assert (done.code, done.err) == (0, f"{path}: 3 questions\n")
    done = call("data", "validate", path)
    assert (done.code, done.out) == (0, "")
    assert done.err == f"{path}: 3 good samples, 0 problems\n"
    sheet = tmp_path / "sheet.png"
    done = call("data", "preview", path, "--out", sheet, "--count", 2)
    assert (done.code, done.err) == (0, f"{sheet}: 2 of 3 samples\n")
    with Image.open(sheet) as image:
        assert image.width > 320


def write_coco(file: Path, boxes: list[list[int]]) -> None:
    """A COCO set with a picture and one cat for each box."""
    images = []
    annotations = []
    for i, box in enumerate(boxes):
        Image.new("RGB", (60, 90), (100, 40 * i, 30)).save(file.parent / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 60, "height": 90})
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
    content = {"images": images, "annotations": annotations}
    file.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "cat"}]}))


def test_a_detection_set_is_converted_split_validated_and_shown(call: Call, tmp_path: Path) -> None:
    source, target = tmp_path / "coco.json", tmp_path / "set.jsonl"
    train, test = tmp_path / "set-train.jsonl", tmp_path / "set-test.jsonl"
    write_coco(source, [[10, 10, 30, 40]] * 4)
    options = ("--test-share", 0.25, "--seed", 3)
    done = call("data", "convert", "--from", "coco", source, target, *options)
    assert (done.code, done.out) == (0, "")
    summary = rf"{train}: \d questions and {test}: \d questions about 4 pictures \(.*exactly \d.*\)"
    assert re.fullmatch(f"{summary}\n", done.err)
    assert call("data", "validate", train, "--against-test", test).code == 0
    assert call("data", "preview", test, "--out", tmp_path / "sheet.png").code == 0
    leaking = call("data", "validate", train, "--against-test", train)
    assert leaking.code == 1
    assert "a picture may be in one of them only" in leaking.out


def test_broken_rows_are_named_and_left_out_when_asked(call: Call, tmp_path: Path) -> None:
    source, target = tmp_path / "coco.json", tmp_path / "new.jsonl"
    write_coco(source, [[10, 10, 30, 40], [10, 10, 0, 40]])
    convert = ("data", "convert", "--from", "coco", source, target)
    done = call(*convert)
    assert (done.code, target.exists()) == (1, False)
    assert done.out.startswith(f"{source}: annotations[1] (id 1): bbox: [10, 10, 10, 50] is empty")
    assert done.err.startswith(f"{source}: 1 broken rows, nothing was written; mend them, or")
    without = call(*convert, "--skip-broken")
    assert (without.code, without.out, target.exists()) == (0, done.out, True)
    assert "1 broken rows" in without.err


def test_notes_are_printed_and_are_no_problem(call: Call, scenes: Path, tmp_path: Path) -> None:
    sample = json.loads(scenes.read_text().splitlines()[0])
    changes = {"image": str(scenes.parent / sample["image"]), "boxes": [[0, 0, 1, 1]]}
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(sample | changes))
    done = call("data", "validate", path)
    assert (done.code, done.err) == (0, f"{path}: 1 good samples, 0 problems, 1 notes\n")
    assert done.out == f"{path}:1: note: boxes[0]: is the whole picture: no place to look at\n"


def test_every_problem_of_a_file_is_listed(call: Call, scenes: Path, tmp_path: Path) -> None:
    samples = [json.loads(line) for line in scenes.read_text().splitlines()]
    for sample in samples:
        sample["image"] = str(scenes.parent / sample["image"])
    samples[1]["boxes"] = [[0, 0, 300, 2]]
    del samples[2]["answer"]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([*map(json.dumps, samples), "{\n"]))
    done = call("data", "validate", path)
    assert done.code == 1
    places = [line.split(": ")[0] for line in done.out.splitlines()]
    assert places == [f"{path}:2", f"{path}:3", f"{path}:5"]
    assert done.err == f"{path}: 2 good samples, 3 problems\n"
