"""Peak memory of this process. May import: the standard library."""

from __future__ import annotations

import sys


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process in MiB; None where the system does not say (Windows).

    It is the process's: with several systems in one process it is their common peak, every runtime together, and not one system's.
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
