"""The machine: the card of what a number was measured on; how fast it reads memory, how busy it is
and what energy it takes.

May import: numpy, system, files, model/.

What it cannot learn on a system (no /proc, no git) is null, never a guess.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import lvr_lite
from lvr_lite import files, system
from lvr_lite.files import JsonObject
from lvr_lite.model import bundle

PACKAGES = ("lvr-lite", "onnxruntime", "numpy", "tokenizers", "pillow", "torch", "transformers")
# MiB: larger than any last-level cache that a desktop has.
BUFFER_MB = 512


def card(threads: int | None = None, bundles: dict[str, Path] | None = None) -> JsonObject:
    """Everything about machine and software that a time depends on, ready for JSON.

    threads: that the runtimes were told to use.
    bundles: {system: bundle folder}, each identified by the sha256 of its manifest, which itself
        holds the sha256 of every file.
    """
    model, flags = system.cpu()
    total, available = system.memory_gib()
    versions = {name: system.version(name) for name in PACKAGES}
    return {
        "cpu": model,
        "arch": platform.machine() or None,
        "flags": flags,
        "cores": system.usable_cores(),
        "threads": threads,
        "governor": system.governor(),
        "load": _load(),
        "memory_gib": total,
        "memory_available_gib": available,
        "os": _system(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
        "providers": system.providers(),
        # Huge pages seem to choose between the two speeds of a machine.
        "tunables": os.environ.get("GLIBC_TUNABLES"),
        "commit": commit(),
        "bundles": {name: manifest_hash(folder) for name, folder in (bundles or {}).items()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def manifest_hash(folder: Path) -> str | None:
    """sha256 of a bundle's lvr.json; None for a folder without one (a checkpoint)."""
    path = folder / bundle.MANIFEST
    if not path.is_file():
        return None
    return files.sha256(path)


def commit(package: Path | None = None) -> str | None:
    """The commit that this code was run from, "+changed" where tracked files differ; outside a
    checkout "v" and the installed version.

    package: the folder of lvr_lite, whose parent is the checkout. A package installed into some
    other project's checkout does not count.
    """
    root = (package or Path(lvr_lite.__file__).parent).resolve().parent
    head = None
    if (root / ".git").exists() and (root / "pyproject.toml").is_file():
        head = _git(root, "rev-parse", "HEAD")
    if head is None:
        version = system.version("lvr-lite")
        if version is None:
            return None
        return f"v{version}"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changed" if changed else head


def _git(root: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _load() -> list[float] | None:
    try:
        return [round(v, 2) for v in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"] + ", kernel " + platform.release()
    except (OSError, KeyError):
        return platform.platform()


def read_bandwidth(threads: int, megabytes: int = BUFFER_MB, repeats: int = 4) -> float:
    """GB/s (1e9) at which `threads` threads together read memory: the best of `repeats` passes over
    a buffer of `megabytes` MiB.

    Each thread takes the maximum of its share of an int32 buffer: the cheapest reduction that numpy
    vectorises everywhere, without BLAS (whose own threads would interfere) and without the
    interpreter lock. One thread does not saturate most machines.
    """
    # Ones, not zeros: every page must be backed by memory of its own.
    buffer = np.ones(megabytes * 2**18, np.int32)
    shares = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, shares))
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best / 1e9


def read_compute(repeats: int = 3) -> float:
    """Milliseconds that a fixed computation within a core's caches takes, the best of `repeats`:
    how fast the cores are just now, with their clock and what else runs on them (in a virtual
    machine also others' work, which no load shows).

    One thread, and after a rest: two threads wait for each other and for Python's lock, and ONNX
    Runtime's threads spin for a while after a call; either would be measured instead of the cores
    (docs/results/runtime.md).
    """
    # 128 KiB
    values = np.ones(1 << 15, np.float32)
    milliseconds = []
    time.sleep(0.02)
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(200):
            np.multiply(values, 1.0, out=values)
        milliseconds.append((time.perf_counter() - began) * 1e3)
    return min(milliseconds)


def read_joules(counters: Path = Path("/sys/class/powercap")) -> float | None:
    """Energy that the processor packages took since some time in the past (RAPL), in J; None where
    the machine or its rights do not say.

    A counter starts again at 0 now and then (after an hour or more); a difference is then negative,
    and no measurement.
    """
    joules = []
    for zone in sorted(counters.glob("intel-rapl:*")):
        # Others are parts of a package.
        if zone.name.count(":") != 1:
            continue
        try:
            joules.append(int((zone / "energy_uj").read_text(encoding="utf-8")) / 1e6)
        except OSError:
            # Only root may read it on most systems.
            return None
    return sum(joules) if joules else None


def load_average() -> float | None:
    """The one-minute load average, None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
