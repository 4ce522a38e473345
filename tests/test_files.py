"""A folder or a file is written whole or not at all, and nobody's files are replaced."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from lvr_lite import files
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


def test_what_a_killed_run_left_is_swept_away(tmp_path: Path) -> None:
    left = [tmp_path / ".out.tmp-a1b2c3d4", tmp_path / ".out.tmp-________"]
    others = [".out.tmp-12", ".out.tmp-a.tmp-a1b2c3d4", ".other.tmp-a1b2c3d4", "out.tmp-a1b2c3d4"]
    for folder in (*left, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "weights").write_text("half")
    with fresh_folder(tmp_path / "out", MARK):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", *others])


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


# --------------------------------------------------------------------------------------------------
# hashes by identity

# Nanoseconds before now at which a file has long settled.
LONG_AGO = 3600 * 10**9


def settled(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written, as far as `kept_sha256` knows, an hour ago."""
    path.write_bytes(content)
    later = time.time_ns() + LONG_AGO
    monkeypatch.setattr(time, "time_ns", lambda: later)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that were read to be hashed; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read: list[Path] = []
    digest = files.sha256

    def noted(path: Path) -> str:
        read.append(path)
        return digest(path)

    monkeypatch.setattr(files, "sha256", noted)
    return read


CONTENT = b"x" * files.WORTH_KEEPING


def test_a_file_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]
) -> None:
    path = settled(tmp_path / "w", CONTENT, monkeypatch)
    want = hashlib.sha256(CONTENT).hexdigest()
    assert [files.kept_sha256(path) for _ in range(3)] == [want] * 3
    assert hashed == [path]


def test_a_changed_file_is_hashed_again_even_with_its_old_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]
) -> None:
    path = settled(tmp_path / "w", CONTENT, monkeypatch)
    before = path.stat()
    files.kept_sha256(path)
    changed = b"y" + CONTENT[1:]
    # As `cp -p` over it: size, place and time of change stay.
    path.write_bytes(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.kept_sha256(path) == hashlib.sha256(changed).hexdigest()
    assert hashed == [path, path]


def test_what_was_written_just_now_is_not_kept(tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "w").write_bytes(CONTENT)
    for _ in range(2):
        files.kept_sha256(tmp_path / "w")
    assert len(hashed) == 2


@pytest.mark.parametrize("kept", ["{", "[]", '{"files": {"PATH": {"identity": [1]}}}', "\xff"])
def test_a_damaged_cache_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path], kept: str
) -> None:
    path = settled(tmp_path / "w", CONTENT, monkeypatch)
    (tmp_path / "cache" / "lvr-lite").mkdir(parents=True)
    text = kept.replace("PATH", str(path))
    (tmp_path / "cache" / "lvr-lite" / "sha256.json").write_bytes(text.encode("latin-1"))
    assert files.kept_sha256(path) == files.kept_sha256(path)
    assert hashed == [path]


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]
) -> None:
    path = settled(tmp_path / "w", CONTENT, monkeypatch)
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert files.kept_sha256(path) == hashlib.sha256(CONTENT).hexdigest()
    assert hashed == [path]
