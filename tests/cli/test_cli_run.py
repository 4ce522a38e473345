"""`lvr-lite run`; the answers themselves are tested in tests/commands and tests/generate."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.command_line import Call, Refused, files


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("run INT8 nosuch.png question", 1, "nosuch.png: no such picture"),
        ("run INT8 PICTURE ''", 2, "the question is empty"),
        ("run INT8 PICTURE", 2, "is a picture and stands where the question belongs, after"),
        ("run INT8 PICTURE PICTURE", 2, "picture.png is a picture and stands where the question"),
        ("run INT8 PICTURE nosuch.png", 2, "nosuch.png is a picture and stands where the"),
        ("run INT8 PICTURE question --also PICTURE", 2, "picture.png is a picture and stands"),
        ("run nosuch PICTURE question", 1, "nosuch: no such folder"),
        ("run EMPTY PICTURE question", 1, "neither a bundle (lvr.json) nor a checkpoint"),
        ("run PICTURE PICTURE question", 1, "picture.png: no such folder"),
        ("run INT8 PICTURE question --top-p 2", 2, "top_p must lie in (0, 1], not 2"),
        ("run INT8 PICTURE 'what <|image_pad|> is'", 1, "the question contains <|image_pad|>"),
        ("run INT8 PICTURE question --look alway", 2, "--look alway: neither auto, always, never"),
        ("run INT8 PICTURE question --look always --look never", 2, "give one of auto, always"),
        ("run INT8 PICTURE question --look always --steps 0", 2, "look always needs latent steps"),
        ("run INT8 PICTURE question --look never --look l.png", 2, "nothing to look at with"),
        ("run tiny PICTURE question --look always", 2, "cannot look"),
        ("run INT8 PICTURE question --max-pixels 99999999", 2, "was exported for pictures of at"),
        ("run INT8 PICTURE question --seed -1", 2, "seed must be 0 or more, not -1"),
        ("run INT8 PICTURE question --json EMPTY", 1, "cannot be written"),
        ("run INT8 PICTURE question --provider cuda", 2, "provider cuda: the onnxruntime"),
        ("run INT8 PICTURE question --provider abacus", 2, "provider 'abacus': not known"),
        ("run tiny PICTURE question --provider cuda", 2, "is a checkpoint, which torch runs"),
    ],
)
def test_a_wrong_input_is_one_line(refused: Refused, arguments: str, code: int, words: str) -> None:
    refused(arguments, code, words)


def test_a_thin_picture_among_others_is_named_by_its_file(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 300)).save(thin)
    done = call("run", small_int8, picture, thin, "what is here")
    assert done.code == 1
    assert f"{thin}: 1 x 300 pixels, one side more than 200 times" in done.error


def test_a_full_disk_leaves_no_half_written_json(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "run.json").write_text("earlier")
    monkeypatch.setattr("lvr_lite.files._fsync", full)
    done = call("run", small_int8, picture, "what is here", "--json", tmp_path / "run.json")
    assert done.code == 1
    assert "No space left on device" in done.error
    assert files(tmp_path) == {"run.json": b"earlier", "picture.png": picture.read_bytes()}


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["at once", "streaming"])
def test_a_look_can_be_forced_forbidden_and_drawn(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path, stream: tuple[str, ...]
) -> None:
    """The small bundle has random weights, so it never looks by itself."""
    told = {}
    for look in ("auto", "always", "never"):
        out = tmp_path / f"{look}.json"
        options = ("--look", look, "--max-tokens", 3, "--json", out, *stream)
        done = call("run", small_int8, picture, "what is here", *options)
        assert done.code == 0, done.err
        told[look] = json.loads(out.read_text())
    assert [told[look]["looked"] for look in told] == [False, True, False]
    assert [told[look]["look_forced"] for look in told] == [False, True, False]
    assert told["always"]["latent_steps"] > 0
    drawing = tmp_path / "look.png"
    options = ("--look", "always", "--look", drawing, "--max-tokens", 3)
    done = call("run", small_int8, picture, "what is here", *options)
    assert done.code == 0, done.err
    assert drawing.stat().st_size > 500


def test_pictures_are_shrunk_to_max_pixels(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    tokens = []
    for size in ((), ("--max-pixels", 28 * 28)):
        out = tmp_path / "run.json"
        done = call("run", small_int8, picture, "what", "--json", out, "--max-tokens", 1, *size)
        assert done.code == 0, done.err
        tokens.append(json.loads(out.read_text())["visual_tokens"]["max"])
    assert tokens == [4, 1]


def test_an_answer_streams_the_text_that_it_prints_at_once(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    question = (picture, "what is here", "--max-tokens", 5)
    plain = call("run", small_int8, *question, "--json", tmp_path / "run.json")
    streamed = call("run", small_int8, *question, "--stream")
    assert plain.code == streamed.code == 0, plain.err
    assert plain.out == streamed.out
    result = json.loads((tmp_path / "run.json").read_text())
    assert (result["schema"], result["version"]) == ("lvr-lite/run", 1)
    assert result["answer"] == plain.out.strip("\n")
    assert len(result["tokens"]) <= 5


def test_other_questions_about_a_picture_are_answered_as_if_asked_alone(
    call: Call, small_int8: Path, picture: Path, tmp_path: Path
) -> None:
    first, *others = ("what colour is the star", "where heart", "how many are red")
    short = ("--max-tokens", 4)
    alone = [call("run", small_int8, picture, q, *short).out.strip() for q in (first, *others)]
    also = [option for question in others for option in ("--also", question)]
    result = tmp_path / "run.json"
    done = call("run", small_int8, picture, first, *short, *also, "--json", result)
    assert done.out.strip().splitlines() == alone
    written = json.loads(result.read_text())
    assert [written["answer"], *(answer["answer"] for answer in written["also"])] == alone
