"""The scenes as a data set on disk or in memory, and a contact sheet of any samples.

May import: numpy, Pillow, the standard library, the core.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.errors import DataError, UsageError
from lvr_lite.files import fresh_folder
from lvr_lite.toy import scenes

SPLITS = ("train", "test")
MAX_SEED = 999_999  # those above are for pre-training the embedded model (lvr_lite/toy/pretrain.py)


def scene_samples(count: int, seed: int, split: str) -> Iterator[tuple[Sample, Image.Image]]:
    """`count` samples of the scenes with their pictures in memory (RGB); `Sample.images` is ().

    The same (seed, split) always gives the same samples, and a larger count only adds to them.
    Raises UsageError for a count below 1, a seed outside 0 … MAX_SEED or an unknown split.
    """
    _refuse_senseless(count, seed)
    if split not in SPLITS:
        raise UsageError(f"split must be train or test, not {split}")
    for name, scene, question, pair in scenes.items(seed, split, count):
        yield scene_sample(name, scene, question, pair), scenes.draw(scene)


def scene_sample(
    name: str, scene: scenes.Scene, question: scenes.Question, pair: str | None
) -> Sample:
    """A planned question as a sample without a picture."""
    boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in map(scene.box, question.things))
    return Sample(
        name, (), question.text, question.answer, question.choices, boxes, question.type, pair
    )


def skill_samples(count: int, seed: int) -> Iterator[tuple[Sample, Image.Image]]:
    """`count` samples of the skills that the suite never asks (`scenes.skills`), with their
    pictures in memory and without boxes.

    The same seed always gives the same samples, and a larger count only adds to them. Raises
    UsageError as `scene_samples` does.
    """
    _refuse_senseless(count, seed)
    for name, scene, question in scenes.skills(seed, count):
        yield skill_sample(name, question), scenes.draw(scene)


def skill_sample(name: str, question: scenes.Question) -> Sample:
    """A planned question of the skills as a sample without boxes and picture."""
    return Sample(
        name, (), question.text, question.answer, question.choices or None, (), question.type
    )


def _refuse_senseless(count: int, seed: int) -> None:
    if count < 1:
        raise UsageError(f"count must be 1 or more, not {count}")
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED}, not {seed}")


def write_scenes(folder: Path, count: int, seed: int, split: str, coco: bool = False) -> Path:
    """Write `count` scenes as `folder`/images/*.png and `folder`/<split>.jsonl, whole or not at
    all; returns the path of the JSONL.

    coco: write `folder`/<split>.json in its place, the things of each scene as a detection set
    (COCO instances), to try `data convert` on. A folder that this function wrote for the same split
    is replaced; one that holds anything else is refused. One split a folder. Raises UsageError as
    `scene_samples` does, DataError or BundleError where the folder is something else or cannot be
    written.
    """
    samples = scene_samples(count, seed, split)
    written = f"{split}.json" if coco else f"{split}.jsonl"
    _refuse_others_files(folder, split, written)
    with fresh_folder(folder, replaceable=written) as staged:
        (staged / "images").mkdir()
        with (staged / written).open("w", encoding="utf-8", newline="\n") as lines:
            for sample, picture in samples:
                path = staged / "images" / f"{sample.id}.png"
                picture.save(path, compress_level=1)
                if not coco:
                    lines.write(
                        json.dumps(sample_json(replace(sample, images=(path,)), staged)) + "\n"
                    )
            if coco:
                json.dump(
                    _instances(
                        [(name, scene) for name, scene, _, _ in scenes.items(seed, split, count)]
                    ),
                    lines,
                )
    return folder / written


def _instances(found: list[tuple[str, scenes.Scene]]) -> dict[str, Any]:
    """Scenes as COCO instances: a category a shape."""
    shapes = list(scenes.SHAPES)
    images = [
        {"id": i, "file_name": f"images/{name}.png", "width": s.width, "height": s.height}
        for i, (name, s) in enumerate(found)
    ]
    things = [(i, thing) for i, (_, scene) in enumerate(found) for thing in scene.things]
    annotations = [
        {
            "id": n,
            "image_id": i,
            "category_id": shapes.index(t.shape),
            "bbox": [t.x, t.y, t.size, t.size],
            "area": t.size**2,
            "iscrowd": 0,
        }
        for n, (i, t) in enumerate(things)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(shapes)],
    }


def _refuse_others_files(folder: Path, split: str, written: str) -> None:
    """train.jsonl is a name that people give their own data as well: what is replaced must hold
    scenes and nothing besides.
    """
    if not folder.is_dir():
        return
    ours = re.compile(rf"{re.escape(written)}|images|images/{split}-\d+-\d{{6,}}[ab]?\.png")
    for path in sorted([*folder.iterdir(), *(folder / "images").glob("*")]):
        if not ours.fullmatch(path.relative_to(folder).as_posix()):
            raise DataError(
                f"{folder}: holds {path.relative_to(folder)}, which is not of an earlier {split} set of scenes; choose another folder"
            )
