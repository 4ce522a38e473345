"""A folder or a file is written whole or not at all, and nobody's files are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from lvr_lite.errors import OutputError
from lvr_lite.files import fresh_folder, write_atomically

# The file by which an earlier result is known.
MARK = "lvr.json"


def test_a_fresh_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "deep" / "out", MARK) as staged:
        (staged / MARK).write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / MARK).read_text() == "1"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_on_an_error_nothing_is_left_and_an_earlier_result_is_as_before(
    tmp_path: Path, error: BaseException
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("before")
    with pytest.raises(type(error)), fresh_folder(tmp_path / "out", MARK) as staged:
        (staged / MARK).write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / MARK).read_text() == "before"


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with fresh_folder(tmp_path / "out", MARK) as staged:
            (staged / MARK).write_text(name)
            (staged / name).write_text("")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MARK, "second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with fresh_folder(tmp_path / "out", MARK) as staged:
        (staged / MARK).write_text("")
    assert (tmp_path / "out" / MARK).is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_foreign_target_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
    (target / "thesis.txt" if kind == "folder" else target).write_text("mine")
    with (
        pytest.raises(OutputError, match="out: exists and is not an earlier result"),
        fresh_folder(target, MARK),
    ):
        pytest.fail("the body must not run")
    assert (target / "thesis.txt" if kind == "folder" else target).read_text() == "mine"


def test_what_marks_an_earlier_result_can_be_another_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("")
    with pytest.raises(OutputError), fresh_folder(tmp_path / "out", MARK):
        pytest.fail("the body must not run")
    with fresh_folder(tmp_path / "out", replaceable="train.jsonl") as staged:
        (staged / "new").write_text("")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_what_a_killed_run_left_is_swept_away_and_a_living_run_is_let_be(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".out.tmp-999999999-abc", tmp_path / ".out.tmp-1-abc"
    dead.mkdir()
    alive.mkdir()
    with fresh_folder(tmp_path / "out", MARK):
        pass
    assert not dead.exists()
    assert alive.exists()


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="out: cannot be written"),
        fresh_folder(tmp_path / "file" / "out", MARK),
    ):
        pytest.fail("the body must not run")


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "a.txt", "one")
    write_atomically(tmp_path / "new" / "a.txt", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.txt", "two")]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot be written"):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "new"]
