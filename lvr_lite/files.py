"""Files and folders: written whole or not at all, known by their hashes. May import: the standard
library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
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
