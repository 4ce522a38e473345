"""The command line as tests call it: what came of a call, in this process or in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What a call left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a wrong input gives. What stands before it is how far the work came."""
        lines = self.err.splitlines()
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        assert errors == [len(lines) - 1], self.err
        assert not re.search("Traceback|Error:|Warning:", self.err), self.err
        return lines[-1].removeprefix("error: ")


Call = Callable[..., Done]
# a call, its exit code, words of its error
Refused = Callable[[str, int, str], None]


def process(*arguments: object) -> Done:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "lvr_lite", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    return Done(done.returncode, done.stdout, done.stderr)


def two_processes(
    *arguments: object, path: Path | None = None, module: str = "lvr_lite", code: int = 0
) -> str:
    """Run the command line under `accelerate launch`, as on two GPUs (told `--cpu`, it would start
    one process, whatever number it is given); returns standard error.

    path: more Python modules. module: the one that is run. code: the launcher's exit code.
    """
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1", "-m", module]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(path or "")},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
