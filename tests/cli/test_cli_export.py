"""`lvr-lite export` and `quantize`: what they refuse, what they leave behind, what they write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lvr_lite.model.bundle import Bundle
from tests.command_line import Call, Refused, files

SYNTHETIC = "export --synthetic smolvlm-256m"
QUESTION = ("what is here", "--max-tokens", 2)
SHORT = ("--tune-steps", 2)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("export nosuch OUT", 1, "nosuch: no such folder"),
        ("export nobody/nothing OUT", 1, "neither a folder here nor to be had from the hub"),
        ("export tiny OUT --precision fp8", 2, "--precision fp8: must be exact, fp32, int8, int4"),
        ("export tiny OUT --block 32 --precision int8", 2, "--block is for weights of 4 bits"),
        ("export tiny", 2, "export needs a checkpoint and the folder to write"),
        ("export --synthetic nope OUT", 2, "--synthetic nope: not known; choose one of qwen2-vl"),
        (f"{SYNTHETIC} tiny OUT", 2, "--synthetic takes no checkpoint"),
        (f"{SYNTHETIC} OUT --precision mixed", 2, "random weights have nothing to search"),
        (f"{SYNTHETIC} OUT --precision int4 --tune-steps 5", 2, "random weights have nothing"),
        ("quantize nosuch OUT", 1, "nosuch: no such folder"),
        ("quantize EMPTY OUT", 1, "not a bundle (lvr.json is missing)"),
        ("quantize FP32 OUT --bits 5", 2, "--bits is the budget of --precision mixed, not of int8"),
        (
            "quantize FP32 OUT --precision mixed --calibration none.jsonl",
            2,
            "--calibration none.jsonl: no such file",
        ),
        ("quantize FP32 OUT --tune-steps 5", 2, "--tune-steps is for weights of 4 bits, which"),
        (
            "quantize FP32 OUT --precision int4 --calibration none --tune-steps 5",
            2,
            "--tune-steps trains on what --calibration gives",
        ),
        ("quantize INT8 OUT", 1, "its precision is int8"),
        ("quantize FP32 FP32", 1, "is the source itself"),
    ],
)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    refused: Refused, small_fp32: Path, arguments: str, code: int, words: str
) -> None:
    before = files(small_fp32)
    refused(arguments, code, words)
    assert files(small_fp32) == before


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_in_the_place_of_someones_files_is_refused(
    call: Call, small_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    file = tmp_path / "mine" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("mine")
    for target in (file.parent, file):
        done = call("export", small_checkpoint, target, "--precision", precision)
        assert done.code == 1
        assert "exists and is not an earlier result" in done.err.splitlines()[-1]
    assert files(tmp_path) == {"mine/thesis.txt": b"mine"}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights find no room where they are written."""
    from lvr_lite.export import onnxfile

    @contextmanager
    def no_room(path: Path) -> Iterator[onnxfile.DataFile]:
        with Path("/dev/full").open("wb") as file:
            yield onnxfile.DataFile(file, path.name)

    monkeypatch.setattr(onnxfile, "data_file", no_room)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("command", ["quantize", "export --precision fp32", "export"])
def test_a_full_disk_leaves_no_bundle(
    call: Call, small_fp32: Path, small_checkpoint: Path, tmp_path: Path, command: str
) -> None:
    source = small_fp32 if command == "quantize" else small_checkpoint
    done = call(*command.split(), source, tmp_path / "out")
    assert done.code == 1
    assert "cannot be written (No space left on device)" in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_bundle_that_was_there(
    call: Call,
    small_fp32: Path,
    copied: Callable[[Path], Path],
    small_int8: Path,
    request: pytest.FixtureRequest,
) -> None:
    earlier = copied(small_int8)
    before = files(earlier)
    request.getfixturevalue("full_disk")
    assert call("quantize", small_fp32, earlier).code == 1
    assert files(earlier) == before
    assert [p.name for p in earlier.parent.iterdir()] == [earlier.name]


def test_too_little_disk_is_one_line(
    call: Call,
    small_fp32: Path,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    for command, source in (("quantize", small_fp32), ("export", small_checkpoint)):
        done = call(command, source, tmp_path / "out")
        assert done.code == 1
        assert " MB of free disk, 0 MB are left" in done.error
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_a_bundle_that_answers(
    call: Call, small_checkpoint: Path, picture: Path, tmp_path: Path
) -> None:
    result, out = tmp_path / "export.json", tmp_path / "out"
    options = ("--precision", "int4", *SHORT, "--max-pixels", 28 * 28 * 3)
    done = call("export", small_checkpoint, out, *options, "--json", result)
    assert done.code == 0, done.err
    assert "pictures are shrunk to 2,352 pixels, about 1 visual tokens" in done.err
    assert Bundle.open(out).manifest.image.max_pixels == 28 * 28 * 3
    assert json.loads(result.read_text())["precision"] == "int4"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export.json", "out", "picture.png"]
    assert call("run", out, picture, *QUESTION).code == 0


def test_a_tuned_checkpoint_is_exported_as_it_was_trained(
    call: Call, small_tuned: Path, picture: Path, tmp_path: Path
) -> None:
    result, out = tmp_path / "export.json", tmp_path / "out"
    done = call("export", small_tuned, out, "--precision", "exact", "--json", result)
    assert done.code == 0, done.err
    written = json.loads(result.read_text())
    assert written["precision"] == "exact"
    assert written["parity"]["decoding"]["relative"] < 1e-4
    assert call("run", out, picture, *QUESTION).code == 0


@pytest.mark.parametrize(
    "options", ["--precision fp16", "--precision int4 --block 32 --tune-steps 2"]
)
def test_a_bundle_is_quantized_and_asked(
    call: Call, small_fp32: Path, picture: Path, tmp_path: Path, options: str
) -> None:
    result, out = tmp_path / "quantize.json", tmp_path / "out"
    done = call("quantize", small_fp32, out, *options.split(), "--json", result)
    assert done.code == 0, done.err
    written = json.loads(result.read_text())
    assert (written["schema"], written["bundle"]) == ("lvr-lite/quantize", str(out))
    assert written["precision"] == options.split()[1]
    assert call("run", out, picture, *QUESTION).code == 0
    assert call("inspect", out).code == 0
