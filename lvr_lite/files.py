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

from lvr_lite.errors import OutputError

# What a JSON file holds, at the border to typed code.
JsonObject = dict[str, object]
MANIFEST = "lvr.json"
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
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def fresh_folder(target: Path, replaceable: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end; on any error nothing is
    left and `target` is as before.

    An existing target is replaced only where it is empty or holds the file `replaceable` (what an
    earlier run of the same command wrote). Raises OutputError where the target is something else,
    or where it cannot be written (a full disk, no permission).
    """
    target = target.resolve()  # a link stays a link to the new folder
    if target.exists() and not (
        target.is_dir() and (not any(target.iterdir()) or (target / replaceable).is_file())
    ):
        raise OutputError(
            f"{target}: exists and is not an earlier result of this command; choose another folder, or remove it"
        )
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        staged = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.tmp-{os.getpid()}-", dir=target.parent)
        )
        staged.chmod(0o755)
        yield staged
        _take_place(staged, target)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}); free some space or choose another folder"
        ) from error
    finally:
        if staged is not None and staged.exists():
            shutil.rmtree(staged, ignore_errors=True)


def _take_place(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`; what was there goes last, and comes back where the renaming
    fails.
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
    """Removes what a killed run left beside `target` (its process is gone)."""
    for left in target.parent.glob(f".{target.name}.tmp-*"):
        pid = left.name.split(".tmp-")[1].split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").exists():
            shutil.rmtree(left, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all. Raises OutputError on a full disk or a
    missing permission.
    """
    staged = path.parent / f".{path.name}.tmp-{os.getpid()}"  # "." and "/" have no name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            staged.write_text(content, encoding="utf-8")
        else:
            staged.write_bytes(content)
        staged.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(
            OSError
        ):  # it may never have been made; the error above is the one to tell
            staged.unlink(missing_ok=True)


def check_free_space(folder: Path, needed: int) -> None:
    """Raises OutputError where the disk that `folder` is (or will be) on has less than `needed`
    bytes free.
    """
    there = next(
        parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists()
    )
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{folder}: needs {needed / 1e6:,.0f} MB of free disk, {free / 1e6:,.0f} MB are left; free some or choose another disk"
        )
