"""The machine card and the readers of machine facts, on machines that are not this one as well."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from lvr_lite import files, system
from lvr_lite.bench import machine
from lvr_lite.model import bundle

X86 = """\
processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse avx2 avx512f avx512_bf16

processor\t: 1
model name\t: Some CPU
"""
ARM = """\
processor\t: 0
Features\t: fp asimd aes asimddp
CPU part\t: 0xd0b

Model\t\t: Raspberry Pi 5 Model B
"""


def test_the_card_is_json_and_has_every_fact() -> None:
    card = json.loads(json.dumps(machine.card(threads=2), allow_nan=False))
    fields = "cpu flags cores threads governor load memory_gib os python packages commit bundles"
    assert {*fields.split(), "providers"} <= set(card)
    assert card["threads"] == 2
    assert {"numpy", "onnxruntime", "lvr-lite"} <= set(card["packages"])


def test_the_card_needs_neither_proc_nor_sys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "SYS", tmp_path / "sys")
    card = machine.card()
    for fact in ("flags", "governor", "memory_gib", "threads"):
        assert card[fact] is None


def test_an_x86_cpu_is_known_by_its_name_and_relevant_flags() -> None:
    assert system.parse_cpuinfo(X86) == ("Some CPU", ["avx2", "avx512f", "avx512_bf16"])


def test_an_arm_board_is_known_by_its_model_and_features() -> None:
    assert system.parse_cpuinfo(ARM) == ("Raspberry Pi 5 Model B", ["asimd", "asimddp"])


def test_memory_governor_and_model_are_read_where_the_kernel_puts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path)
    monkeypatch.setattr(system, "SYS", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:       8388608 kB\nMemAvailable:   4194304 kB\n")
    (tmp_path / "cpuinfo").write_text(ARM)
    place = tmp_path / "devices/system/cpu/cpu0/cpufreq"
    place.mkdir(parents=True)
    (place / "scaling_governor").write_text("powersave\n")
    assert system.memory_gib() == (8.0, 4.0)
    assert system.governor() == "powersave"
    assert system.cpu() == ("Raspberry Pi 5 Model B", ["asimd", "asimddp"])


def test_a_bundle_is_known_by_the_hash_of_its_manifest_and_a_checkpoint_has_none(
    tmp_path: Path,
) -> None:
    (tmp_path / bundle.MANIFEST).write_text("{}")
    bundles = machine.card(bundles={"int4": tmp_path, "torch": tmp_path / "none"})["bundles"]
    assert bundles == {"int4": files.sha256(tmp_path / bundle.MANIFEST), "torch": None}


def test_outside_a_checkout_the_version_stands_for_the_commit(tmp_path: Path) -> None:
    assert str(machine.commit(tmp_path / "site-packages" / "lvr_lite")).startswith("v")


def test_in_a_checkout_the_commit_is_told_and_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    (tmp_path / "pyproject.toml").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    clean = machine.commit(tmp_path / "lvr_lite")
    (tmp_path / "pyproject.toml").write_text("changed")
    assert clean is not None and len(clean) == 40
    assert machine.commit(tmp_path / "lvr_lite") == clean + "+changed"


def test_a_machine_without_git_still_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    assert str(machine.commit()).startswith("v")
