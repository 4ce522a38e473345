"""Attacks on whoever loads others' files, as command lines: each fails with one line, and neither
runs nor reads nor writes what it was after.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from PIL import Image

from lvr_lite.data.samples import Sample
from lvr_lite.train.rewards import Answer, read_rewards
from tests.command_line import Call, files
from tests.short_run import SHORT_RUN

Copied = Callable[[Path], Path]
SHORT = [part for setting in SHORT_RUN for part in ("--set", setting)]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that no bundle may reach."""
    path = tmp_path / "secret"
    path.write_bytes(b"nobody may read this" * 1000)
    return path


# ---------------------------------------------------------------------------- code and endless work


CODE = (
    "__import__('os').system('touch TRACE')",
    'exec(chr(111)+chr(112)+chr(101)+chr(110)+\'("TRACE","w")\')',
    "().__class__.__bases__[0].__subclasses__()",
    "open('TRACE','w')",
    "lambda: open('TRACE','w')",
    "x:=open('TRACE','w')",
    "{{ open('TRACE', 'w') }}",
)
ENDLESS = (
    "9^9^9^9", "factorial(99999999)", "2^(10^10)", "1e999999999", "((9^999)^999)^999", "9!!!!!!!!",
    "(1+x+y+z)^999", "(" * 4000, "x^" * 4000 + "x", "-" * 19000 + "1", "9" * 19000, "a" * 10**6,
    "sqrt(" * 90 + "2" + ")" * 90, "(x+1)^99*(x-1)^99*(x+2)^99", "1/" * 9000 + "1",
    "0." + "9" * 19000, "<answer>" * 9000, "\\frac" * 4000, " ".join(["1,000"] * 9000),
)  # fmt: skip


@pytest.mark.parametrize("text", CODE)
def test_code_in_an_answer_is_not_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scoring = read_rewards("accuracy,math,format,latent-use")
    for said, expected in ((text, "x"), ("x", text), (text, text + " ")):
        scoring(Sample("1", (), "?", expected), Answer(said))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
def test_an_answer_that_would_take_for_ever_is_decided_at_once(text: str) -> None:
    script = (
        "import json, sys\n"
        "from lvr_lite.data.samples import Sample\n"
        "from lvr_lite.train.rewards import Answer, read_rewards\n"
        "text = json.load(sys.stdin)\n"
        "scoring = read_rewards('accuracy,math')\n"
        "for said, expected in ((text, 'x'), ('x', text), (text, text[:-1] + '7')):\n"
        "    scoring(Sample('1', (), '?', expected), Answer(said))\n"
    )
    # A limit and not a measurement: what hangs, hangs for ever.
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(text), text=True, timeout=60, check=False
    )
    assert done.returncode == 0


HOSTILE_TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.__class__ }}",
)


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_code_in_a_chat_template_is_not_run(
    call: Call,
    copied: Copied,
    small_checkpoint: Path,
    picture: Path,
    template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = copied(small_checkpoint)
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    (checkpoint / "chat_template.jinja").write_text(template)
    done = call("run", checkpoint, picture, "what?")
    assert done.code == 1
    assert str(checkpoint) in done.error
    assert not (tmp_path / "TRACE").exists()


# ------------------------------------------------------------------------------------------ bundles


def write_sums(bundle: Path) -> None:
    """Give the manifest the sha256 of what now lies in a bundle, as an attacker would."""
    (bundle / "SHA256SUMS").unlink(missing_ok=True)
    manifest = json.loads((bundle / "lvr.json").read_text())
    for graph in manifest["graphs"].values():
        for name in graph["files"]:
            path = bundle / name
            if path.is_file():
                graph["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "lvr.json").write_text(json.dumps(manifest))


def move_weights(bundle: Path, place: str) -> str:
    """Let the first weight of a graph lie elsewhere; returns the name of the graph's file."""
    path = bundle / "onnx" / "lm_head.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = place
    path.write_bytes(model.SerializeToString())
    write_sums(bundle)
    return path.name


PLACES = ("../../secret", "../../../etc/passwd", "SECRET", "/etc/passwd", "..\\..\\secret", "link")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["quantize", "run", "eval"])
def test_weights_outside_a_bundle_are_refused(
    call: Call,
    copied: Copied,
    small_fp32: Path,
    secret: Path,
    picture: Path,
    place: str,
    command: str,
    tmp_path: Path,
) -> None:
    bundle = copied(small_fp32)
    if place == "link":
        (bundle / "onnx" / "link").symlink_to(secret)
    graph = move_weights(bundle, place.replace("SECRET", str(secret)))
    more: dict[str, list[object]] = {
        "quantize": [tmp_path / "out"],
        "run": [picture, "what?"],
        "eval": ["--limit", 1],
    }
    done = call(command, bundle, *more[command])
    assert done.code == 1
    assert ("onnx/link" if place == "link" else graph) in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret", "SECRET", "onnx/../../secret", "onnx/link"])
def test_a_manifest_that_names_a_file_outside_is_refused(
    call: Call, copied: Copied, small_fp32: Path, secret: Path, name: str, tmp_path: Path
) -> None:
    bundle = copied(small_fp32)
    (bundle / "onnx" / "link").symlink_to(secret)
    name = name.replace("SECRET", str(secret))
    manifest = json.loads((bundle / "lvr.json").read_text())
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    manifest["graphs"]["lm_head"]["files"][name] = digest
    (bundle / "lvr.json").write_text(json.dumps(manifest))
    (bundle / "SHA256SUMS").unlink(missing_ok=True)
    done = call("quantize", bundle, tmp_path / "out")
    assert done.code == 1
    assert name in done.error
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_a_link_out_of_a_bundle_is_refused(
    call: Call, copied: Copied, small_fp32: Path, picture: Path, tmp_path: Path
) -> None:
    bundle = copied(small_fp32)
    outside = tmp_path / "outside.onnx_data"
    shutil.move(bundle / "onnx" / "lm_head.onnx_data", outside)
    (bundle / "onnx" / "lm_head.onnx_data").symlink_to(outside)
    done = call("run", bundle, picture, "what?")
    assert done.code == 1
    assert "lm_head.onnx_data" in done.error


def test_pickled_weights_are_not_read(
    call: Call, copied: Copied, small_checkpoint: Path, picture: Path
) -> None:
    checkpoint = copied(small_checkpoint)
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    shutil.move(checkpoint / "model.safetensors", checkpoint / "pytorch_model.bin")
    done = call("run", checkpoint, picture, "what?")
    assert done.code == 1
    assert "pickled weights are not read" in done.error


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_of_weights_that_names_a_file_outside_is_refused(
    call: Call, copied: Copied, small_checkpoint: Path, picture: Path, name: str
) -> None:
    checkpoint = copied(small_checkpoint)
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    done = call("run", checkpoint, picture, "what?")
    assert done.code == 1
    assert f"{index}: {name!r} is not the name of a file beside it" in done.error


# ----------------------------------------------------------------------------------------- pictures


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A grey PNG that says it has this size."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        sums = struct.pack(">I", zlib.crc32(kind + data))
        parts.append(struct.pack(">I", len(data)) + kind + data + sums)
    return b"".join(parts)


PICTURES = {
    "PostScript": POSTSCRIPT,
    "PDF": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    "a bomb": png(30_000, 30_000, bytes(10_000_000)),
    "a bomb of another shape": png(2**31 - 1, 1),
    "a line": png(1, 65_000, bytes(130_000)),
    "a broken chunk": png(64, 64, bytes(100))[:-20],
    "nothing": b"",
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_hostile_picture_is_refused_and_starts_no_program(
    call: Call,
    small_int8: Path,
    kind: str,
    ending: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def started(*command: object, **_: object) -> None:
        pytest.fail(f"started {command}")

    monkeypatch.setattr(subprocess, "Popen", started)
    picture = tmp_path / f"a.{ending}"
    picture.write_bytes(PICTURES[kind])
    done = call("run", small_int8, picture, "what?")
    assert done.code == 1
    assert str(picture) in done.error


# ------------------------------------------------------------------------ writers beside each other


def test_of_two_runs_on_one_folder_the_second_is_refused(
    call: Call, small_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = ["finetune", "--model", str(small_checkpoint), "--data", "scenes", "--out", str(out)]
    line += [*SHORT, "--set", "train.steps=100000"]
    first = subprocess.Popen(
        [sys.executable, "-m", "lvr_lite", *line],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_lock(out, first)
        done = call(*line)
        assert done.code == 1
        assert str(out) in done.error
        assert str(first.pid) in done.error
        # It is the first one's still.
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


def await_lock(out: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until a run holds its folder."""
    until = time.monotonic() + 120
    while not list(out.glob(".*.lock")):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until, "no lock was made"
        time.sleep(0.05)


def test_a_prepared_temporary_name_is_not_followed(
    call: Call, small_fp32: Path, secret: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    before = secret.read_bytes()
    # The names that were predictable: of this process, and of one that is gone.
    for number in (os.getpid(), 999_999_999):
        (folder / f".out.json.tmp-{number}").symlink_to(secret)
        (folder / f".int8.tmp-{number}-x").symlink_to(secret.parent)
    done = call("quantize", small_fp32, folder / "int8", "--json", folder / "out.json")
    assert done.code == 0, done.err
    assert secret.read_bytes() == before
    assert not (folder / "out.json").is_symlink()
    assert (folder / "int8" / "lvr.json").is_file()


def test_an_answers_file_of_something_else_stays_as_it_is(
    call: Call, small_int8: Path, secret: Path
) -> None:
    before = files(secret.parent)
    done = call("eval", small_int8, "--limit", 1, "--skills", 0, "--answers", secret)
    assert done.code == 1
    assert "name another file" in done.error
    assert files(secret.parent) == before
