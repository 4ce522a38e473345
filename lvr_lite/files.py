"""Files and folders: written whole or not at all, known by their hashes. May import: the standard
library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lvr_lite import locks
from lvr_lite.errors import LvrError, OutputError

if sys.platform == "darwin":
    import fcntl

# What JSON calls an object, as it is read or about to be written.
JsonObject = dict[str, Any]

# Of what is written in place: the lock on it, and its file in a folder.
locked = locks.locked
LOCK = locks.LOCK

# What a system call fails with where a user can mend it: space, quota, permissions, another file
# or name, a broken disk.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EISDIR,
    errno.EFBIG,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.EBUSY,
    errno.EXDEV,
)
# Of these, what only a disk says, whatever a library makes of it.
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def kept_sha256(path: Path) -> str:
    """As `sha256`, read anew only where the file is another than when it was last hashed.

    What was computed is kept in the user's cache folder by the file's identity: path, size, times
    of change, device and inode. A file that changed within the last seconds is not kept, since
    another change might have the same time. Where the cache cannot be read or written, the file is
    hashed each time.
    """
    place = str(path.resolve())
    identity = _identity(path)
    if _kept_hashes().get(place, {}).get("identity") == identity:
        return str(_kept_hashes()[place]["sha256"])
    digest = sha256(path)
    settled = time.time_ns() - max(identity[1:3]) > SETTLED_NS
    if identity[0] >= WORTH_KEEPING and settled and _identity(path) == identity:
        _keep_hash(place, {"identity": identity, "sha256": digest})
    return digest


# Bytes from which on a file's hash is kept, and of how many files.
WORTH_KEEPING = 1 << 20
MOST_KEPT = 1000
# Nanoseconds after which a further change shows in a file's times, on any file system.
SETTLED_NS = 3 * 10**9


def _identity(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino]


def user_cache() -> Path:
    """The folder of this user's files that may be lost."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "lvr-lite"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "lvr-lite"
    folder = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(folder).expanduser() / "lvr-lite"


def _kept_hashes() -> dict[str, JsonObject]:
    """{path: its identity and sha256}; {} where nothing was kept, or what was kept is damaged."""
    try:
        kept = json.loads((user_cache() / "sha256.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    entries = kept.get("files") if isinstance(kept, dict) else None
    if not isinstance(entries, dict):
        return {}
    return {path: entry for path, entry in entries.items() if _is_hash(entry)}


def _is_hash(entry: object) -> bool:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return isinstance(digest, str) and len(digest) == 64


def _keep_hash(place: str, entry: JsonObject) -> None:
    # The newest come last.
    kept = {path: other for path, other in _kept_hashes().items() if path != place}
    newest = list((kept | {place: entry}).items())[-MOST_KEPT:]
    # Nothing is lost without it but time; a home that does not exist raises RuntimeError.
    with contextlib.suppress(OutputError, RuntimeError):
        text = json.dumps({"version": 1, "files": dict(newest)})
        write_atomically(user_cache() / "sha256.json", text)


# --------------------------------------------------------------------------------------------------
# on the disk


def sync(path: Path) -> None:
    """Return when the disk keeps a file, or a folder with all that is in it: it then survives a
    loss of power. Raises OutputError where the disk cannot (it is full, or broken).
    """
    try:
        _sync(path)
    except OSError as error:
        raise locks.unwritable(path, error, "place") from error


def _sync(path: Path) -> None:
    if not path.is_dir():
        _sync_one(path)
        return
    # It is slow to import.
    from concurrent.futures import ThreadPoolExecutor

    # A folder comes after those in it.
    folders = {Path(place): names for place, _, names in os.walk(path, topdown=False)}
    files = [folder / name for folder, names in folders.items() for name in names]
    with ThreadPoolExecutor(SYNCED_TOGETHER) as pool:
        for _ in pool.map(_sync_one, files):
            pass
    for folder in folders:
        _sync_one(folder)


# Disks write what several ask for at once in one go: 2,000 small files took 0.4 s with 8 threads
# and 12.5 s with one.
SYNCED_TOGETHER = 8


def _sync_one(path: Path) -> None:
    """A file, or the names in a folder."""
    if path.is_symlink() or (sys.platform == "win32" and path.is_dir()):
        return
    # Windows flushes only what may be written.
    fd = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _fsync(fd: int) -> None:
    try:
        if sys.platform == "darwin":
            # fsync leaves it in the disk's own memory there; disks of other hosts know only that.
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(fd)
    except OSError as error:
        # Some file systems have no such call.
        if error.errno not in (errno.EINVAL, *locks.WITHOUT_LOCKS):
            raise


# What a library says of a disk that refused it, without the system's error number.
OF_WRITERS = re.compile(
    r"PytorchStreamWriter|inline_container|requested and \d+ written|when writing image file"
)
# Free bytes below which a disk is full.
FULL = 1 << 20


@contextlib.contextmanager
def saving(path: Path, what: str = "folder") -> Iterator[None]:
    """Turn what a library raises where it cannot write (safetensors, torch, onnx, numpy and Pillow
    have errors of their own for a full disk) into one line.

    path: the folder or file that is written. what: what it is in that line.

    Raises OutputError for an error that the disk or its permissions caused, as told by the
    system's number, the error's words, or a disk that is full; any other passes, and one that names
    a file elsewhere.
    """
    try:
        yield
    except (LvrError, MemoryError, ImportError):
        raise
    except Exception as error:
        reason = None if _is_elsewhere(path, error) else _refused_by_disk(path, error)
        if reason is None:
            raise
        raise OutputError(locks.unwritable_line(path, reason, what)) from error


def _refused_by_disk(path: Path, error: BaseException) -> str | None:
    """Why a disk refused to write, in the system's words; None where it did not."""
    if isinstance(error, OSError) and error.errno is not None:
        refused = error.errno in UNWRITABLE
        return error.strerror or os.strerror(error.errno) if refused else None
    text = str(error)
    codes = [int(code) for code in re.findall(r"os error (\d+)", text)]
    for code in UNWRITABLE:
        if code in codes or (code in OF_DISKS and os.strerror(code) in text):
            return os.strerror(code)
    if shutil.disk_usage(_existing(path)).free < FULL:
        return os.strerror(errno.ENOSPC)
    return text.splitlines()[0][:200] if OF_WRITERS.search(text) else None


def _is_elsewhere(path: Path, error: BaseException) -> bool:
    """Whether an error names a file that is neither `path`, nor in it, nor in what is written for
    it beside it: one that was to be read.
    """
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str | bytes) or not name:
        return False
    file, parent = Path(os.fsdecode(name)).resolve(), path.resolve().parent
    if file == parent or not file.is_relative_to(parent):
        return file != parent
    first = file.relative_to(parent).parts[0]
    return first != path.name and not first.startswith(f".{path.name}.")


@contextlib.contextmanager
def fresh_folder(target: Path, replaceable: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end; after an error nothing is
    left of it and `target` is as before.

    No other process gets `target` meanwhile. What was written is on the disk before it takes the
    name, and where an earlier result is there, both change names in one step; a system that cannot
    do so renames twice, and whoever asks for `target` next puts back what a kill in between left.

    replaceable: a file that results of this command hold. An existing `target` is replaced only
        where it is empty or holds this file.

    Raises OutputError where `target` is something else, is written by another process, or cannot
    be written (a full disk, no permission).
    """
    # A link stays a link to the new folder.
    target = locks.behind_links(target)
    _refuse_foreign(target, replaceable)
    with _owned(target), _temporary(target) as staged, saving(target):
        _put_back(target, replaceable)
        yield staged
        staged.chmod(_mode_of(target, staged))
        # Minutes may have passed.
        _refuse_foreign(target, replaceable)
        take_place(staged, target)


@contextlib.contextmanager
def scratch_folder(target: Path, replaceable: str) -> Iterator[Path]:
    """A temporary folder beside `target`, for what is needed until that is written; no other
    process gets `target` meanwhile. Raises OutputError as `fresh_folder`, before the work.
    """
    target = locks.behind_links(target)
    _refuse_foreign(target, replaceable)
    with _owned(target), _temporary(target) as folder, saving(target):
        yield folder


@contextlib.contextmanager
def _owned(target: Path) -> Iterator[None]:
    """Hold `target`, without what killed runs left beside it."""
    with locked(target, "folder") as taken:
        if taken:
            # Whoever made a temporary folder held the lock: these have no process any more.
            for leftover in _beside(target, TEMPORARY):
                shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A folder for this user alone."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    except OSError as error:
        raise locks.unwritable(target, error, "folder") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# How names go on that begin with a dot and the target's name: of a temporary folder; of a result
# that another is about to replace, on systems that cannot exchange two; of a temporary file.
TEMPORARY = r"\.tmp-[a-z0-9_]{8}"
EARLIER = r"\.earlier-[0-9a-f]{16}"
TEMPORARY_FILE = r"\.tmp-[0-9a-f]{16}"


def _beside(target: Path, ending: str) -> list[Path]:
    """What lies beside `target` under a name of this kind, the newest last."""
    kind = re.compile(re.escape(f".{target.name}") + ending)
    try:
        return sorted(
            (path for path in target.parent.iterdir() if kind.fullmatch(path.name)),
            key=lambda path: path.lstat().st_mtime,
        )
    except OSError:
        # The folder cannot be listed, or one of them went away.
        return []


def _refuse_foreign(target: Path, replaceable: str) -> None:
    earlier = target.is_dir() and (not any(target.iterdir()) or (target / replaceable).is_file())
    if target.exists() and not earlier:
        raise OutputError(
            f"{target}: exists and is not an earlier result of this command; "
            "choose another folder, or remove it"
        )


def _mode_of(target: Path, staged: Path) -> int:
    """The permissions of an earlier folder, or those that a new one has here."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    usual = staged / ".usual"
    usual.mkdir()
    mode = stat.S_IMODE(usual.stat().st_mode)
    usual.rmdir()
    return mode


def take_place(staged: Path, target: Path) -> None:
    """Give the folder `staged`, on the same disk, the name `target`, and remove what had it. At
    every moment either is whole at `target`, or `earlier_result` finds the one that was.

    Raises OutputError where another process holds `target`, OSError where it cannot be renamed; it
    is as before then.
    """
    target = locks.behind_links(target)
    with locked(target, "folder"):
        _sync(staged)
        _change_names(staged, target)


def _change_names(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
        _sync_one(target.parent)
        return
    old = staged
    if not _exchange(staged, target):
        old = target.parent / f".{target.name}.earlier-{secrets.token_hex(8)}"
        target.rename(old)
        try:
            staged.rename(target)
        except BaseException:
            old.rename(target)
            raise
    _sync_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_up(folder: Path) -> None:
    """Move what is in a folder into the one around it, and remove the folder."""
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmdir()


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's names in one step; False where the system or the disk cannot.

    Source: rename(2) of Linux, renamex_np(2) of macOS.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        return bool(library.renamex_np(*names, RENAME_SWAP) == 0)
    # An old C library has no such call.
    if not hasattr(library, "renameat2"):
        return False
    return bool(library.renameat2(AT_CWD, names[0], AT_CWD, names[1], RENAME_EXCHANGE) == 0)


# Of <fcntl.h> and <stdio.h>.
AT_CWD = -100
RENAME_EXCHANGE = 2
RENAME_SWAP = 2


def earlier_result(target: Path) -> Path | None:
    """Where the result lies that was at `target` when its replacing was killed between two
    renames; None where there is none.
    """
    return next(reversed(_beside(target, EARLIER)), None)


def _put_back(target: Path, replaceable: str) -> None:
    """After a kill between the two renames of `take_place`: the earlier result is at `target`
    again. Where the new one is whole there, the earlier one goes.
    """
    whole = (target / replaceable).is_file()
    for old in reversed(_beside(target, EARLIER)):
        if whole:
            shutil.rmtree(old, ignore_errors=True)
        elif (old / replaceable).is_file():
            # An empty folder may have been made there since.
            if target.exists():
                target.rmdir()
            old.rename(target)
            whole = True


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all; it is on the disk afterwards.

    It keeps the permissions of the file that was there. A link stays, and what it leads to is
    replaced, except for one that another user made where everybody may. A pipe or a device is
    written into.

    Raises OutputError on a full disk or a missing permission.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, each as `write_atomically`, all or none: none takes its name before all
    are on the disk.
    """
    # {path: (what it leads to, its new content)}
    staged: dict[Path, tuple[Path, Path]] = {}
    try:
        for path, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            target = locks.behind_links(path)
            if target.exists() and not target.is_file() and not target.is_dir():
                target.write_bytes(data)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                _sweep_files(target)
                staged[path] = target, _staged_file(target, data)
        for path in staged:
            target, new = staged[path]
            new.replace(target)
        for folder in {target.parent for target, _ in staged.values()}:
            _sync_one(folder)
    except OSError as error:
        raise locks.unwritable(path, error, "place") from error
    finally:
        for _, new in staged.values():
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


def _staged_file(target: Path, data: bytes) -> Path:
    """A new file beside `target`, on the disk. It is locked until it is whole."""
    new = target.parent / f".{target.name}.tmp-{secrets.token_hex(8)}"
    binary = getattr(os, "O_BINARY", 0)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | locks.NO_LINK | binary, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            locks.try_lock(fd)
            if target.exists():
                new.chmod(target.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            _fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    return new


# Seconds after which a temporary file that nobody has locked is a killed run's, and where the disk
# has no locks.
ABANDONED = 60
LONG_ABANDONED = 24 * 3600


def _sweep_files(target: Path) -> None:
    """Remove temporary files that killed runs left beside `target`."""
    for leftover in _beside(target, TEMPORARY_FILE):
        # It is another user's, or went away meanwhile.
        with contextlib.suppress(OSError):
            age = time.time() - leftover.lstat().st_mtime
            if age < ABANDONED:
                continue
            fd = os.open(leftover, os.O_RDWR | locks.NO_LINK)
            try:
                free = locks.try_lock(fd)
            finally:
                os.close(fd)
            if free or (free is None and age > LONG_ABANDONED):
                leftover.unlink()


def check_free_space(folder: Path, needed: int) -> None:
    """Raises OutputError where the disk that `folder` is (or will be) on has less than `needed`
    bytes free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise OutputError(
            f"{folder}: needs {needed / 1e6:,.0f} MB of free disk, {free / 1e6:,.0f} MB are left; "
            "free some or choose another disk"
        )


def _existing(path: Path) -> Path:
    """`path`, or the first folder around it that is there."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())
