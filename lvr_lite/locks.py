"""One writer at a time on a folder or a file, held by the kernel. May import: the standard library.

The lock of NAME is a file `.NAME.lvr-lite.lock` beside it, which says who holds it and is removed
with the lock. A killed run's stays, and is no lock any more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import sys
import threading
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

# Refuses a link in a file's place, and does not wait for a pipe's other end; 0 on Windows.
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
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
        program = Path(sys.argv[0] if sys.argv else "")
        # Of `python -m`, the package.
        name = program.parent.name if program.name == "__main__.py" else program.name
        command = " ".join([name, *sys.argv[1:]])[:80]
        return cls(platform.node(), os.getpid(), time.time(), command, kernel)

    @classmethod
    def read(cls, file: Path) -> Holder | None:
        """None where the file is gone or says something else."""
        try:
            fields = json.loads(_read_small(file).decode("utf-8"))
            time.gmtime(float(fields["since"]))
            return cls(
                _plain(str(fields["host"])),
                int(fields["pid"]),
                float(fields["since"]),
                _plain(str(fields["command"])),
                bool(fields["kernel"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def to_json(self) -> dict[str, Any]:
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
        return os.read(fd, 4000)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path, what: str, inside: bool = False) -> Iterator[bool]:
    """Hold `path` for this process: whoever else asks for it is refused until the block ends.

    The kernel keeps the lock, on a file of its own beside `path`, and takes it back however the
    process ends; so it counts between containers and on shared disks, where a process number says
    nothing. Forked processes do not share it. On a disk without locks the file itself is the lock.
    The thread that holds it may ask again; gives whether it was taken now.

    what: what `path` is, in the error's words, such as "folder" or "--answers file".
    inside: the lock's file lies in the folder `path`, which is made where it is missing: for a
        folder that is written in place, which may be a mount whose parent is another one in each
        container. Its name is `LOCK`.

    Raises OutputError where another holds it, which is named, and where the lock's file cannot be
    made.
    """
    place = behind_links(path)
    file = place / LOCK if inside else place.parent / f".{place.name}{LOCK}"
    if _ours.get(file) == (owner := (os.getpid(), threading.get_ident())):
        yield False
        return
    made = inside and not place.exists()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock_file(file)
    except OSError as error:
        raise unwritable(path, error, what) from error
    if fd is None:
        raise OutputError(_held(path, what, file))
    _descriptors.add(fd)
    _ours[file] = owner
    try:
        yield True
    finally:
        # A forked process that comes here must not release what its parent holds.
        if os.getpid() == owner[0]:
            del _ours[file]
            _descriptors.discard(fd)
            _release(fd, file)
            if made:
                # Only where nothing was written into it.
                with contextlib.suppress(OSError):
                    place.rmdir()


# The files of locks that this process holds, with process and thread; and their descriptors.
_ours: dict[Path, tuple[int, int]] = {}
_descriptors: set[int] = set()


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
            except PermissionError:
                # Another user's, who may hold it, or have been killed.
                if _is_held(file):
                    return None
                raise
            made = False
        try:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
                raise FileExistsError(errno.EEXIST, f"{file} is something else; remove it")
            kernel = try_lock(fd)
            holds = made if kernel is None else kernel
            # Its last holder may have removed it after it was opened here.
            if holds and _is_at(fd, file):
                words = json.dumps(Holder.this(kernel is not None).to_json())
                # A lock on a full disk is one without words.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
                    os.write(fd, words.encode())
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if not holds:
            return None


def try_lock(fd: int) -> bool | None:
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


def _is_held(file: Path) -> bool:
    """Whether another process holds a lock, as far as who may only read its file can tell."""
    try:
        fd = os.open(file, os.O_RDONLY | NO_LINK)
    except OSError:
        return False
    try:
        return try_lock(fd) is False
    finally:
        os.close(fd)


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


def _let_go() -> None:
    """In a forked process: a lock ends with the process that took it, whose copies of the
    descriptor would outlive it.
    """
    for fd in _descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def behind_links(path: Path) -> Path:
    """The absolute path that `path` leads to through links: what is written there, and the link
    stays.

    Raises OutputError for a link that another user made in a folder where everybody may make one,
    and for links that lead round.
    """
    given = path
    for _ in range(MOST_LINKS):
        if not path.is_symlink():
            return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
        link, folder = path.lstat(), path.parent.stat()
        anybody = folder.st_mode & stat.S_IWOTH
        if anybody and hasattr(os, "geteuid") and link.st_uid not in (os.geteuid(), folder.st_uid):
            raise OutputError(
                f"{path}: is a link that another user made in a folder where everybody may; "
                "choose another place"
            )
        path = path.parent / path.readlink()
    raise OutputError(f"{given}: cannot be written (links that lead nowhere); choose another place")


# Links one after the other, as Linux follows at most.
MOST_LINKS = 40


def unwritable(path: Path, error: OSError, what: str) -> OutputError:
    return OutputError(unwritable_line(path, error.strerror or str(error), what))


def unwritable_line(path: Path, reason: str, what: str) -> str:
    return f"{path}: cannot be written ({reason}); free some space or choose another {what}"
