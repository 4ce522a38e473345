"""The files of a folder that others' data lie in, by their names in NFC. May import: the standard
library and what stands above `data`.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lvr_lite.errors import DataError


def files_below(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, in links to folders too. Hidden ones (".…") are
    none, and a link to a folder that it stands in is not followed.
    """
    waiting = [(folder, frozenset({folder.resolve()}))]
    while waiting:
        place, above = waiting.pop()
        try:
            paths = sorted(place.iterdir())
        except OSError as error:
            raise DataError(
                f"{place}: cannot be read ({error.strerror or error}); check its permissions"
            ) from error
        for path in paths:
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif (real := path.resolve()) not in above:
                waiting.append((path, above | {real}))


def paths_by_name(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names in NFC."""
    paths: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files_below(folder):
        paths[unicodedata.normalize("NFC", path.name)].append(path)
    return paths


def parts_of(path: Path) -> tuple[str, ...]:
    """The parts of a path in NFC, however its letters with accents are written."""
    return Path(unicodedata.normalize("NFC", str(path))).parts
