"""Other formats become samples: boxes on their objects to the pixel, whatever EXIF says, and broken
rows are named.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lvr_lite.data.convert.convert import Options, convert
from lvr_lite.data.sample_files import read_samples
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, LvrError, UsageError
from lvr_lite.model.images import open_picture
from lvr_lite.toy import questions
from lvr_lite.toy.make import write_scenes

WIDTH, HEIGHT = 48, 80  # upright
BOX = (6, 20, 26, 33)  # of the red rectangle, in upright pixels
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}


def turned(
    path: Path,
    orientation: int,
    boxes: dict[str, tuple[int, int, int, int]],
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Image.Image:
    """Writes a picture that shows `boxes` once its EXIF orientation is applied; gives the stored
    one.
    """
    upright = Image.new("RGB", size, (128, 128, 128))
    for name, box in boxes.items():
        upright.paste(COLOURS[name], box)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=exif)
    assert ImageOps.exif_transpose(Image.open(path)).tobytes() == upright.tobytes()
    return stored


def found_at(picture: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Where a colour is: x0, y0, x1, y1 in pixels."""
    rows, columns = np.nonzero((np.asarray(picture) == COLOURS[colour]).all(-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def assert_on(sample: Sample, colour: str) -> None:
    """The first box is the rectangle of this colour to the pixel."""
    picture = open_picture(sample.images[0])
    x0, y0, x1, y1 = sample.boxes[0]
    at = np.array(
        [x0 * picture.width, y0 * picture.height, x1 * picture.width, y1 * picture.height]
    )
    np.testing.assert_allclose(at, found_at(picture, colour), atol=1e-3)


def run(
    source: Path, form: str, target: Path | None = None, skip_broken: bool = False, **options: Any
) -> list[Sample]:
    target = target or source.parent / "out.jsonl"
    written, problems = convert(source, target, form, Options(**options), skip_broken)
    assert written is not None, "\n".join(map(str, problems))
    return read_samples(target)


def broken(source: Path, form: str, **options: Any) -> list[str]:
    """What is said of a source with broken rows, of which nothing is written."""
    target = source.parent / "out.jsonl"
    written, problems = convert(source, target, form, Options(**options))
    assert written is None
    assert not target.exists()
    return [str(p).removeprefix(f"{source}: ") for p in problems]


def as_xywh(box: Sequence[int]) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def coco(
    folder: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    names: tuple[str, ...] = tuple(COLOURS),
) -> Path:
    path = folder / "instances.json"
    categories = [
        {"id": i, "name": name, "supercategory": "thing"} for i, name in enumerate(names, 1)
    ]
    path.write_text(
        json.dumps(
            {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        )
    )
    return path


def image(number: int, name: str, size: tuple[int, int] | None = (WIDTH, HEIGHT)) -> dict[str, Any]:
    return {"id": number, "file_name": name} | (
        {} if size is None else {"width": size[0], "height": size[1]}
    )


def annotation(number: int, of: int, category: int, box: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": of,
        "category_id": category,
        "bbox": box,
        "area": 1,
        "iscrowd": 0,
        **more,
    }


# --------------------------------------------------------------------------------------------------
# boxes on their pixels


@pytest.mark.parametrize("frame", ["stored", "upright"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_coco_boxes_lie_on_their_objects_for_every_orientation_and_either_convention(
    tmp_path: Path, frame: str, suffix: str
) -> None:
    images, annotations = [], []
    for orientation in range(1, 9):
        name = f"{orientation}.{suffix}"
        stored = turned(tmp_path / name, orientation, {"red": BOX})
        of = stored if frame == "stored" else open_picture(tmp_path / name)
        images.append(image(orientation, name, of.size))
        annotations.append(
            annotation(100 + orientation, orientation, 1, as_xywh(found_at(of, "red")))
        )
    samples = run(coco(tmp_path, images, annotations), "coco")
    assert {s.images[0].name for s in samples if s.boxes} == {i["file_name"] for i in images}
    for sample in samples:
        if sample.boxes:
            assert_on(sample, "red")


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_what_coco_boxes_are_of_can_be_said_where_no_size_tells(tmp_path: Path, frame: str) -> None:
    images, annotations = [], []
    for orientation in range(1, 9):
        stored = turned(
            tmp_path / f"{orientation}.png", orientation, {"red": (3, 5, 9, 30)}, (40, 40)
        )
        of = stored if frame == "stored" else open_picture(tmp_path / f"{orientation}.png")
        images.append(
            image(orientation, f"{orientation}.png", None if orientation % 2 else (40, 40))
        )
        annotations.append(annotation(orientation, orientation, 1, as_xywh(found_at(of, "red"))))
    source = coco(tmp_path, images, annotations)
    for sample in run(source, "coco", boxes_are=frame):
        assert_on(sample, "red")
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options())
    assert "7 turned pictures whose boxes are taken as upright (--boxes-are)" in str(written)
    if frame == "upright":
        for sample in read_samples(tmp_path / "out.jsonl"):
            assert_on(sample, "red")


def test_what_is_said_overrules_a_size_that_tells_otherwise(tmp_path: Path) -> None:
    stored = turned(tmp_path / "a.png", 6, {"red": BOX})
    source = coco(
        tmp_path,
        [image(1, "a.png", (WIDTH, HEIGHT))],
        [annotation(1, 1, 1, as_xywh(found_at(stored, "red")))],
    )
    for sample in run(source, "coco", boxes_are="stored"):
        assert_on(sample, "red")


def yolo(
    folder: Path,
    labels: dict[str, str],
    names: Any = tuple(COLOURS),
    box: tuple[int, int, int, int] = BOX,
) -> Path:
    """images/NAME and labels/NAME for each name, and data.yaml."""
    import yaml

    for name, text in labels.items():
        turned(folder / "images" / name, 1, {"red": box})
        label = (folder / "labels" / name).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text)
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"names": list(names) if isinstance(names, tuple) else names})
    )
    return folder


def yolo_line(number: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    x0, y0, x1, y1 = box
    width, height = size
    values = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
    return f"{number} {' '.join(f'{v:.6f}' for v in values)}\n"


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_yolo_boxes_lie_on_their_objects_for_every_orientation(tmp_path: Path, frame: str) -> None:
    yolo(tmp_path, {})
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for orientation in range(1, 9):
        stored = turned(
            tmp_path / "images" / "train" / f"{orientation}.jpg.png", orientation, {"red": BOX}
        )
        of = (
            stored
            if frame == "stored"
            else open_picture(tmp_path / "images" / "train" / f"{orientation}.jpg.png")
        )
        (tmp_path / "labels" / "train" / f"{orientation}.jpg.txt").write_text(
            yolo_line(0, found_at(of, "red"), of.size)
        )
    samples = run(
        tmp_path, "yolo", tmp_path / "out.jsonl", boxes_are="stored" if frame == "stored" else None
    )
    assert len({s.images[0] for s in samples}) == 8
    for sample in samples:
        assert_on(sample, "red")


def studio(folder: Path, *tasks: dict[str, Any]) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps(list(tasks)))
    return path


def rectangle(
    box: tuple[float, float, float, float],
    label: str | None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    **more: Any,
) -> dict[str, Any]:
    w, h = size
    value = {
        "x": 100 * box[0] / w,
        "y": 100 * box[1] / h,
        "width": 100 * (box[2] - box[0]) / w,
        "height": 100 * (box[3] - box[1]) / h,
    }
    return {
        "id": more.pop("id", "r1"),
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": w,
        "original_height": h,
        "image_rotation": 0,
        "value": {**value, "rotation": 0, "rectanglelabels": [label] if label else [], **more},
    }


def task(
    number: int, name: str, *results: dict[str, Any], **annotation_fields: Any
) -> dict[str, Any]:
    return {
        "id": number,
        "data": {"image": name},
        "annotations": [{"id": 70 + number, "result": list(results), **annotation_fields}],
    }


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_label_studio_boxes_lie_on_their_objects_for_every_orientation(
    tmp_path: Path, frame: str
) -> None:
    tasks = []
    for orientation in range(1, 9):
        stored = turned(tmp_path / "pictures" / f"{orientation}.png", orientation, {"red": BOX})
        of = (
            stored
            if frame == "stored"
            else open_picture(tmp_path / "pictures" / f"{orientation}.png")
        )
        tasks.append(
            task(
                orientation,
                f"/data/local-files/?d=pictures/{orientation}.png",
                rectangle(found_at(of, "red"), "red", of.size),
            )
        )
    samples = run(studio(tmp_path, *tasks), "labelstudio")
    assert len({s.images[0] for s in samples}) == 8
    for sample in samples:
        assert_on(sample, "red")


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_visual_cot_boxes_lie_on_their_objects_for_every_orientation(
    tmp_path: Path, frame: str
) -> None:
    rows = []
    for orientation in range(1, 9):
        stored = turned(tmp_path / "flickr" / f"{orientation}.png", orientation, {"red": BOX})
        of = (
            stored
            if frame == "stored"
            else open_picture(tmp_path / "flickr" / f"{orientation}.png")
        )
        row = {
            "question": "What is red?",
            "answer": "A box.",
            "full_answer": "no",
            "image": f"{orientation}.png",
            "width": of.width,
        }
        rows.append(
            {
                **row,
                "height": of.height,
                "bboxs": [found_at(of, "red")],
                "dataset": "flickr",
                "split": "train",
            }
        )
    source = tmp_path / "viscot.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = run(source, "viscot")
    assert [s.id for s in samples] == [f"flickr-train-{i}-{i}" for i in range(1, 9)]
    assert {(s.question, s.answer, s.type, s.choices) for s in samples} == {
        ("What is red?", "A box.", "flickr", None)
    }
    for sample in samples:
        assert_on(sample, "red")


def official(number: int, name: str, box: list[float]) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "<lvr>\n<answer> A box. </answer>"},
    ]
    return {
        "dataset": "flickr",
        "split": "train",
        "question_id": number,
        "image": [name],
        "conversations": turns,
        "bboxes": [box],
    }


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_the_official_list_is_rewritten_with_its_boxes_on_their_objects(
    tmp_path: Path, frame: str
) -> None:
    items = []
    for orientation in range(1, 9):
        stored = turned(
            tmp_path / "pictures" / "flickr" / f"{orientation}.png", orientation, {"red": BOX}
        )
        of = (
            stored
            if frame == "stored"
            else open_picture(tmp_path / "pictures" / "flickr" / f"{orientation}.png")
        )
        box = np.array(found_at(of, "red")) / [of.width, of.height, of.width, of.height]
        items.append(official(orientation, f"flickr/{orientation}.png", box.tolist()))
    source = tmp_path / "lvr.json"
    source.write_text(json.dumps(items))
    boxes_are = "stored" if frame == "stored" else None
    samples = run(
        source,
        "lvr",
        tmp_path / "new" / "out.jsonl",
        images=tmp_path / "pictures",
        boxes_are=boxes_are,
    )
    assert [(s.id, s.question, s.answer) for s in samples] == [
        (f"flickr-train-{i}", "What is it?", "A box.") for i in range(1, 9)
    ]
    for sample in samples:
        assert_on(sample, "red")


def test_several_classes_each_keep_their_box_and_ids_tell_image_and_annotation(
    tmp_path: Path,
) -> None:
    boxes = {"red": BOX, "blue": (30, 40, 44, 78), "green": (2, 60, 12, 70)}
    turned(tmp_path / "a.png", 6, boxes)
    annotations = [
        annotation(500 + i, 77, i, as_xywh(box)) for i, box in enumerate(boxes.values(), 1)
    ]
    samples = run(coco(tmp_path, [image(77, "a.png")], annotations), "coco", per_image=50)
    numbers = dict(zip(boxes, range(501, 504), strict=True))
    for sample in samples:
        parts = sample.id.split("-")
        assert parts[0] == "77"
        shown = parts[-1].split("+") if sample.boxes else []
        assert len(shown) == len(sample.boxes)
        for number, box in zip(shown, sample.boxes, strict=True):
            (colour,) = [c for c, n in numbers.items() if str(n) == number]
            np.testing.assert_allclose(
                np.array(box) * [WIDTH, HEIGHT, WIDTH, HEIGHT], boxes[colour], atol=1e-3
            )
    assert {n for s in samples for n in s.id.split("-")[-1].split("+")} >= {"501", "502", "503"}


# --------------------------------------------------------------------------------------------------
# COCO


def test_crowds_are_skipped_counted_and_their_class_is_neither_counted_nor_absent(
    tmp_path: Path,
) -> None:
    images, annotations = [], []
    for i in range(8):
        turned(tmp_path / f"{i}.png", 1, {"red": (i, 20, i + 10, 33)})
        images.append(image(i, f"{i}.png"))
        annotations.append(annotation(10 + i, i, 1, [i, 20, 10, 13]))
        if i % 2:
            annotations.append(
                annotation(
                    20 + i,
                    i,
                    2,
                    [0, 0, 40, 40],
                    iscrowd=1,
                    segmentation={"counts": [], "size": [80, 48]},
                )
            )
            annotations.append(annotation(30 + i, i, 1, [0, 50, 40, 20], iscrowd=1))
        else:
            annotations.append(annotation(40 + i, i, 2, [30, 40, 10, 10]))
    source = coco(tmp_path, images, annotations)
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options(per_image=20))
    assert "left out: 8 crowd regions" in str(written)
    odd = [s for s in read_samples(tmp_path / "out.jsonl") if int(s.id.split("-")[0]) % 2]
    assert not [
        s
        for s in odd
        if s.type in ("count", "exactly", "place", "left-right", "above-below", "largest")
    ]
    assert not [
        s for s in odd if s.type == "exists" and s.answer == "no" and "green" not in s.question
    ]


def test_an_lvis_file_says_itself_which_classes_are_absent(tmp_path: Path) -> None:
    images, annotations = [], []
    for i in range(6):
        turned(tmp_path / f"{i}.png", 1, {"red": BOX})
        lists = {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]}
        images.append(
            {
                "id": i,
                "coco_url": f"http://host/val/{i}.png",
                "width": WIDTH,
                "height": HEIGHT,
                **(lists if i < 3 else {"neg_category_ids": []}),
            }
        )
        annotations += [
            annotation(10 + i, i, 1 if i < 3 else 2, as_xywh(BOX)),
            annotation(20 + i, i, 3, [30, 60, 10, 10]),
        ]
    samples = run(coco(tmp_path, images, annotations), "coco", per_image=20)
    assert {s.question for s in samples if s.answer == "no" and s.type == "exists"} == {
        "Is there any blue in the picture?"
    }
    assert not [s for s in samples if s.type in ("count", "exactly") and "red" in s.question]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, 3]),
            "annotations[1] (id 12): bbox: must be 4 numbers, not [1, 2, 3]",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=None),
            "annotations[1] (id 12): bbox: must be 4 numbers, not null",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, 0, 3]),
            "annotations[1] (id 12): bbox: [1, 2, 1, 5] is empty or inverted",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[1, 2, float("nan"), 3]),
            "annotations[1] (id 12): bbox: [1, 2, nan, 5] holds a value",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[10**400, 2, 1, 3]),
            "annotations[1] (id 12): bbox: [inf, 2, inf, 5] holds a value",
        ),
        (
            lambda d: d["annotations"][1].update(bbox=[30, 2, 40, 3]),
            "[30, 2, 70, 5] lies outside the picture of 48 x 80",
        ),
        (
            lambda d: d["annotations"][1].update(category_id=9),
            "annotations[1] (id 12): category_id 9 is not among the categories",
        ),
        (
            lambda d: d["annotations"][1].update(category_id=[1]),
            "annotations[1] (id 12): category_id: [1] is no id; write",
        ),
        (
            lambda d: d["annotations"][1].update(image_id=9),
            "annotations[1] (id 12): image_id 9 is not among the images",
        ),
        (
            lambda d: d["annotations"][1].update(id=11, image_id=1),
            "annotations[1] (id 11): id 11 is there twice",
        ),
        (lambda d: d["annotations"].insert(1, "no"), "annotations[1]: must be an object"),
        (
            lambda d: d["images"][1].update(file_name="gone.png"),
            "images[1]: gone.png is not in {folder}; name the folder of the pictures",
        ),
        (
            lambda d: d["images"][1].update(file_name="text.png"),
            "images[1]: {folder}/text.png is not a picture",
        ),
        (lambda d: d["images"][1].pop("file_name"), "images[1]: file_name is missing"),
        (
            lambda d: d["images"][1].update(width=100),
            "2.png has 48 x 80 pixels, and its boxes are of a picture of 100 x 80",
        ),
        (
            lambda d: d["images"][1].update(width=0),
            "images[1]: width and height must be more than 0",
        ),
        (lambda d: d["images"].insert(2, dict(d["images"][0])), "images[2]: id 1 is there twice"),
        (
            lambda d: d["categories"][2].update(name="<|lvr|>"),
            "categories[2]: the name of a class contains <|lvr|>",
        ),
        (
            lambda d: d["categories"].append({"id": 7}),
            "categories[3]: the name of a class must be text, not null",
        ),
    ],
)
def test_a_broken_coco_row_is_named_and_left_out_only_when_that_is_said(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    for i in (1, 2, 3):
        turned(tmp_path / f"{i}.png", 1, {"red": BOX, "blue": (30, 40, 40, 50)})
    (tmp_path / "text.png").write_text("no picture")
    annotations = [annotation(10 + i, i, 1, as_xywh(BOX)) for i in (1, 2, 3)] + [
        annotation(20 + i, i, 2, [30, 40, 10, 10]) for i in (1, 2, 3)
    ]
    source = coco(tmp_path, [image(i, f"{i}.png") for i in (1, 2, 3)], annotations)
    data = json.loads(source.read_text())
    change(data)
    source.write_text(json.dumps(data))
    messages = broken(source, "coco")
    assert any(message.replace("{folder}", str(tmp_path)) in line for line in messages), messages
    written, problems = convert(source, tmp_path / "out.jsonl", "coco", Options(), skip_broken=True)
    assert f"{len(problems)} broken rows" in str(written)
    assert len(problems) == len(messages) >= 1
    for sample in read_samples(tmp_path / "out.jsonl"):
        if sample.id.split("-")[-1] in ("11", "13"):
            assert_on(sample, "red")


def test_after_a_broken_box_its_class_is_not_counted_in_that_picture(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    annotations = [
        annotation(1, 1, 1, as_xywh(BOX)),
        annotation(2, 1, 1, [-30, 5, 10, 10]),
        annotation(3, 1, 2, [30, 40, 10, 10]),
    ]
    samples = run(coco(tmp_path, [image(1, "a.png")], annotations), "coco", skip_broken=True)
    assert samples
    assert not [s for s in samples if s.type in ("count", "exactly") and "red" in s.question]


def test_boxes_a_little_over_the_edge_are_cut_and_doubled_ones_count_once(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": (28, 60, WIDTH, HEIGHT)})
    box = [28, 60, WIDTH - 28 + 0.3, HEIGHT - 60 + 0.4]
    source = coco(
        tmp_path, [image(1, "a.png")], [annotation(1, 1, 1, box), annotation(2, 1, 1, box)]
    )
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options())
    assert "1 boxes that are there twice" in str(written)
    assert "2 boxes cut at the edge" in str(written)
    for sample in read_samples(tmp_path / "out.jsonl"):
        assert len(sample.boxes) == 1
        assert_on(sample, "red")


def test_coco_pictures_are_found_in_the_usual_places_unless_two_may_be_meant(
    tmp_path: Path,
) -> None:
    turned(tmp_path / "train2017" / "a.png", 1, {"red": BOX})
    (tmp_path / "annotations").mkdir()
    source = coco(
        tmp_path / "annotations", [image(1, "a.png")], [annotation(1, 1, 1, as_xywh(BOX))]
    )
    assert run(source, "coco")[0].images[0].resolve() == tmp_path / "train2017" / "a.png"
    turned(tmp_path / "val2017" / "a.png", 1, {"blue": BOX})
    (source.parent / "out.jsonl").unlink()
    (line,) = broken(source, "coco")
    assert line.startswith("images[0]: a.png may be ")
    (sample, *_) = run(source, "coco", images=tmp_path / "val2017")
    assert_on(sample, "blue")


def test_a_scaled_copy_of_a_picture_keeps_its_boxes(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 6, {"red": BOX})
    double = tuple(2 * v for v in BOX)
    for sample in run(
        coco(
            tmp_path,
            [image(1, "a.png", (2 * WIDTH, 2 * HEIGHT))],
            [annotation(1, 1, 1, as_xywh(double))],
        ),
        "coco",
    ):
        assert_on(sample, "red")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"images": []}', '{"images": {}, "annotations": [], "categories": []}', "\udcff"],
)
def test_what_is_no_coco_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    source = tmp_path / "c.json"
    source.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        DataError, match=r"c\.json: (not valid JSON|not a COCO instances file|not UTF-8)"
    ) as caught:
        convert(source, tmp_path / "out.jsonl", "coco", Options())
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# YOLO


def test_yolo_outlines_become_boxes_and_pictures_without_labels_have_no_objects(
    tmp_path: Path,
) -> None:
    x0, y0, x1, y1 = BOX
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, (y0 + y1) / 2)]
    outline = "2 " + " ".join(f"{x / WIDTH:.7f} {y / HEIGHT:.7f}" for x, y in corners) + "\n"
    yolo(tmp_path, {"train/a.png": outline, "train/c.png": outline}, names={0: "car", 2: "red_box"})
    turned(tmp_path / "images" / "val" / "b.png", 1, {})
    turned(tmp_path / "images" / "val" / "d.png", 1, {})
    samples = run(tmp_path, "yolo", tmp_path / "out.jsonl")
    assert {s.question for s in samples if s.type == "exists"} == {
        "Is there any red box in the picture?"
    }
    assert {(s.id.split("-")[0], s.answer) for s in samples if s.type == "exists"} <= {
        ("images/train/a.png", "yes"),
        ("images/train/c.png", "yes"),
        ("images/val/b.png", "no"),
        ("images/val/d.png", "no"),
    }
    for sample in samples:
        if sample.boxes:
            assert_on(sample, "red")


def test_a_yolo_set_is_read_from_its_yaml_with_paths_lists_and_splits(tmp_path: Path) -> None:
    root = tmp_path / "set"
    line = yolo_line(0, BOX, (WIDTH, HEIGHT))
    yolo(root, {"a/1.png": line, "b/2.png": line, "c/3.png": line})
    (root / "val.txt").write_text("./images/b/2.png\nimages/c/3.png\n")
    source = tmp_path / "my.yaml"
    source.write_text(
        "path: set\ntrain: [images/a]\nval: val.txt\ntest: images/gone\nnames:\n  0: red\n"
    )
    written, _ = convert(source, tmp_path / "all.jsonl", "yolo", Options())
    assert "splits written together (train, val; --split takes one)" in str(written)
    assert "1 splits that are not there (test: images/gone)" in str(written)
    samples = run(source, "yolo", tmp_path / "val.jsonl", split="val")
    assert {s.images[0].name for s in samples} == {"2.png", "3.png"}
    for sample in samples:
        assert_on(sample, "red")
    with pytest.raises(UsageError, match=r"--split dev: .* has train, val"):
        convert(source, tmp_path / "x.jsonl", "yolo", Options(split="dev"))


def test_keypoints_after_a_yolo_box_are_left_alone(tmp_path: Path) -> None:
    import yaml

    yolo(tmp_path, {"a.png": yolo_line(0, BOX, (WIDTH, HEIGHT)).strip() + " 0.1 0.1 2 0.9 0.9 2"})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"names": ["red"], "kpt_shape": [2, 3]}))
    for sample in run(tmp_path, "yolo", tmp_path / "out.jsonl"):
        assert_on(sample, "red")


@pytest.mark.parametrize("layout", ["roboflow", "flat"])
def test_other_yolo_layouts_and_classes_txt(tmp_path: Path, layout: str) -> None:
    line = yolo_line(1, BOX, (WIDTH, HEIGHT))
    places = {"roboflow": ("train/images/a.png", "train/labels/a.txt"), "flat": ("a.png", "a.txt")}[
        layout
    ]
    turned(tmp_path / places[0], 1, {"red": BOX})
    (tmp_path / places[1]).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / places[1]).write_text(line + "\n")
    if layout == "roboflow":
        (tmp_path / "data.yaml").write_text(
            "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['x', 'red']\n"
        )
    else:
        (tmp_path / "classes.txt").write_text("x\nred\n\n")
    samples = run(tmp_path, "yolo", tmp_path / "out.jsonl")
    assert any("red" in s.question for s in samples)
    for sample in samples:
        assert_on(sample, "red")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "has 4 values"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 6 values"),
        ("0 0.5 0.5 0.1 x", "holds what is no number"),
        ("7 0.5 0.5 0.1 0.1", "class 7 is not one of the 3"),
        ("red 0.5 0.5 0.1 0.1", "class red is not one"),
        ("0 0.5 0.5 0 0.1", "is empty or inverted"),
        ("0 0.5 0.5 nan 0.1", "holds a value that is no number"),
        ("0 24 40 10 10", "lies outside the picture of 1 x 1"),
        ("0 0.9 0.5 0.5 0.1", "lies outside the picture"),
    ],
)
def test_a_broken_yolo_line_is_named_with_its_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    good = yolo_line(0, BOX, (WIDTH, HEIGHT))
    yolo(tmp_path, {"a.png": f"{good}\n{line}\n"})
    written, problems = convert(tmp_path, tmp_path / "out.jsonl", "yolo", Options())
    assert written is None
    (problem,) = problems
    assert str(problem).startswith(f"{tmp_path / 'labels' / 'a.txt'}:3: ")
    assert message in str(problem)


def test_a_yolo_class_may_be_written_as_a_float(tmp_path: Path) -> None:
    number, rest = yolo_line(0, BOX, (WIDTH, HEIGHT)).split(maxsplit=1)
    yolo(tmp_path, {"a.png": f"{number}.0 {rest}"})
    for sample in run(tmp_path, "yolo"):
        assert_on(sample, "red")


def test_labels_without_a_picture_and_sets_without_names_labels_or_pictures_are_told(
    tmp_path: Path,
) -> None:
    yolo(tmp_path / "a", {"1.png": yolo_line(0, BOX, (WIDTH, HEIGHT))})
    (tmp_path / "a" / "labels" / "2.txt").write_text("")
    _, problems = convert(tmp_path / "a", tmp_path / "out.jsonl", "yolo", Options())
    assert [str(p) for p in problems] == [
        f"{tmp_path / 'a/labels/2.txt'}: labels without a picture; "
        "add the picture, or remove the labels"
    ]
    (tmp_path / "a" / "labels" / "2.txt").unlink()
    (tmp_path / "a" / "images" / "2.png").write_text("no picture")
    _, problems = convert(tmp_path / "a", tmp_path / "out.jsonl", "yolo", Options())
    assert [str(p) for p in problems] == [
        f"{tmp_path / 'a/images/2.png'}: is not a picture that Pillow can read; "
        "save it as PNG or JPEG"
    ]
    (tmp_path / "a" / "data.yaml").unlink()
    with pytest.raises(DataError, match="its classes have no names"):
        convert(tmp_path / "a", tmp_path / "out.jsonl", "yolo", Options())
    turned(tmp_path / "b" / "images" / "1.png", 1, {})
    (tmp_path / "b" / "classes.txt").write_text("red")
    with pytest.raises(DataError, match="none of its 1 pictures has labels"):
        convert(tmp_path / "b", tmp_path / "out.jsonl", "yolo", Options())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "classes.txt").write_text("red")
    with pytest.raises(DataError, match="holds no pictures"):
        convert(tmp_path / "c", tmp_path / "out.jsonl", "yolo", Options())


# --------------------------------------------------------------------------------------------------
# Label Studio


def test_a_turned_rectangle_becomes_the_box_around_it(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": (10, 20, 30, 30)})
    # 10 wide and 20 high, turned by 90 degrees about its upper left corner at (30, 20): it lies
    # left of and below that corner
    turned_by_90 = rectangle((30, 20, 40, 40), "red", rotation=90)
    for sample in run(studio(tmp_path, task(1, "a.png", turned_by_90)), "labelstudio"):
        assert_on(sample, "red")
    half = rectangle((20, 20, 30, 30), "red", rotation=45)
    (sample, *_) = run(studio(tmp_path, task(1, "a.png", half)), "labelstudio")
    side = 10 / np.sqrt(2)
    expected = np.array([20 - side, 20, 20 + side, 20 + 2 * side]) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    np.testing.assert_allclose(sample.boxes[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "a b.png",
        "/data/local-files/?d=other/root/pics/a%20b.png",
        "/data/upload/3/0a1b2c3d-a%20b.png",
        "s3://bucket/x/pics/a%20b.png",
        "https://host/pics/a%20b.png?token=1",
        "C:\\data\\pics\\a b.png",
    ],
)
def test_label_studio_pictures_are_found_by_the_end_of_their_path(
    tmp_path: Path, name: str
) -> None:
    turned(tmp_path / "x" / "pics" / "a b.png", 1, {"red": BOX})
    if name != "a b.png" and "upload" not in name:
        turned(tmp_path / "x" / "others" / "a b.png", 1, {"blue": BOX})
    (sample, *_) = run(
        studio(tmp_path, task(1, name, rectangle(BOX, "red"))), "labelstudio", images=tmp_path / "x"
    )
    assert_on(sample, "red")


def test_cancelled_and_missing_annotations_are_left_out_and_the_ground_truth_is_taken(
    tmp_path: Path,
) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    good, bad = rectangle(BOX, "red"), rectangle((0, 0, 5, 5), "blue")
    several = {
        "id": 4,
        "data": {"image": "a.png"},
        "annotations": [
            {"id": 1, "was_cancelled": True, "result": [bad]},
            {"id": 2, "result": [bad]},
            {"id": 3, "ground_truth": True, "result": [good]},
        ],
    }
    source = studio(
        tmp_path,
        several,
        task(5, "a.png", bad, was_cancelled=True),
        {"id": 6, "data": {"image": "a.png"}, "annotations": []},
    )
    written, _ = convert(source, tmp_path / "out.jsonl", "labelstudio", Options())
    assert (
        "2 cancelled annotations, 1 other annotations of a task, 2 tasks without an annotation"
        in str(written)
    )
    samples = read_samples(tmp_path / "out.jsonl")
    assert {s.id.split("-")[0] for s in samples} == {"4"}
    for sample in samples:
        assert_on(sample, "red")


def text(name: str, words: Any, kind: str = "textarea", **more: Any) -> dict[str, Any]:
    return {
        "id": "t",
        "type": kind,
        "from_name": name,
        "to_name": "image",
        "value": {"text" if kind == "textarea" else "choices": words},
        **more,
    }


def test_questions_and_answers_of_a_task_make_samples_of_its_rectangles(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    first, second = rectangle(BOX, "red", id="r1"), rectangle((30, 40, 40, 50), None, id="r2")
    question_result, answer_result = (
        text("question", ["What is it?", "Is it red?"]),
        text("answer", ["A box", "yes"]),
    )
    by_choice = text("colour", ["red"], "choices")
    tasks = [
        task(1, "a.png", first, second, question_result, answer_result),
        task(2, "a.png", first, second, text("my_question", "Which colour?"), by_choice),
        task(
            3,
            "a.png",
            first,
            second,
            text("question", ["Here?"]),
            text("answer", ["there"], id="r2"),
        ),
        {
            **task(4, "a.png", first),
            "data": {"image": "a.png", "question": "What?", "answer": "this"},
        },
        task(5, "a.png", second, by_choice),
    ]
    written, _ = convert(studio(tmp_path, *tasks), tmp_path / "out.jsonl", "labelstudio", Options())
    own = [s for s in read_samples(tmp_path / "out.jsonl") if s.type == "question"]
    assert [(s.id, s.question, s.answer, len(s.boxes)) for s in own] == [
        ("1-71-q0", "What is it?", "A box", 2),
        ("1-71-q1", "Is it red?", "yes", 2),
        ("2-72-q0", "Which colour?", "red", 2),
        ("3-73-r2-q0", "Here?", "there", 1),
        ("4-74-q0", "What?", "this", 1),
    ]
    np.testing.assert_allclose(
        np.array(own[3].boxes[0]) * [WIDTH, HEIGHT, WIDTH, HEIGHT], (30, 40, 40, 50), atol=1e-3
    )
    assert_on(own[0], "red")
    assert "1 rectangles without a class, 1 texts and choices without a question" in str(written)


@pytest.mark.parametrize(
    ("broken_task", "message"),
    [
        (
            {"id": 2, "image": "a.png", "label": []},
            "item 2: must be a task with data and annotations; export as JSON, not as JSON-MIN",
        ),
        (task(2, "gone.png", rectangle(BOX, "red")), "item 2: gone.png is not in "),
        (task(2, "a.png", rectangle(BOX, "red", width=-3)), "item 2: result[0] (id r1): "),
        (
            task(2, "a.png", rectangle(BOX, "red", x=None)),
            "item 2: result[0] (id r1): must be 4 numbers, not [null",
        ),
        (
            task(2, "a.png", rectangle(BOX, "red", rectanglelabels=[3])),
            "item 2: result[0] (id r1): the name of a class must be text",
        ),
        (
            task(2, "a.png", rectangle(BOX, "red") | {"image_rotation": 90}),
            "item 2: image_rotation: was turned in Label Studio",
        ),
        (
            task(2, "a.png", rectangle(BOX, "red", (100, 60))),
            "item 2: {folder}/a.png has 48 x 80 pixels, and its boxes are of",
        ),
        (
            task(
                2,
                "a.png",
                rectangle(BOX, "red"),
                text("question", ["a", "b"]),
                text("answer", ["c"]),
            ),
            "item 2: result: has 2 questions for 1",
        ),
        (
            task(
                2,
                "a.png",
                rectangle(BOX, "red"),
                text("question", ["<|lvr|>"]),
                text("answer", ["c"]),
            ),
            "item 2: question: contains <|lvr|>",
        ),
        (
            task(2, "data:image/png;base64," + "A" * 9000, rectangle(BOX, "red")),
            "item 2: data.image holds the picture itself",
        ),
        (task(2, "a" * 9000, rectangle(BOX, "red")), f"item 2: {'a' * 40}… names no picture"),
        ("task", "item 2: must be a task"),
    ],
)
def test_a_broken_task_is_named_with_its_item(
    tmp_path: Path, broken_task: Any, message: str
) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    (line,) = broken(
        studio(tmp_path, task(1, "a.png", rectangle(BOX, "red")), broken_task), "labelstudio"
    )
    assert line.startswith(message.replace("{folder}", str(tmp_path)))


def test_results_of_other_kinds_are_counted_and_their_class_is_not_counted_in_questions(
    tmp_path: Path,
) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    outline = {
        "id": "p",
        "type": "polygonlabels",
        "value": {"points": [[1, 1], [2, 2], [3, 1]], "polygonlabels": ["red"]},
    }
    source = studio(
        tmp_path,
        task(
            1, "a.png", rectangle(BOX, "red"), rectangle((30, 40, 40, 50), "blue", id="r2"), outline
        ),
    )
    written, _ = convert(source, tmp_path / "out.jsonl", "labelstudio", Options(per_image=20))
    assert "1 results of type polygonlabels" in str(written)
    samples = read_samples(tmp_path / "out.jsonl")
    assert [s for s in samples if s.type in ("count", "exactly") and "blue" in s.question]
    assert not [s for s in samples if s.type in ("count", "exactly") and "red" in s.question]


# --------------------------------------------------------------------------------------------------
# Visual-CoT and official


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, ":2: question: is empty"),
        ({"answer": 5}, ":2: answer: must be text, not a number"),
        ({"image": "gone.png"}, ":2: flickr/gone.png is not in "),
        ({"image": None}, ":2: image: is missing"),
        ({"bboxs": [[1, 2, 3]]}, ":2: bboxs: must be 4 numbers"),
        ({"bboxs": [[40, 2, 30, 5]]}, ":2: bboxs: [40, 2, 30, 5] is empty or inverted"),
        ({"bboxs": "1 2 3 4"}, ":2: bboxs: must be a list"),
        (
            {"bboxs": [[0.1, 0.2, 90, 0.5]]},
            ":2: bboxs: [0.1, 0.2, 90, 0.5] lies outside the picture of 48 x 80",
        ),
        ({"height": 30}, ":2: {folder}/a.png has 48 x 80 pixels"),
    ],
)
def test_a_broken_visual_cot_row_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    row = {
        "question": "q",
        "answer": "a",
        "image": "a.png",
        "width": WIDTH,
        "height": HEIGHT,
        "bboxs": [list(BOX)],
        "dataset": "flickr",
    }
    source = tmp_path / "v.jsonl"
    source.write_text(json.dumps(row) + "\n" + json.dumps({**row, **change}) + "\n\n" + "{\n")
    first, last = broken(source, "viscot")
    assert first.removeprefix(str(source)).startswith(message.replace("{folder}", str(tmp_path)))
    assert ":4: not valid JSON" in last
    assert len(run(source, "viscot", skip_broken=True)) == 1


def test_visual_cot_may_be_one_list_and_of_one_split(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    row = {
        "question": "q",
        "answer": "a",
        "image": "a.png",
        "width": WIDTH,
        "height": HEIGHT,
        "bboxs": [list(BOX)],
        "dataset": "flickr",
    }
    source = tmp_path / "v.json"
    source.write_text(json.dumps([{**row, "split": s} for s in ("train", "val")], indent=1))
    assert [s.id for s in run(source, "viscot", split="val")] == ["flickr-val-a-2"]
    with pytest.raises(UsageError, match="--split test: no row"):
        convert(source, tmp_path / "out.jsonl", "viscot", Options(split="test"))


def test_a_broken_official_item_is_named_with_its_place(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    source = tmp_path / "lvr.json"
    source.write_text(
        json.dumps(
            [official(1, "a.png", [0.1, 0.1, 0.2, 0.2]), official(2, "a.png", [0.3, 0.1, 0.2, 0.2])]
        )
    )
    (line,) = broken(source, "lvr")
    assert line.startswith("item 2: bboxes[0]: [0.3, 0.1, 0.2, 0.2] is inverted")


# --------------------------------------------------------------------------------------------------
# split and writing


def many(folder: Path, count: int, same: int = 0) -> Path:
    """`count` COCO pictures that differ, and after them `same` copies of the first ones under other
    names and in another format.
    """
    images, annotations = [], []
    for i in range(count + same):
        of = i % count
        turned(
            folder / f"{i}.{'png' if i < count else 'bmp'}",
            1,
            {"red": (of % 30, 10 + of, of % 30 + 12, 30 + of)},
        )
        images.append(image(i, f"{i}.{'png' if i < count else 'bmp'}"))
        annotations.append(annotation(i, i, 1, [of % 30, 10 + of, 12, 20]))
    return coco(folder, images, annotations)


def test_the_test_share_is_of_pictures_and_copies_stay_on_one_side(tmp_path: Path) -> None:
    source = many(tmp_path, 20, same=20)
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options(test_share=0.25))
    assert written is not None
    train, test = (read_samples(path) for path in written.files)
    assert [p.name for p in written.files] == ["out-train.jsonl", "out-test.jsonl"]
    assert not (tmp_path / "out.jsonl").exists()
    contents = [{open_picture(s.images[0]).tobytes() for s in side} for side in (train, test)]
    assert [len(c) for c in contents] == [15, 5]
    assert not contents[0] & contents[1]
    assert {s.images[0].name for s in train + test} == {
        f"{i}.{'png' if i < 20 else 'bmp'}" for i in range(40)
    }


def test_the_split_depends_on_seed_and_content_alone(tmp_path: Path) -> None:
    source = many(tmp_path, 12)

    def held(seed: int) -> set[str]:
        convert(source, tmp_path / "out.jsonl", "coco", Options(test_share=0.3, seed=seed))
        return {s.images[0].name for s in read_samples(tmp_path / "out-test.jsonl")}

    before = held(0)
    data = json.loads(source.read_text())
    data["images"].reverse()
    source.write_text(json.dumps(data))
    assert held(0) == before
    assert any(held(seed) != before for seed in (1, 2, 3))


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    source = many(tmp_path, 9)
    contents = []
    for _ in range(2):
        convert(source, tmp_path / "out.jsonl", "coco", Options())
        contents.append((tmp_path / "out.jsonl").read_bytes())
    assert contents[0] == contents[1]


def test_pictures_of_one_sample_stay_together(tmp_path: Path) -> None:
    items = []
    for i in range(10):
        turned(tmp_path / f"{i}.png", 1, {"red": (i, i, i + 10, i + 10)})
    for i in range(9):  # a chain: each sample has a picture of the one before
        item = official(i, f"{i}.png", [0.1, 0.1, 0.2, 0.2])
        human = {"from": "human", "value": "<image>\n<image>\nSame?"}
        items.append(
            {
                **item,
                "image": [f"{i}.png", f"{i + 1}.png"],
                "conversations": [human, item["conversations"][1]],
            }
        )
    source = tmp_path / "lvr.json"
    source.write_text(json.dumps(items))
    with pytest.raises(DataError, match="has 1 pictures that differ"):
        convert(source, tmp_path / "out.jsonl", "lvr", Options(test_share=0.2))
    source.write_text(json.dumps(items[:3] + items[5:]))
    written, _ = convert(source, tmp_path / "out.jsonl", "lvr", Options(test_share=0.2))
    assert written is not None
    assert sorted(written.files.values()) == [3, 4]


def test_a_damaged_picture_is_a_broken_row_where_contents_are_compared(tmp_path: Path) -> None:
    source = many(tmp_path, 5)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:-40])
    written, problems = convert(source, tmp_path / "out.jsonl", "coco", Options(test_share=0.3))
    assert written is None
    assert str(problems[0]).startswith(f"{tmp_path / '2.png'}: image: a damaged picture")
    written, _ = convert(
        source, tmp_path / "out.jsonl", "coco", Options(test_share=0.3), skip_broken=True
    )
    assert "1 broken rows" in str(written)


def test_pictures_are_named_relative_to_the_file_that_is_written_through_links_too(
    tmp_path: Path,
) -> None:
    source = many(tmp_path / "set", 3)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    samples = run(source, "coco", tmp_path / "link" / "out.jsonl")
    assert all(
        json.loads(line)["image"].startswith("../../set/")
        for line in (tmp_path / "link" / "out.jsonl").read_text().splitlines()
    )
    for sample in samples:
        assert sample.images[0].is_file()


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("voc", {}, "--from voc: must be coco, yolo, labelstudio, viscot or lvr"),
        ("coco", {"boxes_are": "left"}, "--boxes-are left: must be stored or upright"),
        ("coco", {"split": "train"}, "--split is for yolo and viscot"),
        ("yolo", {"images": Path()}, "--images: a YOLO set says where"),
        ("coco", {"images": Path("none")}, "--images none: no such folder"),
        ("coco", {"test_share": 1.5}, "--test-share 1.5: must be between 0 and 1"),
        ("coco", {"per_image": 0}, "--per-image 0: must be 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, form: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convert(many(tmp_path, 2), tmp_path / "out.jsonl", form, Options(**options))


def test_the_source_is_not_overwritten_and_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    source = many(tmp_path, 4)
    with pytest.raises(UsageError, match="is the source itself"):
        convert(source, source, "coco", Options())
    (tmp_path / "out-test.jsonl").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(LvrError, match=r"out-test\.jsonl: is a folder"):
        convert(source, tmp_path / "out.jsonl", "coco", Options(test_share=0.5))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(DataError, match="no such file or folder"):
        convert(tmp_path / "none.json", tmp_path / "out.jsonl", "coco", Options())


def test_a_source_that_supports_no_question_says_so(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {})
    with pytest.raises(DataError, match="gives no question"):
        convert(coco(tmp_path, [image(1, "a.png")], []), tmp_path / "out.jsonl", "coco", Options())


def test_scenes_written_as_coco_keep_their_boxes(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "photos", 12, 3, "train", coco=True)
    converted = run(path, "coco", tmp_path / "shapes.jsonl")
    drawn = {f"{name}.png": scene for name, scene, _, _ in questions.items(3, "train", 12)}
    counts = [s for s in converted if s.type == "count"]
    assert counts
    for sample in counts:
        scene = drawn[sample.images[0].name]
        wanted = sorted(tuple(scene.box(t)) for t in scene.figures if t.shape in sample.question)
        np.testing.assert_allclose(sorted(sample.boxes), wanted, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# what public bug reports of other converters show


def test_a_picture_of_another_folder_is_missing_and_not_found_by_its_name(tmp_path: Path) -> None:
    turned(tmp_path / "cam2" / "1.png", 1, {"red": BOX})
    images = [image(1, "cam1/1.png"), image(2, "cam2/1.png")]
    annotations = [annotation(1, 1, 1, as_xywh(BOX)), annotation(2, 2, 2, as_xywh(BOX))]
    (line,) = broken(coco(tmp_path, images, annotations), "coco")
    assert line.startswith("images[0]: cam1/1.png is not in ")
    assert "cam2/1.png lies in another folder" in line
    url = "/data/local-files/?d=root/cam1/1.png"
    (line,) = broken(studio(tmp_path, task(1, url, rectangle(BOX, "red"))), "labelstudio")
    assert line.startswith("item 1: root/cam1/1.png is not in ")


def test_what_is_found_by_the_end_of_its_path_alone_is_told(tmp_path: Path) -> None:
    turned(tmp_path / "pics" / "a.png", 1, {"red": BOX})
    source = studio(tmp_path, task(1, "/data/upload/3/0a1b2c3d-a.png", rectangle(BOX, "red")))
    written, _ = convert(source, tmp_path / "out.jsonl", "labelstudio", Options())
    told = "1 pictures found by the end of their path alone, such as 0a1b2c3d-a.png at "
    assert told in str(written)
    exact = studio(tmp_path, task(1, "pics/a.png", rectangle(BOX, "red")))
    written, _ = convert(exact, tmp_path / "out.jsonl", "labelstudio", Options())
    assert "found by" not in str(written)


@pytest.mark.parametrize("same", [True, False])
def test_two_records_of_one_file_must_agree(tmp_path: Path, same: bool) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    second = as_xywh(BOX) if same else [1, 1, 5, 5]
    source = coco(
        tmp_path,
        [image(1, "a.png"), image(2, "./a.png")],
        [annotation(1, 1, 1, as_xywh(BOX)), annotation(2, 2, 1, second)],
    )
    if same:
        written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options())
        assert "1 records of a picture that is there twice" in str(written)
        assert {s.boxes[0] for s in read_samples(tmp_path / "out.jsonl")}
        return
    (line,) = broken(source, "coco")
    assert "a.png is the picture of images (id 1) too, with other boxes" in line
    with pytest.raises(DataError, match="gives no question"):
        convert(source, tmp_path / "out.jsonl", "coco", Options(), skip_broken=True)


def two_pictures(tmp_path: Path, second: str) -> Path:
    turned(tmp_path / "before.png", 1, {"red": BOX})
    turned(tmp_path / "after.png", 1, {"blue": BOX})
    results = [
        rectangle(BOX, "red", id="a"),
        rectangle(BOX, "blue", id="b") | {"to_name": second},
    ]
    shown = task(1, "before.png", *results)
    shown["data"]["image2"] = "after.png"
    return studio(tmp_path, shown)


def test_rectangles_of_two_pictures_lie_each_on_its_own(tmp_path: Path) -> None:
    samples = run(two_pictures(tmp_path, "image2"), "labelstudio", per_image=20)
    classes = {"before.png": "red", "after.png": "blue"}
    assert {s.images[0].name for s in samples} == set(classes)
    for sample in samples:
        if sample.boxes:
            assert_on(sample, classes[sample.images[0].name])


def test_rectangles_of_a_picture_that_the_task_does_not_name_are_left_out(tmp_path: Path) -> None:
    source = two_pictures(tmp_path, "other")
    written, _ = convert(source, tmp_path / "out.jsonl", "labelstudio", Options())
    assert "1 results of a picture that no field of data names (other)" in str(written)
    assert {s.images[0].name for s in read_samples(tmp_path / "out.jsonl")} == {"before.png"}


@pytest.mark.parametrize(
    "other",
    [
        {"type": "relation", "from_id": "r1", "to_id": "r2"},
        {"id": "x", "type": "rating", "to_name": "image", "value": {"rating": 4}},
        {"id": "r1", "type": "number", "to_name": "image", "value": {"x": 1, "number": 4}},
        {"id": "x", "type": "datetime", "to_name": "image", "value": {"datetime": "2026"}},
    ],
)
def test_what_marks_no_region_hides_no_object(tmp_path: Path, other: dict[str, Any]) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    source = studio(tmp_path, task(1, "a.png", rectangle(BOX, "red"), other))
    written, _ = convert(source, tmp_path / "out.jsonl", "labelstudio", Options(per_image=20))
    assert f"1 results of type {other['type']}" in str(written)
    assert [s for s in read_samples(tmp_path / "out.jsonl") if s.type == "count"]


def test_an_unknown_kind_with_a_place_may_hide_an_object(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    other = {"id": "x", "type": "blob", "to_name": "image", "value": {"points": [[1, 2]]}}
    source = studio(tmp_path, task(1, "a.png", rectangle(BOX, "red"), other))
    with pytest.raises(DataError, match=r"left out: 1 results of type blob\)"):
        convert(source, tmp_path / "out.jsonl", "labelstudio", Options(absent=False, per_image=1))


def test_one_to_name_that_names_no_picture_is_told(tmp_path: Path) -> None:
    source = two_pictures(tmp_path, "img")
    tasks = json.loads(source.read_text())
    for result in tasks[0]["annotations"][0]["result"]:
        result["to_name"] = "img"
    written, _ = convert(studio(tmp_path, *tasks), tmp_path / "o.jsonl", "labelstudio", Options())
    assert "1 tasks of several pictures of which none is named as to_name is (img)" in str(written)


def test_label_studio_boxes_that_are_not_in_percent_are_told(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    pixels = rectangle(BOX, "red")
    pixels["value"] |= {"x": 120, "y": 30, "width": 60, "height": 40}
    (line,) = broken(studio(tmp_path, task(1, "a.png", pixels)), "labelstudio")
    assert "x 120, y 30, width 60, height 40 are not percent of the picture" in line
    fractions = rectangle(BOX, "red")
    fractions["value"] |= {"x": 0.1, "y": 0.2, "width": 0.4, "height": 0.5}
    source = studio(tmp_path, task(1, "a.png", fractions))
    written, _ = convert(source, tmp_path / "o.jsonl", "labelstudio", Options())
    assert "1 boxes within one percent of the upper left corner" in str(written)


def test_a_picture_given_as_an_object_and_predictions_are_told_as_they_are(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    as_object = task(1, "a.png", rectangle(BOX, "red")) | {"data": {"image": {"url": "a.png"}}}
    (line,) = broken(studio(tmp_path, as_object), "labelstudio")
    assert line.startswith("item 1: data.image is an object")
    guessed = task(1, "a.png") | {"annotations": [], "predictions": [{"result": []}]}
    source = studio(tmp_path, guessed)
    with pytest.raises(DataError, match="1 tasks without an annotation but with predictions"):
        convert(source, tmp_path / "o.jsonl", "labelstudio", Options())


def test_coco_numbers_may_be_text(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    as_text = [str(v) for v in as_xywh(BOX)]
    shown = image(1, "a.png")
    shown |= {key: str(shown[key]) for key in ("width", "height") if key in shown}
    (line,) = broken(coco(tmp_path, [shown | {"width": "wide", "height": 1}], []), "coco")
    assert line.startswith("images[0]: width and height must be 2 numbers, not [")
    samples = run(coco(tmp_path, [shown], [annotation(1, 1, 1, as_text)]), "coco")
    assert_on(samples[0], "red")


def test_labels_beside_a_rectangle_name_it(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    shape = rectangle(BOX, None)
    del shape["value"]["rectanglelabels"]
    label = shape | {"type": "labels", "value": shape["value"] | {"labels": ["red"]}}
    for results in ([shape | {"type": "rectangle"}, label], [label]):
        samples = run(studio(tmp_path, task(1, "a.png", *results)), "labelstudio")
        assert [s for s in samples if s.type in ("count", "exactly") and s.answer != "no"]
        for sample in samples:
            assert_on(sample, "red")


def test_a_list_of_pages_is_said_as_it_is(tmp_path: Path) -> None:
    pages = task(1, "a.png", rectangle(BOX, "red"))
    pages["data"]["image"] = ["a.png", "b.png"]
    (line,) = broken(studio(tmp_path, pages), "labelstudio")
    assert line.startswith("item 1: data.image is a list of 2 pages")


@pytest.mark.parametrize("crowd", ["0", "false", False, 0.0, None])
def test_coco_flags_and_ids_may_be_of_other_types(tmp_path: Path, crowd: object) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    source = coco(
        tmp_path,
        [image(1, "a.png") | {"id": "1"}],
        [annotation(1, 1, 1, as_xywh(BOX), iscrowd=crowd) | {"image_id": 1.0, "category_id": "1"}],
    )
    for sample in run(source, "coco"):
        assert_on(sample, "red")


def test_coco_flags_that_are_none_are_named(tmp_path: Path) -> None:
    turned(tmp_path / "a.png", 1, {"red": BOX})
    source = coco(
        tmp_path, [image(1, "a.png")], [annotation(1, 1, 1, as_xywh(BOX), iscrowd="maybe")]
    )
    (line,) = broken(source, "coco")
    assert line.startswith('annotations[0] (id 1): iscrowd: "maybe" is neither yes nor no')


@pytest.mark.parametrize("unit", ["fractions", "thousandths"])
def test_the_unit_of_boxes_can_be_said_and_a_wrong_one_is_told(tmp_path: Path, unit: str) -> None:
    side = {"fractions": 1, "thousandths": 1000}[unit]
    turned(tmp_path / "a.png", 1, {"red": (12, 20, 36, 60)})
    scaled = [side * v for v in (0.25, 0.25, 0.5, 0.5)]
    source = coco(tmp_path, [image(1, "a.png")], [annotation(1, 1, 1, scaled)])
    (line,) = broken(source, "coco")
    assert f"--boxes {unit}" in line
    row = {"question": "q", "answer": "a", "image": "a.png", "width": WIDTH, "height": HEIGHT}
    corners = [side * v for v in (0.25, 0.25, 0.75, 0.75)]
    viscot = tmp_path / "v.jsonl"
    viscot.write_text(json.dumps(row | {"bboxs": [corners]}) + "\n")
    (line,) = broken(viscot, "viscot")
    assert f"--boxes {unit}" in line
    for sample in run(source, "coco", boxes=unit) + run(viscot, "viscot", boxes=unit):
        assert_on(sample, "red")


@pytest.mark.parametrize("unit", ["pixels", "thousandths"])
def test_fractions_may_be_pixels_or_thousandths(tmp_path: Path, unit: str) -> None:
    box = (12, 20, 36, 60)
    sides = {"pixels": (WIDTH, HEIGHT), "thousandths": (1000, 1000)}[unit]
    corners = [0.25 * sides[0], 0.25 * sides[1], 0.75 * sides[0], 0.75 * sides[1]]
    turned(tmp_path / "a.png", 1, {"red": box})
    line = {"id": "1", "image": "a.png", "question": "q", "answer": "a", "boxes": [corners]}
    source = tmp_path / "own.jsonl"
    source.write_text(json.dumps(line) + "\n")
    (told,) = broken(source, "lvr")
    assert f"--boxes pixels or {'thousandths'}" in told
    (sample,) = run(source, "lvr", boxes=unit)
    assert_on(sample, "red")
    labels = tmp_path / "yolo"
    x, y, w, h = sides[0] / 2, sides[1] / 2, sides[0] / 2, sides[1] / 2
    yolo(labels, {"a.png": f"0 {x} {y} {w} {h}\n"}, box=box)
    _, problems = convert(labels, tmp_path / "y.jsonl", "yolo", Options())
    assert "--boxes pixels or --boxes thousandths" in str(problems[0])
    for sample in run(labels, "yolo", tmp_path / "y.jsonl", boxes=unit):
        assert_on(sample, "red")


def test_boxes_of_large_pictures_that_may_be_thousandths_are_told(tmp_path: Path) -> None:
    Image.new("RGB", (1300, 1300)).save(tmp_path / "a.png")
    annotations = [annotation(i, 1, 1, [10, 10 * i, 900, 90]) for i in range(1, 4)]
    source = coco(tmp_path, [image(1, "a.png", (1300, 1300))], annotations)
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options())
    assert "say --boxes thousandths" in str(written)
    written, _ = convert(source, tmp_path / "out.jsonl", "coco", Options(boxes="pixels"))
    assert "thousandths" not in str(written)


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    yolo(tmp_path, {"a.png": yolo_line(0, BOX, (WIDTH, HEIGHT))})
    turned(tmp_path / "images" / ".ipynb_checkpoints" / "a-checkpoint.png", 1, {"red": BOX})
    (tmp_path / "images" / "._a.png").write_bytes(b"resource fork")
    samples = run(tmp_path, "yolo", tmp_path / "out.jsonl")
    assert {s.images[0].name for s in samples} == {"a.png"}


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    turned(tmp_path / "store" / "pics" / "a.png", 1, {"red": BOX})
    (tmp_path / "store" / "pics" / "loop").symlink_to(tmp_path / "store")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "store" / "pics")
    source = coco(tmp_path / "set", [image(1, "a.png")], [annotation(1, 1, 1, as_xywh(BOX))])
    for sample in run(source, "coco"):
        assert_on(sample, "red")
    labels = tmp_path / "yolo" / "labels" / "linked"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text(yolo_line(0, BOX, (WIDTH, HEIGHT)))
    (tmp_path / "yolo" / "images").mkdir()
    (tmp_path / "yolo" / "images" / "linked").symlink_to(tmp_path / "store" / "pics")
    (tmp_path / "yolo" / "classes.txt").write_text("red\n")
    assert run(tmp_path / "yolo", "yolo", tmp_path / "out.jsonl")


@pytest.mark.parametrize(("named", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_letters_with_accents_may_be_composed_or_not(
    tmp_path: Path, named: Any, stored: Any
) -> None:
    name = unicodedata.normalize(named, "café.png")
    on_disk = unicodedata.normalize(stored, "café.png")
    turned(tmp_path / "pics" / on_disk, 1, {"red": BOX})
    source = coco(tmp_path, [image(1, name)], [annotation(1, 1, 1, as_xywh(BOX))])
    assert run(source, "coco")
    assert run(source, "coco", images=tmp_path / "pics")
    label = (tmp_path / "yolo" / "labels" / name).with_suffix(".txt")
    (tmp_path / "yolo").mkdir()
    yolo(tmp_path / "yolo", {})
    turned(tmp_path / "yolo" / "images" / on_disk, 1, {"red": BOX})
    label.parent.mkdir()
    label.write_text(yolo_line(0, BOX, (WIDTH, HEIGHT)))
    assert run(tmp_path / "yolo", "yolo", tmp_path / "y.jsonl")
