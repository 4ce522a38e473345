"""Files and folders: written whole or not at all, known by their hashes. May import: the standard
library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lvr_lite.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# What JSON calls an object, as it is read or about to be written.
JsonObject = dict[str, Any]

# What a system call fails with where a user can mend it: space, quota, permissions, another file.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)
# Refuses a link in a file's place, and does not wait for a pipe's other end; 0 on Windows.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


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
# one writer at a time

# The file of a lock: ".NAME.lvr-lite.lock" beside what it is for, or ".lvr-lite.lock" in it.
LOCK = ".lvr-lite.lock"
# What a file system without locks answers.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# Windows locks bytes, which nobody else can read then: one that lies behind the holder's words.
LOCKED_BYTE = 1 << 30


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says.

    since: seconds since 1970.
    command: its first words.
    kernel: whether the lock ends with the process. On a disk without locks the file alone is the
        lock, and stays when its process is killed.
    """

    host: str
    pid: int
    since: float
    command: str
    kernel: bool = True

    @classmethod
    def this(cls, kernel: bool) -> Holder:
        """This process."""
        words = [Path(sys.argv[0]).name, *sys.argv[1:]]
        command = " ".join(words)[:80]
        return cls(platform.node(), os.getpid(), time.time(), command, kernel)

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """None where the file is gone or says something else."""
        try:
            fields = json.loads(_read_small(file))
            return cls(
                _plain(str(fields["host"])),
                int(fields["pid"]),
                float(fields["since"]),
                _plain(str(fields["command"])),
                bool(fields["kernel"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def to_json(self) -> JsonObject:
        return asdict(self)

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on {self.host} since {began} ({self.command})"


def _plain(text: str) -> str:
    """Without characters that would do something to a terminal: another may have written them."""
    return "".join(c if c.isprintable() else "?" for c in text)[:100]


def _read_small(file: Path) -> bytes:
    fd = os.open(file, os.O_RDONLY | NO_LINK)
    try:
        return os.read(fd, 1000)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path, what: str, inside: bool = False) -> Iterator[None]:
    """Hold `path` for this process: whoever else asks for it is refused until the block ends.

    The kernel keeps the lock, on a file of its own beside `path`, and takes it back however the
    process ends; so it counts between containers and on shared disks, where a process number says
    nothing. Forked processes do not share it. On a disk without locks the file itself is the lock.

    what: what `path` is, in the error's words, such as "folder" or "--answers file".
    inside: the lock's file lies in the folder `path`, which is made where it is missing: for a
        folder that is written in place, which may be a mount whose parent is another one in each
        container. Its name is `LOCK`.

    Raises OutputError where another process holds it, which is named, and where the lock's file
    cannot be made.
    """
    place = behind_links(path)
    made = inside and not place.exists()
    file = place / LOCK if inside else place.with_name(f".{place.name}{LOCK}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock_file(file)
    except OSError as error:
        raise _unwritable(path, error, what) from error
    if fd is None:
        raise OutputError(_held(path, what, file))
    owner = os.getpid()
    _held_descriptors.add(fd)
    try:
        yield
    finally:
        # A forked process that comes here must not release what its parent holds.
        if os.getpid() == owner:
            _held_descriptors.discard(fd)
            _release(fd, file)
        if made:
            # Only where nothing was written into it.
            with contextlib.suppress(OSError):
                place.rmdir()


def _held(path: Path, what: str, file: Path) -> str:
    holder = Holder.read(file)
    if holder is None:
        return f"{path}: another process is writing this {what}; wait for it, or name another"
    ends = "" if holder.kernel else f", or remove {file} where that process is gone"
    return f"{path}: {holder} is writing this {what}; wait for it, or name another{ends}"


def _lock_file(file: Path) -> int | None:
    """The descriptor of a lock's file, which says that this process holds it; None where another
    process does. Raises OSError where it cannot be made, or is something else.
    """
    while True:
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
            made = True
        except FileExistsError:
            try:
                fd = os.open(file, os.O_RDWR | NO_LINK)
            except FileNotFoundError:
                continue
            made = False
        try:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
                raise FileExistsError(errno.EEXIST, f"{file} is something else; remove it")
            kernel = _lock(fd)
            holds = made if kernel is None else kernel
            # Its last holder may have removed it after it was opened here.
            if holds and _is_at(fd, file):
                words = json.dumps(Holder.this(kernel is not None).to_json())
                os.ftruncate(fd, 0)
                os.write(fd, words.encode())
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not holds:
            return None


def _lock(fd: int) -> bool | None:
    """Whether this process now holds the lock on a file; None where its disk has no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in WITHOUT_LOCKS:
            return None
        raise
    return True


def _is_at(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), file.lstat())
    except FileNotFoundError:
        return False


def _release(fd: int, file: Path) -> None:
    if sys.platform == "win32":
        # An open file cannot be removed there; nor can one that another process opened since.
        os.close(fd)
    # While it is held: whoever opened it before sees that it is gone, and makes a new one.
    with contextlib.suppress(OSError):
        file.unlink()
    if sys.platform != "win32":
        os.close(fd)


# Of locks that this process holds.
_held_descriptors: set[int] = set()


def _let_go() -> None:
    """In a forked process: a lock ends with the process that took it, whose copies of the
    descriptor would outlive it.
    """
    for fd in _held_descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
    _held_descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def behind_links(path: Path) -> Path:
    """The absolute path that `path` leads to through links: what is written there, and the link
    stays.

    Raises OutputError for a link that another user made in a folder where everybody may make one.
    """
    for _ in range(MOST_LINKS):
        if not path.is_symlink():
            break
        link, folder = path.lstat(), path.parent.stat()
        anybody = folder.st_mode & stat.S_IWOTH
        if anybody and hasattr(os, "geteuid") and link.st_uid not in (os.geteuid(), folder.st_uid):
            raise OutputError(
                f"{path}: is a link that another user made in a folder where everybody may; "
                "choose another place"
            )
        path = path.parent / path.readlink()
    return path.parent.resolve() / path.name if path.name else path.resolve()


# Links one after the other, as Linux follows at most.
MOST_LINKS = 40


# --------------------------------------------------------------------------------------------------
# on the disk


def sync(path: Path) -> None:
    """Return when the disk keeps a file, or a folder with all that is in it: it then survives a
    loss of power. Raises OutputError where the disk cannot (it is full, or broken).
    """
    try:
        _sync(path)
    except OSError as error:
        raise _unwritable(path, error, "place") from error


def _sync(path: Path) -> None:
    if path.is_dir():
        for place, _, names in os.walk(path, topdown=False):
            for name in names:
                _sync_one(Path(place) / name)
            _sync_one(Path(place))
    else:
        _sync_one(path)


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
            # fsync leaves it in the disk's own memory there.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)
    except OSError as error:
        # Some file systems have no such call.
        if error.errno not in (errno.EINVAL, *WITHOUT_LOCKS):
            raise


@contextlib.contextmanager
def fresh_folder(target: Path, replaceable: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end; after an error nothing is
    left of it and `target` is as before.

    replaceable: a file that results of this command hold. An existing `target` is replaced only
        where it is empty or holds this file.

    Raises OutputError where `target` is something else or cannot be written (a full disk, no
    permission).
    """
    # A link stays a link to the new folder.
    target = target.resolve()
    earlier = target.is_dir() and (not any(target.iterdir()) or (target / replaceable).is_file())
    if target.exists() and not earlier:
        raise OutputError(
            f"{target}: exists and is not an earlier result of this command; "
            "choose another folder, or remove it"
        )
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        prefix = f".{target.name}.tmp-{os.getpid()}-"
        staged = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        staged.chmod(0o755)
        yield staged
        _take_place(staged, target)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise _unwritable(target, error, "folder") from error
    finally:
        if staged is not None and staged.exists():
            shutil.rmtree(staged, ignore_errors=True)


def _take_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`. What was there is removed last, and is put back where the
    renaming fails.
    """
    if not target.exists():
        staged.rename(target)
        return
    old = staged.with_name(staged.name + "-old")
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _sweep(target: Path) -> None:
    """Remove what a killed run left beside `target`: a temporary folder whose process is gone."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        pid = leftover.name.split(".tmp-")[1].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all. Raises OutputError on a full disk or a
    missing permission.
    """
    # Not `with_name`: "." and "/" have no name.
    staged = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            staged.write_text(content, encoding="utf-8")
        else:
            staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        raise _unwritable(path, error, "place") from error
    finally:
        # It may never have been made; the error above is the one to report.
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def check_free_space(folder: Path, needed: int) -> None:
    """Raises OutputError where the disk that `folder` is (or will be) on has less than `needed`
    bytes free.
    """
    path = folder.resolve()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{folder}: needs {needed / 1e6:,.0f} MB of free disk, {free / 1e6:,.0f} MB are left; "
            "free some or choose another disk"
        )


def _unwritable(path: Path, error: OSError, other: str) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); "
        f"free some space or choose another {other}"
    )
