"""The order of the folders, read off the source; and that the device world works where the workshop
is not installed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lvr_lite.toy.make import scene_samples

ROOT = Path(__file__).resolve().parent.parent

# A folder imports only what stands before it, whether at once or inside a function. Experiments
# are programs of their own: they may import all commands, and nothing imports them.
ORDER = (
    *("errors", "system", "locks", "files", "sums", "terminal", "config"),
    *("model", "generate", "data", "views"),
    *("export", "bench", "toy", "eval", "train", "quant", "commands", "experiments", "cli"),
    "optimum_register",
)


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    folders = {"lvr_lite": "lvr_lite"} | {f"lvr_lite.{n}": n for n in ("export", "bench", "quant")}
    found = {}
    for package, folder in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            place = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *place))] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(module: ast.Module) -> set[str]:
    """Dotted names of the project that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("lvr_lite.")}


def part(name: str) -> str:
    """The entry of ORDER that a module belongs to."""
    second, third = [*name.split("."), "", ""][1:3]
    return third if third in ("experiments", "optimum_register") else second


def is_for_devices(name: str) -> bool:
    """Whether a module must not need the workshop's packages when it is imported."""
    workshop = ("export", "train", "quant", "experiments", "optimum_register", "__main__")
    own = (
        "lvr_lite.generate.torch",
        "lvr_lite.generate.kept_tokens",
        "lvr_lite.toy.build",
        "lvr_lite.toy.pretrain",
    )
    return part(name) not in workshop and name not in own


def test_a_folder_imports_only_what_stands_before_it() -> None:
    allowed = ("__version__", "__init__", "__main__")
    wrong = set()
    for name, module in modules().items():
        for other in imported(module):
            here, there = part(name), part(other)
            if here in allowed or there in allowed:
                continue
            if ORDER.index(there) > ORDER.index(here):
                wrong.add((name, there))
    assert wrong == set()


# --------------------------------------------------------------------------------------------------
# a machine without the workshop

WORKSHOP = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "yaml"),
    *("onnx", "onnx_ir", "onnxscript", "optimum"),
)
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WORKSHOP!r}:
            raise ImportError(f"No module named {{name!r}} (blocked by the test)", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which every Python process, children too, is without the workshop's
    packages.
    """
    folder = tmp_path_factory.mktemp("blocker")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": str(folder)}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def lvr_lite(environment: dict[str, str], *arguments: str) -> str:
    done = python(environment, "-m", "lvr_lite", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["torch", "transformers", "yaml", "onnx"])
def test_the_blocker_blocks(device: dict[str, str], package: str) -> None:
    done = python(device, "-c", f"import {package}")
    assert done.returncode == 1
    assert "blocked by the test" in done.stderr


def test_importing_the_command_line_is_cheap(device: dict[str, str]) -> None:
    done = python(
        device,
        "-c",
        "import sys, lvr_lite.cli.app; "
        "print(*{'numpy', 'onnxruntime', 'PIL', 'jinja2', 'tokenizers'} & set(sys.modules))",
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_what_a_device_runs_is_imported_without_the_workshop(device: dict[str, str]) -> None:
    names = [name.removesuffix(".__init__") for name in modules() if is_for_devices(name)]
    assert len(names) > 60
    done = python(
        device,
        "-c",
        "import importlib; [importlib.import_module(n) for n in NAMES]".replace(
            "NAMES", repr(names)
        ),
    )
    assert done.returncode == 0, done.stderr


def test_a_question_is_answered_without_the_workshop(
    device: dict[str, str], small_int8: Path, tmp_path: Path
) -> None:
    sample, picture = next(iter(scene_samples(1, 0, "test")))
    picture.save(tmp_path / "picture.png")
    lvr_lite(
        device,
        "run",
        str(small_int8),
        str(tmp_path / "picture.png"),
        sample.question,
        "--json",
        str(tmp_path / "run.json"),
    )
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == "lvr-lite/run"


def test_scenes_are_scored_without_the_workshop(
    device: dict[str, str], small_int8: Path, tmp_path: Path
) -> None:
    lvr_lite(device, "eval", str(small_int8), "--limit", "2", "--json", str(tmp_path / "eval.json"))
    assert json.loads((tmp_path / "eval.json").read_text())["n"] == 2


def test_a_bundle_is_inspected_without_the_workshop(
    device: dict[str, str], small_int8: Path
) -> None:
    assert "int8" in lvr_lite(device, "inspect", str(small_int8))


def test_a_bundle_is_measured_without_the_workshop(
    device: dict[str, str], small_int8: Path
) -> None:
    out = lvr_lite(
        device, "bench", str(small_int8), "--runs", "1", "--warmup", "0", "--tokens", "2"
    )
    assert json.loads(out.splitlines()[-1])["schema"] == "lvr-lite/bench"


@pytest.mark.parametrize("command", ["finetune", "export", "quantize", "run"])
def test_a_command_of_the_workshop_says_in_one_line_what_to_install(
    device: dict[str, str], command: str, small_fp32: Path, tmp_path: Path
) -> None:
    arguments = {
        "finetune": ["--model", "tiny", "--data", "scenes", "--out", str(tmp_path / "out")],
        "export": ["tiny", str(tmp_path / "out")],
        "quantize": [str(small_fp32), str(tmp_path / "out")],
        "run": ["tiny", "what is here"],
    }
    done = python(device, "-m", "lvr_lite", command, *arguments[command])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this command needs the package ")
    assert 'pip install "lvr-lite[' in line
    assert list(tmp_path.iterdir()) == []
