"""`import lvr_lite`: instant, complete, documented, and the same for type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import is_dataclass
from inspect import get_annotations
from pathlib import Path

import pytest

import lvr_lite


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, lvr_lite; print(*{'numpy', 'typer', 'rich', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_name_is_found_by_python_and_by_type_checkers() -> None:
    assert {name for names in lvr_lite._MODULES.values() for name in names} == {*lvr_lite.__all__}
    assert {*lvr_lite.__all__} <= {*dir(lvr_lite)}
    tree = ast.parse(Path(lvr_lite.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {str(node.module): {alias.name for alias in node.names} for node in imports}
    assert seen == {f"lvr_lite.{m}": {*names} for m, names in lvr_lite._MODULES.items()}


def test_a_name_that_it_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        getattr(lvr_lite, "nosuch")  # noqa: B009


@pytest.mark.parametrize("name", lvr_lite.__all__)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(lvr_lite, name)
    assert value.__doc__
    if isinstance(value, type) and is_dataclass(value) and name.endswith(("Options", "Rounding")):
        own = get_annotations(value)
        assert {field for field in own if field not in value.__doc__} == set()
    elif not isinstance(value, type):
        assert f"{name}(" in str(lvr_lite.__doc__), "missing from the overview"


def test_the_packages_of_stages_do_not_hide_a_function() -> None:
    code = (
        "import lvr_lite, lvr_lite.export.onnxfile, lvr_lite.bench.machine, lvr_lite.quant.blocks\n"
        "assert all(callable(getattr(lvr_lite, name)) for name in lvr_lite.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
