"""This machine and this process: CPU, cores, memory, installed packages. May import: the standard
library; onnxruntime only for its providers.

What cannot be learned on a system (no /proc, no governor) is None, never a guess.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PROC = Path("/proc")
SYS = Path("/sys")
# What makes a matrix product fast on a CPU, by the kernel's names: x86 first, then Arm.
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def cpu() -> tuple[str | None, list[str] | None]:
    """The CPU's model, and those of `FLAGS` that it has."""
    text = _read(PROC / "cpuinfo")
    if text is None:
        return platform.processor() or None, None
    model, flags = parse_cpuinfo(text)
    return model or _read(PROC / "device-tree" / "model") or platform.processor() or None, flags


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model name and those of `FLAGS` that /proc/cpuinfo lists; Arm names no model and calls its
    flags Features.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or fields.get("Model")
    return model, [flag for flag in FLAGS if flag in flags]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def governor() -> str | None:
    """The frequency governor of the first core, such as "performance"; most virtual machines have
    none.
    """
    return _read(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor")


def memory_gib() -> tuple[float | None, float | None]:
    """Memory of the machine and what of it is available, in GiB."""
    return _memory_gib("MemTotal"), _memory_gib("MemAvailable")


def _memory_gib(field: str) -> float | None:
    line = re.search(rf"^{field}:\s+(\d+) kB", _read(PROC / "meminfo") or "", re.MULTILINE)
    if not line:
        return None
    return round(int(line[1]) / 2**20, 1)


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process in MiB; None where the system does not say (Windows).

    It belongs to the process: several systems in one process share this one peak.
    """
    # Not getrusage, whose peak a new process takes over from the one that started it.
    if peak := re.search(r"^VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")) or "", re.M):
        return int(peak[1]) / 2**10
    try:
        import resource
    except ImportError:
        return None
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    if sys.platform == "darwin":
        return rss / 2**20
    return rss / 2**10


# What libraries say when memory is used up: PyTorch on a CPU and on a card, CUDA itself and cuBLAS,
# bitsandbytes, ONNX Runtime.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|[Ff]ailed to allocate memory|bad_alloc|bad allocation"
    # The kernel took it back from a process that prepares batches.
    r"|DataLoader worker .* is killed by signal: (Killed|Bus error)",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of whatever library, says that memory is used up."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    # Libraries raise their own types over RuntimeError, or over Exception alone (ONNX Runtime).
    is_of_library = isinstance(error, RuntimeError) or "onnxruntime" in type(error).__module__
    return is_of_library and OUT_OF_MEMORY.search(str(error)) is not None


def version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def providers() -> list[str] | None:
    """ONNX Runtime's execution providers; None where it is missing or cannot be loaded."""
    try:
        import onnxruntime
    except (ImportError, OSError):
        return None
    return list(onnxruntime.get_available_providers())


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None
