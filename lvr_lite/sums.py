"""SHA256SUMS: the hashes of a folder's files, in the format of `sha256sum`.

May import: the standard library and `files`.

A file that a disk or a copy damaged is named before anything is read from it. `sha256sum -c
SHA256SUMS` checks the same without this project. It is no signature: whoever writes the files can
write their hashes too. A folder without it is one of an earlier version, or of someone else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from lvr_lite.errors import BundleError
from lvr_lite.files import kept_sha256, write_atomically

SUMS = "SHA256SUMS"
# Of sha256sum, which marks what it read as binary with "*".
LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\x00-\x1f\\]+)")
# A list of hashes is short; what is longer is something else.
LARGEST = 1 << 20


def write_sums(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS over some files of a folder, in the order of their names.

    names: paths relative to `folder`, with "/" between their parts.
    known: {name: sha256} of files that were hashed already.

    Raises OutputError where it cannot be written.
    """
    digests = known or {}
    lines = []
    for name in sorted(set(names)):
        digest = digests.get(name) or kept_sha256(folder / name)
        lines.append(f"{digest}  {name}\n")
    write_atomically(folder / SUMS, "".join(lines).encode())


def files_below(folder: Path) -> list[str]:
    """Every file of a folder and of its folders, as `write_sums` names them, SHA256SUMS aside."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != SUMS)


def check_sums(
    folder: Path,
    known: Mapping[str, str] | None = None,
    required: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> None:
    """Whether the files of a folder have the hashes of its SHA256SUMS; nothing where there is none.

    known: {name: sha256} of files that were hashed already.
    required: files that must be listed.
    skip: patterns of names that are not hashed, such as "optimizer.pt".

    Raises BundleError for the first file that is missing or has another hash, and for a line that
    is damaged. It names that file and SHA256SUMS: either may be the one that was changed.
    """
    path = folder / SUMS
    if not path.is_file():
        return
    digests = read_sums(path)
    for name in required:
        if name not in digests:
            raise BundleError(f"{path}: has no line for {name}; {_remedy(folder)}")
    patterns = tuple(skip)
    for name, digest in digests.items():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            _check(folder, name, digest, known or {})


def read_sums(path: Path) -> dict[str, str]:
    """{name: sha256} of a SHA256SUMS. Raises BundleError naming the line that is damaged."""
    folder = path.parent
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        place = 1 + content[: error.start].count(b"\n")
        raise BundleError(f"{path}: line {place}: not UTF-8; {_remedy(folder)}") from error
    if len(content) > LARGEST:
        raise BundleError(f"{path}: longer than {LARGEST} bytes; {_remedy(folder)}")
    # The last line ends too: what stands after its end is nothing.
    *lines, rest = text.split("\n")
    if rest or not lines:
        raise BundleError(f"{path}: cut off after line {len(lines)}; {_remedy(folder)}")
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None or not is_plain(match["name"]) or match["name"] in digests:
            raise BundleError(f"{path}: line {number}: damaged ({line[:80]!r}); {_remedy(folder)}")
        digests[match["name"]] = match["digest"]
    return digests


def is_plain(name: str) -> bool:
    """Whether a name is a path below a folder, in the one spelling that all systems read alike:
    parts between "/", no "..", no drive, no backslash, no control character.
    """
    parts = PurePosixPath(name).parts
    odd = any(sign in name for sign in ":\\*") or not name.isprintable()
    return (
        bool(parts)
        and "/".join(parts) == name
        and ".." not in parts
        and parts[0] != "/"
        and not odd
    )


def _check(folder: Path, name: str, digest: str, known: Mapping[str, str]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: leads out of its folder; do not use it")
    if not path.is_file():
        raise BundleError(f"{path}: missing, and {SUMS} lists it; {_remedy(folder)}")
    try:
        found = known.get(name) or kept_sha256(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    if found != digest:
        raise BundleError(
            f"{path}: changed or truncated (its sha256 is not that in {SUMS}); {_remedy(folder)}"
        )


def _remedy(folder: Path) -> str:
    return (
        f"copy {folder} again; if you changed it yourself, remove its {SUMS} or write that "
        "again with sha256sum"
    )
