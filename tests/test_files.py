"""A folder or a file is written whole or not at all, and nobody's files are replaced."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lvr_lite import files, locks
from lvr_lite.errors import BundleError, OutputError
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


def test_what_was_made_at_the_target_meanwhile_is_let_be(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="not an earlier result"),
        fresh_folder(tmp_path / "out", MARK),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def permissions(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_folder_is_its_writers_alone_until_it_is_whole(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "out", MARK) as staged:
        (staged / MARK).write_text("")
        assert permissions(staged) == 0o700
    assert permissions(tmp_path / "out") == 0o750
    (tmp_path / "out").chmod(0o711)
    with fresh_folder(tmp_path / "out", MARK):
        pass
    assert permissions(tmp_path / "out") == 0o711


def test_all_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    renamed: list[int] = []
    monkeypatch.setattr(files, "_sync_one", lambda path: synced.append(path.name))
    change = files._change_names

    def noted(staged: Path, target: Path) -> None:
        renamed.append(len(synced))
        change(staged, target)

    monkeypatch.setattr(files, "_change_names", noted)
    with fresh_folder(tmp_path / "out", MARK) as staged:
        (staged / "onnx").mkdir()
        for path in (staged / "onnx" / "weights", staged / MARK):
            path.write_text("")
    (count,) = renamed
    assert sorted(synced[:count]) == sorted([staged.name, "onnx", "weights", MARK])
    assert synced.index("weights") < synced.index("onnx") < synced.index(staged.name)
    # The folder's names, after the renaming.
    assert synced[count:] == [tmp_path.name]


# A run that is killed before its n-th step, a run that fails and a run that ends, for every n.
KILLS = """
import os, signal, sys
from pathlib import Path
from lvr_lite import files

STEPS = ("open", "os.", "shutil.", "ctypes.", "fcntl.")
base, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    files._exchange = lambda *_: False

def write(target, word, error=None):
    with files.fresh_folder(target, "mark") as staged:
        for name in ("weights", "mark"):
            (staged / name).write_text(word)
        if error:
            raise error

def content(folder):
    return [(folder / name).read_text() for name in ("weights", "mark")]

def killed_at(step):
    left = step
    def hook(event, _):
        nonlocal left
        left -= event.startswith(STEPS)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for step in range(1000):
    target = base / str(step) / "out"
    write(target, "old")
    process = os.fork()
    if process == 0:
        killed_at(step)
        write(target, "new")
        os._exit(0)
    ended = os.waitpid(process, 0)[1] == 0
    there = target if target.exists() else files.earlier_result(target)
    assert there == target or not exchange, step
    assert content(there) in (["old"] * 2, ["new"] * 2), step
    before = content(there)
    try:
        write(target, "never", KeyError())
    except KeyError:
        assert content(target) == before, step
    assert os.listdir(target.parent) == ["out"], (step, os.listdir(target.parent))
    write(target, "next")
    assert content(target) == ["next"] * 2, step
    if ended:
        break
print(step)
"""


def python(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_an_earlier_result_survives_a_kill_at_any_step(tmp_path: Path, way: str) -> None:
    assert int(python(KILLS, tmp_path, way)) > 20


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs the call")
def test_two_folders_exchange_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "name").read_text() == "b"
    assert not files._exchange(tmp_path / "a", tmp_path / "none")


def test_an_earlier_result_is_put_back_where_the_second_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with fresh_folder(tmp_path / "out", MARK) as staged:
        (staged / MARK).write_text("before")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \(Permission denied\)"),
        fresh_folder(tmp_path / "out", MARK) as staged,
    ):
        (staged / MARK).write_text("after")
    assert (tmp_path / "out" / MARK).read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --------------------------------------------------------------------------------------------------
# one writer at a time

# Holds a folder until it is killed, with a forked process that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from lvr_lite import files
with files.locked(Path(sys.argv[1]), "folder", inside=len(sys.argv) > 2):
    # The forked one says so itself: it has let go of the lock then.
    if not hasattr(os, "fork") or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("inside", [[], ["inside"]])
def test_the_second_writer_is_told_who_the_first_is_and_a_kill_ends_the_lock(
    tmp_path: Path, inside: list[str]
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), *inside]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        forked = int(holder.stdout.readline())
        words = (
            rf"out: process {holder.pid} on {re.escape(platform.node())} since 20..-..-.. ..:..:.. "
            r"UTC \(.*\) is writing this folder; wait for it, or name another$"
        )
        for _ in range(2):
            with (
                pytest.raises(OutputError, match=words),
                files.locked(tmp_path / "out", "folder", inside=bool(inside)),
            ):
                pytest.fail("the body must not run")
        if not inside:
            with pytest.raises(OutputError, match=words), fresh_folder(tmp_path / "out", MARK):
                pytest.fail("the body must not run")
        holder.kill()
        holder.wait()
        with files.locked(tmp_path / "out", "folder", inside=bool(inside)):
            pass
        if forked != holder.pid:
            os.kill(forked, signal.SIGKILL)
    # The folder had been made for the lock by the process that was killed.
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if inside else [])


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    for inside in (False, True):
        with files.locked(tmp_path / "new" / "out", "folder", inside=inside) as taken:
            assert taken
        assert list((tmp_path / "new").iterdir()) == []


def test_a_thread_may_ask_again_and_another_thread_may_not(tmp_path: Path) -> None:
    def other() -> None:
        with files.locked(tmp_path / "out", "folder"):
            pytest.fail("the body must not run")

    with files.locked(tmp_path / "out", "folder"):
        with files.locked(tmp_path / "out", "folder") as taken:
            assert not taken
        with ThreadPoolExecutor(1) as pool, pytest.raises(OutputError, match="is writing this"):
            pool.submit(other).result()


def test_a_folder_and_links_to_it_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with files.locked(tmp_path / "out", "folder"), files.locked(tmp_path / "link", "folder") as new:
        assert not new


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder"])
def test_a_prepared_lock_is_refused_and_what_it_leads_to_is_as_before(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "victim").write_text("mine")
    lock = tmp_path / f".out{files.LOCK}"
    if kind == "link":
        lock.symlink_to(tmp_path / "victim")
    elif kind == "second name":
        lock.hardlink_to(tmp_path / "victim")
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(OutputError, match="out: cannot be"), files.locked(tmp_path / "out", "f"):
        pytest.fail("the body must not run")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may all")
def test_the_lock_of_another_user_who_still_runs_is_told_from_one_that_was_left(
    tmp_path: Path,
) -> None:
    lock = tmp_path / f".out{files.LOCK}"
    with files.locked(tmp_path / "out", "folder"):
        lock.chmod(0o444)
        with ThreadPoolExecutor(1) as pool, pytest.raises(OutputError, match="is writing this"):
            pool.submit(files.locked(tmp_path / "out", "folder").__enter__).result()
    lock.touch(0o444)
    with (
        pytest.raises(OutputError, match="Permission denied"),
        files.locked(tmp_path / "out", "folder"),
    ):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("words", ["", "{", "[" * 1000, '{"host": 1}', '{"since": NaN}', "\0" * 9])
def test_a_lock_whose_words_are_damaged_still_holds(tmp_path: Path, words: str) -> None:
    with files.locked(tmp_path / "out", "folder"):
        (tmp_path / f".out{files.LOCK}").write_text(words)
        with (
            ThreadPoolExecutor(1) as pool,
            pytest.raises(OutputError, match="another process is writing this folder"),
        ):
            pool.submit(files.locked(tmp_path / "out", "folder").__enter__).result()


def test_a_holder_cannot_write_to_the_terminal_of_another(tmp_path: Path) -> None:
    holder = locks.Holder("h\x1b[2J", 7, 0.0, "run\nfake")
    (tmp_path / "lock").write_text(json.dumps(holder.to_json()))
    said = str(locks.Holder.read(tmp_path / "lock"))
    assert said == "process 7 on h?[2J since 1970-01-01 00:00:00 UTC (run?fake)"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_on_a_disk_without_locks_the_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with fresh_folder(tmp_path / "out", MARK):
        with ThreadPoolExecutor(1) as pool, pytest.raises(OutputError, match=r"or remove .*lock"):
            pool.submit(files.locked(tmp_path / "out", "folder").__enter__).result()
        left = (tmp_path / f".out{files.LOCK}").read_bytes()
    # As a killed run leaves it.
    (tmp_path / f".out{files.LOCK}").write_bytes(left)
    with (
        pytest.raises(OutputError, match=r"or remove .*lock"),
        fresh_folder(tmp_path / "out", MARK),
    ):
        pytest.fail("the body must not run")
    (tmp_path / f".out{files.LOCK}").unlink()
    with fresh_folder(tmp_path / "out", MARK):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_needed_on_the_way_lies_beside_the_target_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp-a1b2c3d4").mkdir()
    with files.scratch_folder(tmp_path / "out", MARK) as scratch:
        assert scratch.parent == tmp_path
        with fresh_folder(tmp_path / "out", MARK) as staged:
            (staged / MARK).write_text("")
        # The inner one has not taken it for a killed run's.
        assert scratch.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with (
        pytest.raises(OutputError, match="not an earlier result"),
        files.scratch_folder(tmp_path / "out", "another"),
    ):
        pytest.fail("the body must not run")


# --------------------------------------------------------------------------------------------------
# files


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "a.txt", "one")
    write_atomically(tmp_path / "new" / "a.txt", "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "new").iterdir()] == [("a.txt", "two")]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot be written"):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "new"]


def test_several_files_are_written_or_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="f/b: cannot be written"):
        files.write_all({tmp_path / "a": "after", tmp_path / "f" / "b": "after"})
    assert (tmp_path / "a").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


@pytest.mark.usefixtures("umask")
def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "one")
    assert permissions(tmp_path / "a") == 0o640
    (tmp_path / "a").chmod(0o600)
    write_atomically(tmp_path / "a", "two")
    assert permissions(tmp_path / "a") == 0o600


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "second").symlink_to("there/a")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    write_atomically(tmp_path / "first", "one")
    assert (tmp_path / "there" / "a").read_text() == "one"
    assert (tmp_path / "first").is_symlink()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OutputError, match="round: cannot be written"):
        write_atomically(tmp_path / "round", "one")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_link_that_another_user_made_where_everybody_may_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "report").symlink_to("victim")
    lstat = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        state = lstat(path)
        return os.stat_result([*state[:4], state.st_uid + 7, *state[5:10]])

    monkeypatch.setattr(Path, "lstat", of_another)
    tmp_path.chmod(0o1777)
    with pytest.raises(OutputError, match="report: is a link that another user made"):
        write_atomically(tmp_path / "report", "theirs")
    tmp_path.chmod(0o755)
    write_atomically(tmp_path / "report", "one's own")
    assert (tmp_path / "victim").read_text() == "one's own"


def test_a_prepared_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("mine")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0123456789abcdef")
    (tmp_path / ".a.tmp-0123456789abcdef").symlink_to("victim")
    with pytest.raises(OutputError, match=r"a: cannot be written \(File exists\)"):
        write_atomically(tmp_path / "a", "theirs")
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit((tmp_path / "pipe").read_text)
        write_atomically(tmp_path / "pipe", "content")
        assert text.result() == "content"
    assert (tmp_path / "pipe").is_fifo()


def test_temporary_files_of_killed_runs_are_swept_and_those_of_living_ones_are_not(
    tmp_path: Path,
) -> None:
    dead, new, alive, other = (
        tmp_path / f".{name}" for name in ("a.tmp-" + "0" * 16, "a.tmp-" + "1" * 16,
                                           "a.tmp-" + "2" * 16, "ab.tmp-" + "3" * 16)
    )  # fmt: skip
    for path in (dead, new, alive, other):
        path.write_text("half")
    for path in (dead, alive, other):
        os.utime(path, (time.time() - 3600,) * 2)
    with alive.open("r+") as file:
        assert locks.try_lock(file.fileno())
        write_atomically(tmp_path / "a", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([new, alive, other, tmp_path / "a"])


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(files, "_fsync", lambda _: events.append("sync"))
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        events.append("replace")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    write_atomically(tmp_path / "a", "x")
    assert events == ["sync", "replace", "sync"]


def test_a_disk_that_cannot_keep_a_file_is_an_error_and_one_that_need_not_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(code: int) -> None:
        def fsync(fd: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    fails(errno.EIO)
    with pytest.raises(OutputError, match="cannot be written"):
        files.sync(tmp_path)
    with pytest.raises(OutputError, match="a: cannot be written"):
        write_atomically(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []
    fails(errno.EINVAL)
    write_atomically(tmp_path / "a", "x")
    files.sync(tmp_path)


# --------------------------------------------------------------------------------------------------
# a disk's refusal in one line

ROOM = 100_000


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file of this process becomes larger than `ROOM` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_numpy(path: Path) -> None:
    np.save(path, np.zeros(ROOM))


def write_picture(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(path, "PNG")


def write_tokenizer(path: Path) -> None:
    Tokenizer(WordLevel({f"w{i:09}": i for i in range(ROOM // 9)}, unk_token="w")).save(str(path))


def write_torch(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.zeros(ROOM), path)


def write_safetensors(path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"a": np.zeros(ROOM)}, str(path))


def write_onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.numpy_helper.from_array(np.zeros(ROOM), "a")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    onnx.save(model, str(path), save_as_external_data=True, location="data")


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize(
    "write",
    [
        write_numpy,
        write_picture,
        write_tokenizer,
        write_torch,
        write_safetensors,
        write_onnx,
    ],
)
def test_a_librarys_own_error_while_saving_is_one_line(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \([^\n]+\); free some space"),
        fresh_folder(tmp_path / "out", MARK) as staged,
    ):
        write(staged / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_reason_is_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="why"), files.saving(tmp_path / "out"):
        raise RuntimeError("why")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with (
        pytest.raises(OutputError, match=r"out: cannot be written \(No space left on device\)"),
        files.saving(tmp_path / "out"),
    ):
        raise RuntimeError("why")
    with pytest.raises(BundleError, match="mine"), files.saving(tmp_path / "out"):
        raise BundleError("mine")


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (OSError(errno.ENOENT, "No such file"), True),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/base.safetensors"), True),
        (PermissionError(errno.EACCES, "Permission denied", "OUT/weights"), False),
        (PermissionError(errno.EACCES, "Permission denied", "OUT/../base"), True),
        (PermissionError(errno.EACCES, "Permission denied", "OUT/.."), False),
        (RuntimeError("Disk quota exceeded"), False),
        (RuntimeError("os error 13"), False),
        (RuntimeError("shapes (3,) and (4,)"), True),
        (ValueError("File exists"), True),
    ],
)
def test_only_what_the_disk_refused_is_about_the_disk(
    tmp_path: Path, error: Exception, passes: bool
) -> None:
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.replace("OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    wanted = type(error) if passes else OutputError
    with pytest.raises(wanted) as raised, files.saving(tmp_path / "out"):
        raise error
    assert (raised.value is error) == passes


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
