"""Answers are added to a file by one process at a time, and what was added stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, OutputError
from lvr_lite.eval import journal
from lvr_lite.eval.journal import Journal

SETTINGS = {"model": "abc", "suite": "mmvp"}


def sample(number: int) -> Sample:
    return Sample(
        id=str(number),
        images=(Path("p.png"),),
        question="where is the café?",
        answer="left",
    )


def answer(text: str = "left") -> journal.Answer:
    return {
        "type": None,
        "answer": text,
        "expected": "left",
        "correct": True,
        "score": 1.0,
        "tokens": [1],
    }


def known(path: Path) -> list[int]:
    """The samples whose answers are in the file."""
    with Journal.open(path, SETTINGS) as opened:
        return [i for i in range(9) if opened.knows(sample(i), 0)]


def test_answers_stay_and_the_lock_goes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with Journal.open(path, SETTINGS) as opened:
        opened.add(sample(0), 0, answer("au café"))
    with Journal.open(path, SETTINGS) as opened:
        assert opened.answer(sample(0), 0)["answer"] == "au café"
        opened.add(sample(1), 0, answer())
    assert known(path) == [0, 1]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("torn", [b'{"id": "7", "st', b"\0" * 50, b"\xff"])
def test_what_was_cut_by_a_kill_or_a_loss_of_power_goes(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a"
    with Journal.open(path, SETTINGS) as opened:
        opened.add(sample(0), 0, answer())
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with Journal.open(path, SETTINGS):
        assert path.read_bytes() == whole


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a"
    with Journal.open(path, SETTINGS) as opened:
        opened.add(sample(0), 0, answer())
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = r"--answers .*a: cannot be written \(File too large\); the answers until here are in it"
    with pytest.raises(OutputError, match=words), Journal.open(path, SETTINGS) as opened:
        # A part of the line fits.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
        try:
            opened.add(sample(1), 0, answer())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert known(path) == [0]


ADDS = """
import sys, time
from pathlib import Path
from tests.eval.test_journal import SETTINGS, Journal, answer, sample
with Journal.open(Path(sys.argv[1]), SETTINGS) as opened:
    for i in range(3):
        opened.add(sample(i), 0, answer())
    print("added", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_kill_loses_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "a"
    command = [sys.executable, "-c", ADDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "added\n"
        words = rf"a: process {first.pid} on .* is writing this --answers file; wait for it"
        with pytest.raises(OutputError, match=words), Journal.open(path, SETTINGS):
            pytest.fail("the body must not run")
        first.kill()
    assert known(path) == [0, 1, 2]


def test_lines_go_to_the_disk_once_a_second_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(journal, "sync", lambda path: synced.append(path.read_bytes().count(b"\n")))
    with Journal.open(tmp_path / "a", SETTINGS) as opened:
        for i, seconds in enumerate((0.0, 0.5, 0.4, 0.2)):
            now += seconds
            opened.add(sample(i), 0, answer())
    # The first line says what the answers are about.
    assert synced == [2, 5, 5]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(DataError, match=r"--answers .*pipe: is no file; name another"),
        Journal.open(tmp_path / "pipe", SETTINGS),
    ):
        pytest.fail("the body must not run")
