"""The process of one rival: `python -m lvr_lite.bench.experiments.rivals.worker NAME OUT THREADS`.

It says on standard output in what it computes, a line {"computes"}. Then each line {"past",
"steps"} on standard input gets a line of times in answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.bench.experiments.rivals.runtimes import RIVALS, Rival
from lvr_lite.system import peak_rss_mb

# Ids that every vocabulary has.
WORDS = 1000


@dataclass(frozen=True)
class Turn:
    """A prefill and some steps, in ms; the process's peak RSS so far, in MiB."""

    prefill_ms: float
    step_ms: list[float]
    peak_rss_mb: float | None


class Ended(Exception):
    """A rival's process that is gone: built for another CPU, or killed for its memory."""


class Process:
    """The other end of it."""

    def __init__(self, name: str, out: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, str(out), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def computes(self) -> str:
        """Wait until it has loaded. Raises Ended."""
        return str(self._read()["computes"])

    def turn(self, past: int, steps: int) -> Turn:
        """Measure once. Raises Ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"past": past, "steps": steps}) + "\n")
        self._process.stdin.flush()
        return Turn(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        code = self._process.wait()
        raise Ended(f"its process ended with {code}; what it said stands above")

    def end(self) -> None:
        self._process.terminate()


def measure(rival: Rival, past: int, steps: int) -> Turn:
    ids = np.random.default_rng(past).integers(2, WORDS, past).tolist()
    began = time.perf_counter()
    rival.prefill(ids)
    prefill_ms = (time.perf_counter() - began) * 1e3
    step_ms = []
    for i in range(steps):
        began = time.perf_counter()
        rival.step(i + 2)
        step_ms.append((time.perf_counter() - began) * 1e3)
    return Turn(prefill_ms, step_ms, peak_rss_mb())


def main(name: str, out: Path, threads: int) -> None:
    rival = RIVALS[name].load(out, threads)
    print(json.dumps({"computes": rival.computes}), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(measure(rival, **json.loads(line)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
