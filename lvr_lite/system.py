"""This machine and this process: cores, memory. May import: the standard library."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process in MiB; None where the system does not say (Windows).

    It is the process's: with several systems in one process it is their common peak, every runtime
    together, and not one system's.
    """
    status = Path("/proc/self/status")
    if (
        status.is_file()
    ):  # not getrusage, whose peak a new process takes over from the one that started it
        return (
            int(
                next(
                    line for line in status.read_text().splitlines() if line.startswith("VmHWM")
                ).split()[1]
            )
            / 2**10
        )
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
