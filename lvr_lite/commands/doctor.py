"""What this machine can do, what is missing, and the line that mends it. May import: the standard
library.

Packages are looked up, not imported, so that a check costs milliseconds and works where a package
is broken; onnxruntime alone is imported, for its providers, and torch is asked only in a process of
its own. The readers of machine facts serve the bench's machine card too.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

PROC, SYS = Path("/proc"), Path("/sys")
# What makes a matrix product fast on a CPU, by the kernel's names: x86 first, then Arm.
FLAGS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
GiB = 2**30
LEAST_MEMORY, LEAST_DISK = (
    2.0,
    5.0,
)  # GiB: the demo's peak with torch loaded; a fine-tune's checkpoints and bundles


@dataclass(frozen=True)
class Check:
    """One finding. ok: True, False (something is broken or too old) or None (for information, or an
    optional part that is absent).

    mend: a line to paste that mends it, "" where nothing needs mending.
    """

    name: str
    ok: bool | None
    detail: str
    mend: str = ""


# ----------------------------------------------------------------------------------------------------------
# machine facts


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def parse_cpuinfo(text: str) -> tuple[str | None, list[str]]:
    """Model name and those of `FLAGS` that /proc/cpuinfo lists; Arm names no model and calls its
    flags Features.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or fields.get("Model"), [
        flag for flag in FLAGS if flag in flags
    ]


def cpu() -> tuple[str | None, list[str] | None]:
    """The CPU's model and its relevant flags; None for what the system does not say."""
    text = _read(PROC / "cpuinfo")
    if text is None:
        return platform.processor() or None, None
    model, flags = parse_cpuinfo(text)
    return model or _read(PROC / "device-tree" / "model") or platform.processor() or None, flags


def cores() -> int | None:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def governor() -> str | None:
    """The frequency governor of the first core, such as "performance"; None in most virtual
    machines.
    """
    return _read(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_governor")


def memory_gib() -> tuple[float | None, float | None]:
    """Memory of the machine and what of it is available, GiB; None for what the system does not
    say.
    """
    found = {
        m[1]: int(m[2]) / 2**20
        for m in re.finditer(r"^(\w+):\s+(\d+) kB", _read(PROC / "meminfo") or "", re.MULTILINE)
    }
    return tuple(round(found[k], 1) if k in found else None for k in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]


def version(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
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


# -------------------------------------------------------------------------------------------------------
# packages, extras


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def requirements() -> dict[str, dict[str, str]]:
    """{extra: {package: least version}} as the installed lvr-lite declares them; "" is the plain
    install, and `export` holds `train`'s too.
    """
    try:
        lines = metadata.requires("lvr-lite") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str]] = {"": {}}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        least = re.search(r">=\s*([\d.]+)", line.split(";")[0])
        if name:
            found.setdefault(extra[1] if extra else "", {})[name[0]] = least[1] if least else ""
    for packages in found.values():
        if packages.pop("lvr-lite", None) is not None:
            packages.update(found.get("train", {}))
    return found


def lacking(packages: dict[str, str]) -> list[str]:
    """Those of {package: least version} that are missing or too old, in words."""
    words = []
    for name, least in packages.items():
        installed = version(name)
        if installed is None:
            words.append(f"{name} is missing")
        elif least and _numbers(installed) < _numbers(least):
            words.append(f"{name} {installed} is older than {least}")
    return words


def _plain_install(packages: dict[str, str]) -> Check:
    bad = lacking(packages)
    detail = ", ".join(bad) or ", ".join(f"{name} {version(name)}" for name in packages)
    return Check("packages", not bad, detail, "pip install --upgrade lvr-lite" if bad else "")


def _extra(extra: str, packages: dict[str, str]) -> Check:
    bad = lacking(packages)
    if not bad:
        return Check(
            f"extra [{extra}]", True, ", ".join(f"{name} {version(name)}" for name in packages)
        )
    absent = all(word.endswith("is missing") for word in bad)
    return Check(
        f"extra [{extra}]",
        None if absent else False,
        ", ".join(bad),
        f'pip install "lvr-lite[{extra}]"',
    )


# ------------------------------------------------------------------------------------------------------------
# the checks


def _python() -> Check:
    good = sys.version_info >= (3, 10)
    return Check(
        "python",
        good,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if good else "use Python 3.10 or later",
    )


def _onnxruntime() -> Check:
    found = providers()
    if found is None:
        return Check(
            "onnxruntime",
            False,
            "missing, or it cannot be loaded",
            "pip install --force-reinstall onnxruntime",
        )
    return Check(
        "onnxruntime",
        True,
        f"{version('onnxruntime') or 'of an unknown version'}: " + ", ".join(found),
    )


def _torchvision() -> Check:
    """torchvision's CUDA build beside the CPU build of torch fails at import: `torchvision::nms
    does not exist` (docs/decisions.md).
    """
    torch, vision = version("torch"), version("torchvision")
    if vision is None:
        return Check("torchvision", True, "not installed, and not needed")
    if torch and "+cpu" in torch and "+cpu" not in vision:
        detail = f"torchvision {vision} beside torch {torch}: they do not fit (torchvision::nms does not exist)"
        return Check("torchvision", False, detail, "pip uninstall torchvision")
    return Check("torchvision", None, f"{vision}: not needed, used by nothing here")


def _run(command: list[str], seconds: float) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    listed = (
        _run([tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], 5) if tool else None
    )
    if listed:
        return Check("gpu", True, "; ".join(listed.splitlines()))
    detail = "nvidia-smi does not answer" if tool else "no NVIDIA GPU is visible"
    return Check(
        "gpu",
        False if tool else None,
        f"{detail}: everything runs on the CPU",
        "reinstall the NVIDIA driver, then reboot" if tool else "",
    )


def _torch_cuda() -> Check:
    """torch's own word on CUDA, from a process of its own: importing it takes seconds."""
    told = _run(
        [
            sys.executable,
            "-c",
            "import torch; print(torch.version.cuda, torch.cuda.is_available())",
        ],
        60,
    )
    name = "torch sees CUDA"
    if told is None:
        return Check(
            name,
            False,
            "torch cannot be imported",
            'pip install --force-reinstall "lvr-lite[train]"',
        )
    built, sees = told.split()[-2:]
    if sees == "True":
        return Check(name, True, f"yes, built for CUDA {built}")
    if shutil.which("nvidia-smi") is None:
        return Check(name, None, "no, and there is no GPU")
    mend = "pip install --force-reinstall torch"  # PyPI's is the CUDA build on Linux
    return Check(
        name,
        False,
        "no, although there is a GPU" + (": this torch is a CPU build" if built == "None" else ""),
        mend,
    )


def _four_bits(flags: list[str] | None) -> Check:
    found = version("bitsandbytes")
    if found is None:
        return Check(
            "4-bit loading",
            None,
            "bitsandbytes is missing: fine-tuning needs it",
            'pip install "lvr-lite[train]"',
        )
    packs = (
        "; AVX512_BF16 repacks weights, which training here turns off"
        if "avx512_bf16" in (flags or [])
        else ""
    )
    return Check("4-bit loading", True, f"bitsandbytes {found}{packs}")


def _cpu(model: str | None, flags: list[str] | None) -> Check:
    return Check(
        "cpu", None, f"{model or 'unknown'}; {' '.join(flags) if flags else 'flags unknown'}"
    )


def _threads() -> Check:
    set_to, mode = os.environ.get("OMP_NUM_THREADS"), governor()
    detail = f"{cores()} cores, OMP_NUM_THREADS {set_to or 'not set'}, governor {mode or 'unknown'}"
    slow = mode in ("powersave", "conservative")
    mend = (
        "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        if slow
        else ""
    )
    return Check("threads", None, detail + (": times will vary" if slow else ""), mend)


def _memory() -> Check:
    total, available = memory_gib()
    if total is None or available is None:
        return Check("memory", None, "unknown on this system")
    good = available >= LEAST_MEMORY
    mend = "" if good else f"close other programs: the demo wants {LEAST_MEMORY:g} GiB"
    return Check("memory", good, f"{available:g} of {total:g} GiB available", mend)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GiB
    good = free >= LEAST_DISK
    return Check(
        "disk",
        good,
        f"{free:.1f} GiB free here",
        "" if good else f"free some space: a fine-tune and its bundles want {LEAST_DISK:g} GiB",
    )


def embedded_model_files() -> list[str]:
    """Names of the files of the model that ships with the package; empty where it is missing."""
    folder = resources.files("lvr_lite.toy") / "model"
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _embedded_model() -> Check:
    files = embedded_model_files()
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return Check("embedded model", True, "present: `lvr-lite demo` works offline")
    return Check(
        "embedded model",
        False,
        "its files are missing from this install",
        "pip install --force-reinstall lvr-lite",
    )


def checks(ask_torch: bool = True) -> list[Check]:
    """All findings, most basic first. ask_torch: also start torch in a process of its own to hear
    whether it sees CUDA (seconds).
    """
    declared = requirements()
    model, flags = cpu()
    found = [_python(), _plain_install(declared.get("", {})), _onnxruntime()]
    found += [
        _extra(extra, declared[extra])
        for extra in ("train", "export", "benchmarks")
        if extra in declared
    ]
    found += [_torchvision(), _gpu()]
    if ask_torch and version("torch"):
        found.append(_torch_cuda())
    return [
        *found,
        _four_bits(flags),
        _cpu(model, flags),
        _threads(),
        _memory(),
        _disk(),
        _embedded_model(),
    ]
