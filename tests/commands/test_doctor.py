"""The doctor's findings, on machines made up for the purpose."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from lvr_lite import system
from lvr_lite.commands import doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions that the doctor sees instead of this machine's."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(system, "version", versions.get)
    return versions


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_every_finding_has_a_name_of_its_own_and_says_something() -> None:
    checks = doctor.doctor(ask_torch=False).checks
    assert len(by_name(checks)) == len(checks)
    assert all(check.detail for check in checks)
    wanted = {
        "python",
        "packages",
        "onnxruntime",
        "extra [train]",
        "extra [export]",
        "torchvision",
        "gpu",
        "4-bit loading",
        "embedded model",
    }
    assert wanted <= set(by_name(checks))


@pytest.mark.usefixtures("installed")
def test_whatever_is_broken_comes_with_the_line_that_mends_it() -> None:
    diagnosis = doctor.doctor(ask_torch=False)
    assert not diagnosis.healthy
    assert all(check.mend for check in diagnosis.checks if check.ok is False)


def test_the_plain_install_is_asked_for_what_the_package_declares() -> None:
    declared = doctor.requirements()
    assert {"numpy", "onnxruntime", "tokenizers", "pillow"} <= set(declared[""])
    assert "torch" not in declared[""]
    assert declared["train"]["torch"]
    assert set(declared["train"]) < set(declared["export"])


def test_an_old_package_is_told_with_both_versions(installed: dict[str, str]) -> None:
    installed.update(numpy="1.9.5", pillow="12.0", torch="2.13.0+cpu")
    assert doctor.lacking({"numpy": "1.26", "pillow": "11", "torch": "2.9", "peft": "0.19"}) == [
        "numpy 1.9.5 is older than 1.26",
        "peft is missing",
    ]


def test_an_absent_extra_is_no_fault_but_a_broken_one_is(installed: dict[str, str]) -> None:
    packages = {"torch": "2.9", "peft": "0.19"}
    absent = doctor._extra("train", packages)
    assert (absent.ok, absent.mend) == (None, 'pip install "lvr-lite[train]"')
    installed.update(torch="2.1", peft="0.21")
    assert doctor._extra("train", packages).ok is False
    installed.update(torch="2.13.0")
    assert doctor._extra("train", packages) == doctor.Check(
        "extra [train]", True, "torch 2.13.0, peft 0.21"
    )


@pytest.mark.parametrize(
    ("torch", "torchvision", "ok"),
    [("2.13.0+cpu", None, True), ("2.13.0+cpu", "0.28.0", False), ("2.13.0", "0.28.0", None)],
)
def test_torchvision_of_another_build_than_torch_is_a_trap(
    installed: dict[str, str], torch: str, torchvision: str | None, ok: bool | None
) -> None:
    installed.update(torch=torch, **({"torchvision": torchvision} if torchvision else {}))
    check = doctor._torchvision()
    assert check.ok is ok
    assert check.mend == ("pip uninstall torchvision" if ok is False else "")


def test_a_gpu_that_torch_does_not_see_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda *_: "None False")
    monkeypatch.setattr(shutil, "which", lambda *_: "/usr/bin/nvidia-smi")
    assert doctor._torch_cuda().ok is False
    assert "CPU build" in doctor._torch_cuda().detail
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert doctor._torch_cuda().ok is None


def test_a_torch_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda *_: None)
    assert doctor._torch_cuda().ok is False


def test_a_command_that_is_missing_fails_or_hangs_has_no_answer() -> None:
    assert doctor._run(["/no/such/command"], 1) is None
    assert doctor._run([sys.executable, "-c", "raise SystemExit(3)"], 10) is None


def test_a_gpu_is_named_as_nvidia_smi_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor, "_run", lambda *_: "RTX 3060, 12288 MiB")
    assert doctor._gpu() == doctor.Check("gpu", True, "RTX 3060, 12288 MiB")


def test_a_slow_governor_comes_with_the_line_that_changes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "governor", lambda: "powersave")
    assert "scaling_governor" in doctor._threads().mend


def test_little_memory_and_a_full_disk_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "memory_gib", lambda: (4.0, 0.5))
    assert doctor._memory().ok is False
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e9)
    assert doctor._disk().ok is False


def test_looking_does_not_import_torch() -> None:
    code = (
        "import sys; from lvr_lite import doctor; doctor(ask_torch=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
