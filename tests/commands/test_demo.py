"""The demo replaces what an earlier one left, and nothing else; its stages are stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lvr_lite.commands import demo
from lvr_lite.errors import LvrError, UsageError


class Stages:
    """Makes the folders that the real stages make, each with one file."""

    word = "first"

    def __init__(self, out: Path, scratch: Path, quick: bool) -> None:
        self.out = out
        self.scratch = scratch

    def run_all(self) -> tuple[demo.Demo, dict[str, Any]]:
        for name in ("checkpoint", *demo.BUNDLES):
            (self.scratch / name).mkdir()
            (self.scratch / name / "weights").write_text(self.word)
        if self.word == "fails":
            raise LvrError("the demo stopped")
        return demo.Demo(self.out, [], {}, [], {}, [], {}), {}


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> type[Stages]:
    monkeypatch.setattr(demo, "_Stages", Stages)
    monkeypatch.setattr(demo, "_examples", lambda *_: [])
    monkeypatch.setattr(demo, "write_page", lambda _, path: path.write_text(""))
    monkeypatch.setattr(Stages, "word", "first")
    return Stages


def content(out: Path) -> dict[str, str]:
    return {name: (out / name / "weights").read_text() for name in ("checkpoint", *demo.BUNDLES)}


def test_a_demo_replaces_an_earlier_one_and_sweeps_what_a_killed_one_left(
    tmp_path: Path, stages: type[Stages]
) -> None:
    out = tmp_path / "out"
    (out / ".demo.tmp-a1b2c3d4").mkdir(parents=True)
    for stages.word in ("first", "second"):
        demo.demo(out)
        assert set(content(out).values()) == {stages.word}
    wanted = {"checkpoint", *demo.BUNDLES, demo.RESULTS, "report.html"}
    assert {path.name for path in out.iterdir()} == wanted
    assert json.loads((out / demo.RESULTS).read_text())["schema"] == "lvr-lite/demo"
    stages.word = "fails"
    with pytest.raises(LvrError, match="stopped"):
        demo.demo(out)
    assert set(content(out).values()) == {"second"}
    assert {path.name for path in out.iterdir()} == wanted


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_demo_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "out" / "thesis.txt" if kind == "folder" else tmp_path / "out"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not an earlier demo"):
        demo.demo(tmp_path / "out")
    assert mine.read_text() == "mine"
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
