"""Data files of strangers: refused in one line, whatever stands in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lvr_lite.commands.data import convert_data, validate_data
from lvr_lite.errors import DataError, LvrError
from lvr_lite.eval.benchmark_files import is_below

COCO = {
    "images": [{"id": 1, "file_name": "p.png", "width": 20, "height": 20}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 10, 10]}],
}
REGION = {
    "id": "r",
    "type": "rectanglelabels",
    "original_width": 20,
    "original_height": 20,
    "value": {"x": 1, "y": 1, "width": 50, "height": 50, "rectanglelabels": ["cat"]},
}
TASK = {"id": 1, "data": {"image": "p.png"}, "annotations": [{"id": 1, "result": [REGION]}]}
TURNS = [
    {"from": "human", "value": "<image>\nq"},
    {"from": "gpt", "value": "<lvr>\n<answer>a</answer>"},
]
LVR = {"question_id": 1, "image": ["p.png"], "bboxes": [[0, 0, 1, 1]], "conversations": TURNS}
VISCOT = {"image": "p.png", "dataset": "d", "question": "q", "answer": "a", "bboxs": [[1, 1, 5, 5]]}
SAMPLE = {"id": "a", "image": "p.png", "question": "q", "answer": "x", "boxes": [[0, 0, 1, 1]]}
DOCUMENTS = {
    "coco": COCO,
    "labelstudio": [TASK],
    "lvr": [LVR],
    "viscot": [VISCOT],
    "samples": SAMPLE,
}
EVIL: tuple[object, ...] = (
    *(None, "", 0, -1, 1e308, float("inf"), float("nan"), 10**400, True, [], {}, [[]], [1] * 5),
    *("\0", "\ud800", "../" * 50 + "x", "x" * 5000, "é" * 400, "9" * 5000, "/dev/zero"),
    *("file:///dev/zero", "http://[::1", "%00", "C:\\x"),
)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a document."""
    yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, part in inside:
            yield from (
                places(part, (*place, key)) if isinstance(part, dict | list) else [(*place, key)]
            )


def with_value(document: Any, place: tuple[Any, ...], value: object) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


@pytest.mark.parametrize("form", DOCUMENTS)
def test_any_value_in_any_field_gives_samples_or_one_line(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "p.png")
    source = tmp_path / ("in.jsonl" if form == "samples" else "in.json")
    for place in places(DOCUMENTS[form]):
        for value in EVIL:
            source.write_text(json.dumps(with_value(DOCUMENTS[form], place, value)), "utf-8")
            try:
                if form == "samples":
                    problems = [p for v in validate_data([source]) for p in v.problems]
                else:
                    problems = convert_data(source, tmp_path / "out.jsonl", form).problems
                lines = list(map(str, problems))
            except LvrError as error:
                lines = [str(error)]
            for line in lines:
                assert "\n" not in line
                line.encode()
    assert {path.name for path in tmp_path.iterdir()} <= {"p.png", source.name, "out.jsonl"}


def yolo(folder: Path, description: str, label: str = "0 0.5 0.5 0.2 0.2") -> Path:
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "images" / "p.png")
    (folder / "labels" / "p.txt").write_text(label, encoding="utf-8")
    (folder / "data.yaml").write_text(description, encoding="utf-8")
    return folder


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (BOMB + "names: [*i]\n", "aliases"),
        ("names: " + "[" * 50_000, "not valid YAML"),
        ("names:\n " + "- " * 50_000, "not valid YAML"),
        ("names: [" + "x, " * 100_000 + "]", "more than 256 KiB"),
        ("names: {0: cat, 1: " + "9" * 5000 + "}", "not valid YAML"),
        ("names: [cat]\ndate: 2001-99-99\n", "not valid YAML"),
        ("names: [!!python/object/apply:os.system [ls]]", "not valid YAML"),
        ("names: [cat]\ntrain: secret.json\n", "neither a folder nor a .txt"),
    ],
)
def test_a_hostile_data_yaml_is_refused(tmp_path: Path, description: str, said: str) -> None:
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        convert_data(yolo(tmp_path, description), tmp_path / "out.jsonl", "yolo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "label", ["9" * 5000 + " 0.5 0.5 0.2 0.2", "0 " + "9" * 5000, "\0", "0 nan 0 0 0"]
)
def test_a_hostile_label_is_a_problem_of_its_line(tmp_path: Path, label: str) -> None:
    done = convert_data(yolo(tmp_path, "names: [cat]", label), tmp_path / "out.jsonl", "yolo")
    assert [problem.line for problem in done.problems] == [1]


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "C:\\x.png", "\\x.png"]
)
def test_a_benchmarks_pictures_lie_below_its_folder(name: str) -> None:
    assert not is_below(name)
    assert is_below("a/x.png")
