"""What this machine can do, what is missing, and the line that mends it. May import: the standard
library, lvr_lite.system.

Packages are looked up, not imported, so that a check costs milliseconds and works where a package
is broken. onnxruntime alone is imported, for its providers; torch is asked in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path

from lvr_lite import system
from lvr_lite.files import JsonObject

GiB = 2**30
# GiB: the demo's peak with torch loaded, and what a fine-tune's checkpoints and bundles take.
LEAST_MEMORY = 2.0
LEAST_DISK = 5.0
EXTRAS = ("train", "export", "benchmarks")


@dataclass(frozen=True)
class Check:
    """One finding.

    ok: True; False where something is broken or too old; None for information, or for an optional
        part that is absent.
    mend: a line to paste that mends it; "" where nothing needs mending.
    """

    name: str
    ok: bool | None
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, most basic first."""

    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> JsonObject:
        checks = [asdict(check) for check in self.checks]
        return {"schema": "lvr-lite/doctor", "version": 1, "checks": checks}


def doctor(ask_torch: bool = True) -> Diagnosis:
    """Examine this machine and this installation.

    ask_torch: also start torch in a process of its own, which says whether it sees CUDA; this takes
        seconds.
    """
    declared = requirements()
    model, flags = system.cpu()
    checks = [
        _python(),
        _plain_install(declared.get("", {})),
        _onnxruntime(),
    ]
    checks += [_extra(extra, declared[extra]) for extra in EXTRAS if extra in declared]
    checks += [_torchvision(), _gpu()]
    if ask_torch and system.version("torch"):
        checks.append(_torch_cuda())
    checks += [
        _four_bits(flags),
        _cpu(model, flags),
        _threads(),
        _memory(),
        _disk(),
        _embedded_model(),
    ]
    return Diagnosis(checks)


# ----------------------------------------------------------------------------------------------
# packages and extras


def requirements() -> dict[str, dict[str, str]]:
    """{extra: {package: least version}} as the installed lvr-lite declares them; "" is the plain
    install, and `export` holds `train`'s too.
    """
    try:
        lines = metadata.requires("lvr-lite") or []
    except metadata.PackageNotFoundError:
        return {}
    declared: dict[str, dict[str, str]] = {"": {}}
    for line in lines:
        requirement, *_ = line.split(";")
        name = _group(r"([\w.-]+)", line)
        extra = _group(r".*extra == ['\"](\w+)['\"]", line)
        least = _group(r".*?>=\s*([\d.]+)", requirement)
        if name:
            packages = declared.setdefault(extra, {})
            packages[name] = least
    for packages in declared.values():
        if packages.pop("lvr-lite", None) is not None:
            packages.update(declared.get("train", {}))
    return declared


def _group(pattern: str, line: str) -> str:
    """What the group of a pattern is at the line's beginning; "" where it does not match."""
    match = re.match(pattern, line)
    if match is None:
        return ""
    return match[1]


def lacking(packages: dict[str, str]) -> list[str]:
    """Those of {package: least version} that are missing or too old, in words."""
    words = []
    for name, least in packages.items():
        installed = system.version(name)
        if installed is None:
            words.append(f"{name} is missing")
        elif least and _numbers(installed) < _numbers(least):
            words.append(f"{name} {installed} is older than {least}")
    return words


def _numbers(version: str) -> tuple[int, ...]:
    public, *_ = version.split("+")
    numbers = [int(digits) for digits in re.findall(r"\d+", public)]
    return tuple(numbers[:3])


def _versions(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {system.version(name)}" for name in packages)


def _plain_install(packages: dict[str, str]) -> Check:
    bad = lacking(packages)
    if bad:
        return Check("packages", False, ", ".join(bad), "pip install --upgrade lvr-lite")
    return Check("packages", True, _versions(packages))


def _extra(extra: str, packages: dict[str, str]) -> Check:
    name = f"extra [{extra}]"
    bad = lacking(packages)
    if not bad:
        return Check(name, True, _versions(packages))
    absent = all(words.endswith("is missing") for words in bad)
    mend = f'pip install "lvr-lite[{extra}]"'
    return Check(name, None if absent else False, ", ".join(bad), mend)


# ----------------------------------------------------------------------------------------------
# the checks


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", True, detail)


def _onnxruntime() -> Check:
    providers = system.providers()
    if providers is None:
        mend = "pip install --force-reinstall onnxruntime"
        return Check("onnxruntime", False, "missing, or it cannot be loaded", mend)
    version = system.version("onnxruntime") or "of an unknown version"
    return Check("onnxruntime", True, f"{version}: {', '.join(providers)}")


def _torchvision() -> Check:
    """torchvision's CUDA build beside the CPU build of torch fails at import: `torchvision::nms
    does not exist` (docs/decisions.md).
    """
    torch = system.version("torch")
    vision = system.version("torchvision")
    if vision is None:
        return Check("torchvision", True, "not installed, and not needed")
    if torch and "+cpu" in torch and "+cpu" not in vision:
        detail = (
            f"torchvision {vision} beside torch {torch}: they do not fit "
            "(torchvision::nms does not exist)"
        )
        return Check("torchvision", False, detail, "pip uninstall torchvision")
    return Check("torchvision", None, f"{vision}: not needed, used by nothing here")


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("gpu", None, "no NVIDIA GPU is visible: everything runs on the CPU")
    gpus = _run([tool, "--query-gpu=name,memory.total", "--format=csv,noheader"], 5)
    if gpus:
        return Check("gpu", True, "; ".join(gpus.splitlines()))
    detail = "nvidia-smi does not answer: everything runs on the CPU"
    return Check("gpu", False, detail, "reinstall the NVIDIA driver, then reboot")


def _torch_cuda() -> Check:
    """torch's own word on CUDA, from a process of its own: importing it takes seconds."""
    name = "torch sees CUDA"
    question = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    answer = _run([sys.executable, "-c", question], 60)
    if answer is None:
        mend = 'pip install --force-reinstall "lvr-lite[train]"'
        return Check(name, False, "torch cannot be imported", mend)
    built, available = answer.split()[-2:]
    if available == "True":
        return Check(name, True, f"yes, built for CUDA {built}")
    if shutil.which("nvidia-smi") is None:
        return Check(name, None, "no, and there is no GPU")
    reason = ""
    if built == "None":
        reason = ": this torch is a CPU build"
    # PyPI's torch is the CUDA build on Linux.
    mend = "pip install --force-reinstall torch"
    return Check(name, False, f"no, although there is a GPU{reason}", mend)


def _run(command: list[str], seconds: float) -> str | None:
    """What a command prints; None where it is missing, fails or takes longer."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _four_bits(flags: list[str] | None) -> Check:
    version = system.version("bitsandbytes")
    if version is None:
        detail = "bitsandbytes is missing: fine-tuning needs it"
        return Check("4-bit loading", None, detail, 'pip install "lvr-lite[train]"')
    repacks = "avx512_bf16" in (flags or [])
    note = ""
    if repacks:
        note = "; AVX512_BF16 repacks weights, which training here turns off"
    return Check("4-bit loading", True, f"bitsandbytes {version}{note}")


def _cpu(model: str | None, flags: list[str] | None) -> Check:
    words = "flags unknown"
    if flags:
        words = " ".join(flags)
    return Check("cpu", None, f"{model or 'unknown'}; {words}")


def _threads() -> Check:
    threads = os.environ.get("OMP_NUM_THREADS") or "not set"
    mode = system.governor()
    cores = system.usable_cores()
    detail = f"{cores} cores, OMP_NUM_THREADS {threads}, governor {mode or 'unknown'}"
    if mode not in ("powersave", "conservative"):
        return Check("threads", None, detail)
    mend = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return Check("threads", None, f"{detail}: times will vary", mend)


def _memory() -> Check:
    total, available = system.memory_gib()
    if total is None or available is None:
        return Check("memory", None, "unknown on this system")
    good = available >= LEAST_MEMORY
    mend = ""
    if not good:
        mend = f"close other programs: the demo wants {LEAST_MEMORY:g} GiB"
    return Check("memory", good, f"{available:g} of {total:g} GiB available", mend)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / GiB
    good = free >= LEAST_DISK
    mend = ""
    if not good:
        mend = f"free some space: a fine-tune and its bundles want {LEAST_DISK:g} GiB"
    return Check("disk", good, f"{free:.1f} GiB free here", mend)


def _embedded_model() -> Check:
    folder = resources.files("lvr_lite.toy") / "model"
    names = []
    if folder.is_dir():
        names = [entry.name for entry in folder.iterdir()]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return Check("embedded model", True, "present: `lvr-lite demo` works offline")
    detail = "its files are missing from this install"
    return Check("embedded model", False, detail, "pip install --force-reinstall lvr-lite")
