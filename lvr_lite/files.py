"""Files and folders: written whole or not at all, known by their hashes. May import: the standard
library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvr_lite.errors import OutputError

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


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
