"""What the watch must notice, planted: `python -m tests.fuzz.planted FOLDER` prints what it found
of each as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lvr_lite.errors import DataError
from tests.fuzz import watch
from tests.fuzz.watch import SECRET, Case, World

# Of what hangs and of what takes memory.
SECONDS = 3.0
MEMORY_MB = 150.0


def act(words: Sequence[str]) -> None:
    """One planted fault, or nothing wrong."""
    what = words[0]
    world = Path(words[1])
    if what == "traceback":
        raise KeyError("planted")
    if what == "one line":
        raise DataError("planted: refused")
    if what == "hang":
        time.sleep(60)
    if what == "busy":
        while True:
            pass
    if what == "memory":
        assert b"x" * (200 << 20)
    if what == "write outside":
        (world / "stray").write_text("planted")
    if what == "write inside":
        (world / "out" / "result").write_text("sound")
    if what == "remove":
        (world / "in" / "a").unlink()
    if what == "unseen write":
        # As a library would, past Python.
        libc = ctypes.CDLL(None)
        libc.open.restype = ctypes.c_int
        fd = libc.open(os.fsencode(world / "in" / "a"), os.O_WRONLY | os.O_TRUNC)
        libc.write(fd, b"planted", 7)
    if what == "read outside":
        (world / SECRET).read_text()
    if what == "read through a link":
        (world / "in" / "link").read_text()
    if what == "program":
        subprocess.run(["true"], check=True)
    if what == "death":
        ctypes.string_at(0)
    if what == "evaluation":
        eval("1 + 1")


PLANTED = (
    "nothing", "one line", "write inside", "traceback", "hang", "busy", "memory", "write outside",
    "remove", "unseen write", "read outside", "read through a link", "program", "death",
    "evaluation",
)  # fmt: skip


def main(folder: Path) -> None:
    world = World(folder, {})
    finds = {}
    for what in PLANTED:
        files = {"in/a": b"a"}
        links = {"in/link": f"../{SECRET}"}
        case = Case("rewards", None, files, ((what, str(folder)),), links)
        finds[what] = watch.run(case, world, act, SECONDS, MEMORY_MB).find
    print(json.dumps(finds))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
