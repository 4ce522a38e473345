"""Runs commands on one input in a forked process, and says what they did that they must not.

A case is files and command lines, nothing else, so that it can be kept in a folder and run again.
The process that forks has imported everything and has started no threads; each case has a process
of its own, which is killed where it hangs. In it are watched:

    errors      only what the command line turns into one line (LvrError, and a refused option)
    time        seconds of each command
    memory      the process's peak; what asks for far more is refused by the system
    files       every file that Python opens for writing, renames or removes (audit events), every
                file that is read outside the input, and all other files' times of change
    programs    whatever is started as a process
    code        of reward texts alone: whatever is compiled from a text

May import: the standard library, lvr_lite.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lvr_lite.errors import LvrError
from lvr_lite.system import peak_rss_mb

# Of one command.
SECONDS = 10.0
# Of one case's process, all that it has imported included.
MEMORY_MB = 2048.0
# Beyond what the process has, in bytes: what asks for more than this at once gets a MemoryError.
DATA_LIMIT = 4 << 30
COMMANDS_FILE = "commands.json"
SECRET = "secret"

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of the standard library that change a file, and which of their arguments are paths.
CHANGES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
    "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1, "shutil.rmtree": 1,
}  # fmt: skip
STARTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "pty.spawn", "socket.connect", "os.startfile",
)  # fmt: skip
# Where Python, its packages and the system keep what every program reads.
SYSTEM = ("/proc", "/sys", "/dev", "/usr/lib", "/usr/share", "/lib", "/etc/ld.so.cache")

Action = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Case:
    """One input: what lies in the folder IN, and what is run on it.

    kind: what was changed.
    base: a folder whose files are there too, as hard links; None for none.
    files: {path relative to the case's folder, such as "in/a.json": content}.
    links: {path relative to the case's folder: what a symbolic link there names}.
    commands: arguments of `lvr-lite`, in which IN and OUT stand for the folders.
    """

    kind: str
    base: str | None
    files: dict[str, bytes]
    commands: tuple[tuple[str, ...], ...]
    links: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.kind}: {sorted(self.files)}"


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    find: what must not be, in one line; None where all is well.
    place: where in the project, for telling one find from another.
    detail: a traceback, or "".
    refused: commands that ended with an error in one line.
    peak_mb: of the process, in MiB.
    """

    find: str | None
    place: str = ""
    detail: str = ""
    refused: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass(frozen=True)
class World:
    """The folders of a case.

    root: holds in/, out/, home/ and files that nobody may touch.
    bases: the folders that cases are made over, by name.
    readable: folders beside the input that may be read: of a tuned checkpoint's base.
    """

    root: Path
    bases: dict[str, Path]
    readable: tuple[Path, ...] = ()

    @property
    def source(self) -> Path:
        return self.root / "in"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def clear(self) -> None:
        for folder in (self.source, self.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        (self.root / "home").mkdir(exist_ok=True)
        (self.root / SECRET).write_text("nobody may read or change this")

    def lay_out(self, case: Case) -> None:
        """Make the folders of a case anew."""
        self.clear()
        if case.base is not None:
            self._link(self.bases[case.base], self.source)
        for name, content in case.files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never through a hard link into the base.
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        for name, target in case.links.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(target)

    def _link(self, folder: Path, target: Path) -> None:
        for path in folder.rglob("*"):
            place = target / path.relative_to(folder)
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, place)

    def untouchable(self) -> dict[str, tuple[int, ...]]:
        """Identity and time of change of every file but those in out/."""
        places = [self.root, *self.bases.values()]
        states: dict[str, tuple[int, ...]] = {}
        for path in (p for place in places for p in _files(place)):
            if path.is_relative_to(self.out):
                continue
            state = path.lstat()
            # Not st_ctime, which a hard link that is made or removed changes.
            states[str(path)] = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_mode)
        return states


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def keep(case: Case, folder: Path, world: World) -> None:
    """Write a case, as it lies in the world, to a folder that `read_kept` reads."""
    world.lay_out(case)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in ("in", "out"):
        shutil.copytree(world.root / part, folder / part, symlinks=True)
    kept = {"kind": case.kind, "commands": case.commands}
    (folder / COMMANDS_FILE).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def read_kept(folder: Path) -> Case:
    kept = json.loads((folder / COMMANDS_FILE).read_text(encoding="utf-8"))
    paths = [path for part in ("in", "out") for path in _files(folder / part)]
    return Case(
        kind=kept["kind"],
        base=None,
        files={
            str(path.relative_to(folder)): path.read_bytes()
            for path in paths
            if not path.is_symlink()
        },
        links={
            str(path.relative_to(folder)): str(path.readlink())
            for path in paths
            if path.is_symlink()
        },
        commands=tuple(tuple(command) for command in kept["commands"]),
    )


# ----------------------------------------------------------------------------------- the parent


def run(
    case: Case,
    world: World,
    action: Action,
    seconds: float = SECONDS,
    memory_mb: float = MEMORY_MB,
) -> Verdict:
    """Run a case's commands, one after another, in a forked process, and judge it.

    action: runs one command. Raises what the command raises.
    """
    world.lay_out(case)
    before = world.untouchable()
    began = time.monotonic()
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(case, world, action, writer)
    os.close(writer)
    verdict = _await(child, reader, seconds)
    os.close(reader)
    took = time.monotonic() - began
    if verdict is None:
        verdict = Verdict("hang", detail=f"a command took more than {seconds:g} s")
    if verdict.find is None and verdict.peak_mb > memory_mb:
        verdict = Verdict("memory", detail=f"{verdict.peak_mb:.0f} MiB", peak_mb=verdict.peak_mb)
    changed = _difference(before, world.untouchable())
    if verdict.find is None and changed:
        verdict = Verdict("changed a file", place=changed[0], detail=", ".join(changed[:5]))
    return Verdict(**{**asdict(verdict), "seconds": took})


def _difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [name for name in names if before.get(name) != after.get(name)]


def _await(child: int, reader: int, seconds: float) -> Verdict | None:
    """What the child reports; None where a command took too long. A line arrives as each command
    begins.
    """
    received = b""
    while True:
        ready, _, _ = select.select([reader], [], [], seconds)
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        if not (data := os.read(reader, 1 << 16)):
            break
        received += data
    _, status = os.waitpid(child, 0)
    last = received.rpartition(b"\n")[2]
    if not last:
        name = signal.Signals(-code).name if (code := os.waitstatus_to_exitcode(status)) < 0 else ""
        return Verdict("the process died", place=name, detail=f"status {status} {name}")
    return Verdict(**json.loads(last))


# ------------------------------------------------------------------------------------ the child


def _work(case: Case, world: World, action: Action, writer: int) -> None:
    """Run the commands, report, and end the process."""
    verdict = Verdict("the watch itself failed")
    try:
        verdict = _watched(case, world, action, writer)
    except BaseException:  # noqa: BLE001
        verdict = Verdict("the watch itself failed", detail=traceback.format_exc())
    finally:
        os.write(writer, json.dumps(asdict(verdict)).encode())
        os._exit(0)


def _watched(case: Case, world: World, action: Action, writer: int) -> Verdict:
    # What a killed parent would leave running ends with it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.chdir(world.out)
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        os.environ[name] = str(world.out if name == "TMPDIR" else world.root / "out" / "home")
    log = os.open(world.out / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, DATA_LIMIT))
    guard = Guard(world, case.kind)
    sys.addaudithook(guard.note)
    refused = 0
    for command in case.commands:
        os.write(writer, b"\n")
        arguments = [_placed(word, world) for word in command]
        try:
            action(arguments)
        except LvrError as error:
            refused += 1
            if not str(error).strip():
                return _failed("an error without words", error)
        except BaseException as error:  # noqa: BLE001
            return _failed(f"{type(error).__name__}", error)
        if guard.breaches:
            what, where = guard.breaches[0]
            return Verdict(what, place=where, detail="\n".join(guard.stacks))
    return Verdict(None, refused=refused, peak_mb=peak_rss_mb() or 0.0)


def _placed(word: str, world: World) -> str:
    return re.sub(r"^(IN|OUT)\b", lambda m: str(world.root / m[1].lower()), word)


def _failed(what: str, error: BaseException) -> Verdict:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/tests/" not in f.filename and "site-packages" not in f.filename]
    last = (own or frames)[-1]
    place = f"{Path(last.filename).name}:{last.name}:{last.lineno}"
    text = f"{type(error).__name__}: {str(error)[:300]}\n"
    # Not format_exc: the text of some errors is as long as the input.
    stack = "".join(traceback.format_list(frames[-12:]))
    return Verdict(what, place=place, detail=stack + text, peak_mb=peak_rss_mb() or 0.0)


class Guard:
    """Notes what Python's audit events tell of files, processes and compiled texts.

    breaches: (what, where) of each that must not be.
    """

    def __init__(self, world: World, kind: str) -> None:
        self.breaches: list[tuple[str, str]] = []
        self.stacks: list[str] = []
        self._out = f"{os.path.realpath(world.out)}/"
        self._kind = kind
        places = [sys.prefix, sys.base_prefix, *sys.path, str(world.source), *SYSTEM]
        places += [str(Path(__file__).parents[2]), *map(str, world.readable)]
        self._readable = tuple(f"{os.path.realpath(place)}/" for place in places if place)
        self._secret = os.path.realpath(world.root / SECRET)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._note_open(*arguments)
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                self._note_change(event, path)
        elif event in STARTS:
            self._breach(f"started: {event}", str(arguments)[:200])
        elif event == "compile" and self._kind == "rewards" and arguments[0] is not None:
            self._breach("compiled a text", repr(arguments[0])[:200])

    def _note_open(self, path: Any, mode: Any, flags: Any) -> None:
        writes = isinstance(flags, int) and bool(flags & WRITE_FLAGS)
        if isinstance(mode, str):
            writes = writes or any(letter in mode for letter in "wax+")
        if writes:
            self._note_change("open for writing", path)
        elif (place := _real(path)) and not self._may_read(place):
            self._breach("read a file outside", place)

    def _may_read(self, place: str) -> bool:
        if place.startswith((self._out, *self._readable)) or not os.path.lexists(place):
            return True
        # A folder above is listed to find what is in it.
        return Path(place).is_dir()

    def _note_change(self, event: str, path: Any) -> None:
        place = _real(path)
        if place is None or place == "/dev/null" or f"{place}/".startswith(self._out):
            return
        self._breach(f"{event} outside", place)

    def _breach(self, what: str, where: str) -> None:
        self.breaches.append((what, where))
        if len(self.stacks) < 3:
            self.stacks.append("".join(traceback.format_stack()[-12:-2]))


def _real(path: Any) -> str | None:
    """Where a path leads; None for an open file."""
    if isinstance(path, int) or path is None:
        return None
    try:
        return os.path.realpath(os.fsdecode(path))
    except (OSError, ValueError, TypeError):
        return None
