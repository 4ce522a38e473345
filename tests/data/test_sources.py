"""Every source of samples opens by its name, and is the same in another process."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from lvr_lite.data.sample_files import SampleFile, read_samples
from lvr_lite.data.sources import FileSource, JoinedSource, PickedSamples, Source, open_source
from lvr_lite.errors import DataError, UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three samples of pictures that differ in size, the last one turned by EXIF."""
    lines = []
    for i, (width, height) in enumerate([(8, 4), (6, 6), (10, 4)]):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 2 else 1
        Image.new("RGB", (width, height), (i, 0, 0)).save(tmp_path / f"{i}.png", exif=exif)
        lines.append({"id": f"s{i}", "image": f"{i}.png", "question": "q", "answer": f"a{i}"})
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def contents(source: Source) -> list[object]:
    return [
        (sample, [picture.tobytes() for picture in pictures], source.sizes(i))
        for i, (sample, pictures) in enumerate(source.items())
    ]


def test_a_file_is_a_source_of_its_samples_and_pictures(file: Path) -> None:
    source = open_source(str(file))
    assert list(source.samples) == read_samples(file)
    assert [source.sizes(i) for i in range(3)] == [((4, 8),), ((6, 6),), ((10, 4),)]
    assert [pictures[0].size for _, pictures in source.items()] == [(8, 4), (6, 6), (4, 10)]
    assert source.answers() == {"s0": "a0", "s1": "a1", "s2": "a2"}
    assert len(open_source(str(file), count=2)) == 2


def test_answers_are_known_without_a_picture(file: Path) -> None:
    for picture in file.parent.glob("*.png"):
        picture.write_bytes(b"damaged")
    assert len(open_source(str(file)).answers()) == 3


@pytest.mark.parametrize("name", ["scenes", "skills"])
def test_a_registered_name_opens_its_source(name: str) -> None:
    few = open_source(name, "test", seed=3, count=8)
    more = open_source(name, "test", seed=3, count=12)
    assert contents(few) == contents(more)[:8]
    assert all(few.sizes(i) == ((p.height, p.width),) for i, (_, (p,)) in enumerate(few.items()))
    assert not few.answers().keys() & open_source(name, "train", 3, 8).answers().keys()
    assert len(open_source(name)) == 300


def test_a_name_that_is_not_registered_or_not_allowed_is_a_file() -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        open_source("nowhere")
    with pytest.raises(DataError, match="skills: cannot be read"):
        open_source("skills", registered=("scenes",))


@pytest.mark.parametrize(
    ("split", "seed", "count", "message"),
    [
        ("test", 0, 0, "count must be 1 or more"),
        ("test", 10**6, 1, "seed must be 0 to 999999"),
        ("val", 0, 1, "split must be train or test"),
    ],
)
def test_what_no_drawn_source_has_is_refused(
    split: str, seed: int, count: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_source("scenes", split, seed, count)


def test_a_joined_source_begins_the_second_one_again_where_it_is_too_short(file: Path) -> None:
    first = open_source("scenes", "train", count=2)
    joined = JoinedSource(first, open_source(str(file)), 5)
    assert [s.id for s in joined.samples[2:]] == ["s0", "s1", "s2", "s0", "s1"]
    assert contents(joined)[4] == contents(open_source(str(file)))[2]
    assert len(joined) == 7


def test_every_source_can_be_pickled(file: Path) -> None:
    scenes = open_source("scenes", "train", count=3)
    picked = FileSource(PickedSamples(SampleFile(file), [2, 0]))
    sources = [
        open_source(str(file)),
        open_source(str(file), count=2),
        picked,
        scenes,
        open_source("skills", count=2),
        JoinedSource(scenes, picked, 3),
    ]
    for source in sources:
        assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_picture_that_no_model_takes_is_named_with_its_file_and_sample(tmp_path: Path) -> None:
    lines = []
    for i, size in enumerate([(30, 30)] * 3 + [(1, 300)] + [(30, 30)] * 3):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        lines.append({"id": str(i), "image": f"{i}.png", "question": "q", "answer": "a"})
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    source = open_source(str(path))
    place = rf"{path}:4: image: {tmp_path}/3.png: 1 x 300 pixels"
    with pytest.raises(DataError, match=place):
        list(source.items())
    with pytest.raises(DataError, match=place):
        FileSource(PickedSamples(SampleFile(path), [3])).pictures(0)
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=rf"{path}:1: image: {tmp_path}/0.png: no such picture"):
        source.pictures(0)
