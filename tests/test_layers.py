"""Who may import whom (docs/design.md), read off the source; and that the device world works where
the workshop is not installed.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lvr_lite.toy.make import scene_samples

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("export", "quant", "bench")
WORKSHOP = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
)


@dataclass(frozen=True)
class Import:
    """One imported name: the whole dotted path, and whether it is imported as soon as the module
    is.
    """

    name: str
    at_once: bool


def imports_of(source: str) -> list[Import]:
    """Every import of a module; `from a import b` gives both `a` and `a.b`. Blocks under
    TYPE_CHECKING never run and do not count.
    """
    found: list[Import] = []

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, at_once) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.append(Import(str(node.module), at_once))
            found.extend(Import(f"{node.module}.{alias.name}", at_once) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_once and not inside)

    visit(ast.parse(source), True)
    return found


def files(*folders: str) -> Iterator[tuple[str, list[Import]]]:
    """(path, imports) of every source file under these folders of the repository, or of a file
    itself.
    """
    for folder in folders:
        path = ROOT / folder
        found = [path] if path.is_file() else sorted(path.rglob("*.py"))
        assert found, f"{folder} holds no source"
        for file in found:
            yield file.relative_to(ROOT).as_posix(), imports_of(file.read_text(encoding="utf-8"))


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


WORKSHOP_CORE = (
    "lvr_lite/generate/torch.py",
    "export/weights.py",
    "export/onnxfile.py",
)  # of the core, and not for devices


def is_device_world(path: str) -> bool:
    return not path.startswith(("lvr_lite/train/", "lvr_lite/toy/")) and path not in WORKSHOP_CORE


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b as c\nfrom d import e\nif TYPE_CHECKING:\n    import f\n"
        "def g():\n    from h import i\ntry:\n    import j\nexcept ImportError:\n    pass\nclass K:\n    import l\n"
    )
    found = imports_of(source)
    assert {i.name for i in found if i.at_once} == {"a.b", "d", "d.e", "j", "l"}
    assert {i.name for i in found if not i.at_once} == {"h", "h.i"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_the_core_and_no_other_stage(stage: str) -> None:
    others = [f"lvr_lite.{s}" for s in STAGES if s != stage]
    wrong = [
        (path, i.name) for path, found in files(stage) for i in found if within(i.name, *others)
    ]
    assert wrong == []


def test_the_core_imports_no_stage_but_in_commands() -> None:
    stages = [f"lvr_lite.{s}" for s in STAGES]
    wrong = [
        (path, i.name)
        for path, found in files("lvr_lite")
        for i in found
        if within(i.name, *stages) and (i.at_once or path != "lvr_lite/cli.py")
    ]
    assert wrong == []


def test_the_loop_and_the_bench_see_only_the_protocol() -> None:
    hidden = (
        *WORKSHOP,
        "onnxruntime",
        "tokenizers",
        "lvr_lite.generate.onnx",
        "lvr_lite.generate.torch",
    )
    wrong = [
        (path, i.name)
        for path, found in files("lvr_lite/generate/decode.py", "bench")
        for i in found
        if within(i.name, *hidden)
    ]
    assert wrong == []


def test_the_device_world_imports_nothing_of_the_workshop_when_it_is_imported() -> None:
    forbidden = (
        *WORKSHOP,
        "yaml",
        "huggingface_hub",
        "lvr_lite.train",
        "lvr_lite.toy",
        "lvr_lite.generate.torch",
        "lvr_lite.export.weights",
        "lvr_lite.export.onnxfile",
    )
    wrong = [
        (path, i.name)
        for path, found in files("lvr_lite", "bench")
        if is_device_world(path)
        for i in found
        if i.at_once and within(i.name, *forbidden)
    ]
    assert wrong == []


def test_the_command_line_imports_only_typer_and_the_standard_library_at_once() -> None:
    allowed = (*sys.stdlib_module_names, "typer")
    ((_, found),) = files("lvr_lite/cli.py")
    assert [i.name for i in found if i.at_once and not within(i.name, *allowed)] == []


def test_no_stage_is_imported_by_its_bare_name() -> None:
    wrong = [
        (path, i.name)
        for path, found in files("lvr_lite", *STAGES, "tests")
        for i in found
        if within(i.name, *STAGES)
    ]
    assert wrong == []


# ---------------------------------------------------------------------------------------- a machine
# without the workshop

BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*WORKSHOP, "yaml")!r}:
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
        "import sys, lvr_lite.cli; print(*{'numpy', 'onnxruntime', 'PIL', 'jinja2', 'tokenizers'} & set(sys.modules))",
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


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
