"""Inputs of the command line, and the check that a wrong one is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lvr_lite.toy.make import write_scenes
from tests.command_line import Call, Refused, files


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of four samples."""
    return write_scenes(tmp_path_factory.mktemp("cli") / "scenes", 4, 0, "test")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def place(
    small_fp32: Path, small_int8: Path, scenes: Path, picture: Path, tmp_path: Path
) -> dict[str, Path]:
    """What the words in capitals of a test's call stand for."""
    place = {"FP32": small_fp32, "INT8": small_int8, "SCENES": scenes, "PICTURE": picture}
    for name in ("out", "empty", "others", "text.png", "broken.jsonl"):
        place[name.split(".")[0].upper()] = tmp_path / name
    place["EMPTY"].mkdir()
    place["OTHERS"].mkdir()
    (place["OTHERS"] / "mine.txt").write_text("mine")
    place["TEXT"].write_text("no picture")
    samples = [json.loads(line) for line in scenes.read_text().splitlines()]
    lines = [json.dumps(s | {"image": str(scenes.parent / s["image"])}) for s in samples]
    place["BROKEN"].write_text("\n".join([*lines[:2], '{"id": "x", ', *lines[2:]]))
    return place


@pytest.fixture
def refused(
    call: Call, place: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Checks that a call is refused in one line that holds certain words, and leaves nothing."""

    def check(arguments: str, code: int, words: str) -> None:
        monkeypatch.chdir(tmp_path)
        before = files(tmp_path)
        parts = [part.strip("'") for part in re.findall(r"'[^']*'|\S+", arguments)]
        named = re.compile(rf"^({'|'.join(place)})(?=/|$)")
        done = call(*(named.sub(lambda match: str(place[match[1]]), part) for part in parts))
        assert done.code == code, done.err
        assert words in done.error
        assert files(tmp_path) == before
        assert not place["OUT"].exists()

    return check
