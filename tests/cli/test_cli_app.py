"""The command line as a whole: help, version, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest

import lvr_lite
from lvr_lite.cli.app import app
from lvr_lite.files import fresh_folder
from tests.command_line import Call, process

COMMANDS = {
    "finetune": (),
    "grpo": (),
    "export": (),
    "quantize": (),
    "run": (),
    "eval": (),
    "probe": (),
    "bench": ("run", "compare", "table"),
    "inspect": (),
    "doctor": (),
    "demo": (),
    "data": ("make", "convert", "validate", "preview"),
}
# what a command's example begins with
EXAMPLES = {"bench run": "bench"}


def test_version() -> None:
    done = process("--version")
    assert (done.code, done.out, done.err) == (0, f"lvr-lite {lvr_lite.__version__}\n", "")


def test_help_names_every_command(call: Call) -> None:
    done = call("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\b", done.out, re.MULTILINE), command


def test_no_command_is_missing_from_these_tests() -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert commands | {g.name for g in app.registered_groups} == set(COMMANDS)


@pytest.mark.parametrize(
    "command",
    [f"{group} {part}".strip() for group, parts in COMMANDS.items() for part in parts or ("",)],
)
def test_the_help_of_a_command_shows_an_example(call: Call, command: str) -> None:
    done = call(*command.split(), "--help")
    assert done.code == 0
    assert f"Example: lvr-lite {EXAMPLES.get(command, command)}" in done.out


@pytest.mark.parametrize(
    "arguments",
    [
        "run bundle picture.png question --steps -1",
        "run bundle picture.png question --max-tokens 0",
        "run bundle",
        "run bundle picture.png question --temperature nan",
        "eval bundle --batch 0",
        "eval bundle --seed -1",
        "eval bundle --threads 0",
        "eval bundle --skills -1",
        "data make --count 3",
        "data make --out here --count 0",
        "data make --out here --seed 1000000",
        "finetune --data scenes --out here",
        "data validate some.jsonl --nosuch",
        "nosuch",
        "--nosuch",
    ],
)
def test_a_call_that_cannot_be_understood_shows_usage_and_the_reason(
    call: Call, arguments: str
) -> None:
    done = call(*arguments.split())
    assert done.code == 2
    assert "Usage: lvr-lite" in done.err
    assert "Error" in done.err
    assert "Traceback" not in done.err


def test_an_error_in_a_process_of_its_own_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = process("run", tmp_path / "nosuch", tmp_path / "p.png", "q")
    assert done.code == 1
    assert "no such picture" in done.error
    assert done.out == ""


def test_debug_shows_the_traceback(call: Call, tmp_path: Path) -> None:
    with pytest.raises(lvr_lite.LvrError, match="no such folder"):
        call("inspect", tmp_path / "nosuch", "--debug")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied; check"),
        (ImportError("No module named 'onnx'", name="onnx.helper"), 1, "lvr-lite[export]"),
        (ImportError("No module named 'torch'", name="torch"), 1, "lvr-lite[train]"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "out of memory at "),
        (RuntimeError("[...] can't allocate memory: you tried to"), 1, "out of memory at "),
    ],
)
def test_what_goes_wrong_outside_is_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(_: Path) -> bool:
        raise error

    monkeypatch.setattr("lvr_lite.model.bundle.is_bundle", fail)
    done = call("inspect", "x")
    assert done.code == code
    assert "Traceback" not in done.err
    assert words in (done.error if words else done.err)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C\n"),
        (signal.SIGTERM, 143, "stopped by SIGTERM\n"),
    ],
)
def test_a_signal_is_one_line_and_leaves_neither_files_nor_handlers(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    code: int,
    words: str,
) -> None:
    def interrupted(_: Path) -> bool:
        with fresh_folder(tmp_path / "out", "lvr.json") as staged:
            (staged / "half").write_text("written", encoding="utf-8")
            os.kill(os.getpid(), number)
        return True

    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("lvr_lite.model.bundle.is_bundle", interrupted)
    done = call("inspect", "x")
    assert (done.code, done.err) == (code, words)
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_card_is_set_up_unless_the_user_did(
    call: Call, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    call("--version")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "backend:native")
    call("--version")
    assert os.environ[name] == "backend:native"
    assert "expandable" not in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
