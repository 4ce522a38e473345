"""Text files are UTF-8 on every system: each call that reads or writes text says so.

ruff's rule for it (PLW1514) sees only paths whose type it can tell.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def calls() -> list[tuple[Path, ast.Call]]:
    """Every call in the package, with its file."""
    found = []
    for folder in ("lvr_lite", "export", "quant", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [(path, node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return found


def name_of(call: ast.Call) -> str:
    function = call.func
    name = getattr(function, "attr", None) or getattr(function, "id", "")
    return str(name)


def opens_text(call: ast.Call) -> bool:
    """Whether a call is `open` with the mode of a text."""
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    modes += [k.value.value for k in call.keywords if k.arg == "mode" and hasattr(k.value, "value")]
    of_mode = [mode for mode in modes if isinstance(mode, str) and set(mode) <= set("rwaxbt+")]
    plain = isinstance(call.func, ast.Name) or not call.args
    receiver = getattr(getattr(call.func, "value", None), "id", "")
    if name_of(call) != "open" or receiver[:1].isupper():
        return False
    return any("b" not in mode for mode in of_mode) if of_mode else plain


def test_every_text_is_read_and_written_as_utf_8() -> None:
    without = []
    for path, call in calls():
        names = {keyword.arg for keyword in call.keywords}
        if name_of(call) in ("read_text", "write_text", "NamedTemporaryFile"):
            text = name_of(call) != "NamedTemporaryFile" or "mode" in names
        else:
            # Of a process that is started, what it says.
            starts = name_of(call) in ("run", "Popen", "check_output")
            text = (starts and "text" in names) or opens_text(call)
        if text and "encoding" not in names:
            without.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert without == []
