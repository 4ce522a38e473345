"""The watch of `make fuzz` notices what it must, a short run finds nothing, and a find can be run
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.originals import MODELS
from tests.fuzz.watch import Case, World, keep, read_kept

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def test_the_watch_notices_what_is_planted(tmp_path: Path) -> None:
    done = run("tests.fuzz.planted", tmp_path / "world")
    assert done.returncode == 0, done.stderr
    finds = json.loads(done.stdout)
    assert finds == {
        "nothing": None,
        "one line": None,
        "write inside": None,
        "traceback": "KeyError",
        "hang": "hang",
        "busy": "hang",
        "memory": "memory",
        "write outside": "open for writing outside",
        "remove": "os.remove outside",
        "unseen write": "changed a file",
        "read outside": "read a file outside",
        "read through a link": "read a file outside",
        "program": "started: subprocess.Popen",
        "death": "the process died",
        "evaluation": "compiled a text",
    }


def test_a_kept_case_is_read_as_it_was(tmp_path: Path) -> None:
    case = Case(
        kind="samples",
        base=None,
        files={"in/deep/a": b"\xff", "out/b": b""},
        commands=(("inspect", "IN/deep"),),
        links={"in/link": "/nowhere"},
    )
    keep(case, tmp_path / "kept", World(tmp_path / "world", {}))
    assert read_kept(tmp_path / "kept") == case


@pytest.fixture
def models(small_checkpoint: Path, small_tuned: Path, small_fp32: Path, tmp_path: Path) -> Path:
    """Small models in the places where the run looks for them."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name, model in zip(MODELS, (small_checkpoint, small_tuned, small_fp32), strict=True):
        (folder / name).symlink_to(model)
    return folder


def test_a_short_run_of_all_kinds_finds_nothing(models: Path, tmp_path: Path) -> None:
    done = run(
        "tests.fuzz", "--inputs", 110, "--out", tmp_path / "out", "--models", models, "--batch", 5
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "fuzz.json").read_text())
    assert report["inputs"] == 110
    assert len(report["kinds"]) == 22
    assert report["places"] == {}
