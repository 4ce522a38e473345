"""The scenes in memory, and as a data set on disk. May import: numpy, Pillow and what stands above
`toy`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lvr_lite.data.rows import JsonObject
from lvr_lite.data.samples import Sample, sample_json
from lvr_lite.errors import DataError
from lvr_lite.files import fresh_folder
from lvr_lite.toy import sources
from lvr_lite.toy.scenes import SHAPES, Scene


def scene_samples(
    count: int,
    seed: int,
    split: str,
) -> Iterator[tuple[Sample, Image.Image]]:
    """`count` samples of the scenes, each with its picture (RGB); `Sample.images` is ().

    The same (seed, split) always gives the same samples, and a larger count only adds to them.
    Raises UsageError for a count below 1, a seed outside 0 … MAX_SEED or an unknown split.
    """
    return _with_picture(sources.scenes(split, seed, count))


def skill_samples(count: int, seed: int) -> Iterator[tuple[Sample, Image.Image]]:
    """`count` samples of the skills that the scenes do not ask for, as `scene_samples`, without
    boxes.
    """
    return _with_picture(sources.skills("test", seed, count))


def _with_picture(source: sources.DrawnSource) -> Iterator[tuple[Sample, Image.Image]]:
    return ((sample, picture) for sample, (picture,) in source.items())


def write_scenes(
    folder: Path,
    count: int,
    seed: int,
    split: str,
    coco: bool = False,
) -> Path:
    """Write `count` scenes as `folder`/images/*.png and `folder`/<split>.jsonl, whole or not at
    all. Returns the path of the JSONL.

    coco: write `folder`/<split>.json in its place: the objects of each scene as a detection set
        (COCO instances), to try `data convert` on.

    A folder that this function wrote for the same split is replaced; one that holds anything else
    is refused. Raises UsageError as `scene_samples` does, and DataError or OutputError where the
    folder is something else or cannot be written.
    """
    source = sources.scenes(split, seed, count)
    name = f"{split}.json" if coco else f"{split}.jsonl"
    _refuse_foreign_files(folder, split, name)
    with fresh_folder(folder, replaceable=name) as staged:
        (staged / "images").mkdir()
        lines = []
        for sample, (picture,) in source.items():
            path = staged / "images" / f"{sample.id}.png"
            picture.save(path, compress_level=1)
            lines.append(json.dumps(sample_json(replace(sample, images=(path,)), staged)) + "\n")
        content = json.dumps(_instances(source)) if coco else "".join(lines)
        (staged / name).write_text(content, encoding="utf-8", newline="\n")
    return folder / name


def _instances(source: sources.DrawnSource) -> JsonObject:
    """Scenes as COCO instances, with a category a shape."""
    images = [
        _image_json(number, sample, scene)
        for number, (sample, scene) in enumerate(
            zip(
                source.samples,
                source.scenes,
                strict=True,
            )
        )
    ]
    figures = [
        (image, figure) for image, scene in enumerate(source.scenes) for figure in scene.figures
    ]
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": SHAPES.index(figure.shape),
            "bbox": [figure.x, figure.y, figure.size, figure.size],
            "area": figure.size**2,
            "iscrowd": 0,
        }
        for number, (image, figure) in enumerate(figures)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image_json(number: int, sample: Sample, scene: Scene) -> JsonObject:
    return {
        "id": number,
        "file_name": f"images/{sample.id}.png",
        "width": scene.width,
        "height": scene.height,
    }


def _refuse_foreign_files(folder: Path, split: str, name: str) -> None:
    """People call their own data train.jsonl too, so what is replaced must hold scenes and nothing
    else.
    """
    if not folder.is_dir():
        return
    own = re.compile(rf"{re.escape(name)}|images|images/{split}-\d+-\d{{6,}}[ab]?\.png")
    for path in sorted([*folder.iterdir(), *(folder / "images").glob("*")]):
        relative = path.relative_to(folder)
        if not own.fullmatch(relative.as_posix()):
            raise DataError(
                f"{folder}: holds {relative}, which is not of an earlier {split} set of scenes; "
                "choose another folder"
            )
