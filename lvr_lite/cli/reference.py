"""docs/commands.md and docs/python.md, made from what the code says of itself.

    python -m lvr_lite.cli.reference docs

tests/cli/test_reference.py holds the pages against the code.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import typer

import lvr_lite
from lvr_lite.cli.app import app

MADE = "<!-- made by `make reference`: change the code's own help instead -->\n\n"


def commands_page() -> str:
    """Every command with its help and a table of its options, as Markdown."""
    group = typer.main.get_command(app)
    return f"# Commands\n\n{MADE}" + "\n".join(_sections(group, "lvr-lite"))


def _sections(command: Any, name: str) -> list[str]:
    """The section of a command, and those of its sub-commands; commands are click's."""
    children = getattr(command, "commands", {})
    sections = []
    if not children:
        sections = [_section(command, name)]
    for child, sub in children.items():
        sections += _sections(sub, f"{name} {child}")
    return sections


def _section(command: Any, name: str) -> str:
    arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    lines = [f"## {name}", "", f"`{usage}`", "", inspect.cleandoc(command.help or "")]
    rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
    if rows:
        lines += ["", "| argument or option | default | what |", "|---|---|---|", *rows]
    return "\n".join([*lines, ""])


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _row(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    names = ""
    if option:
        names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    empty = default is None or callable(default) or default in ((), [], False, "")
    needed = "needed" if parameter.required else ""
    cells = [
        f"`{names or _argument(parameter)}`",
        needed if empty else f"`{default}`",
        (getattr(parameter, "help", None) or "").replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def python_page() -> str:
    """The overview of `help(lvr_lite)`, then every public name with its signature and its text."""
    overview = inspect.cleandoc(lvr_lite.__doc__ or "")
    things = {name: getattr(lvr_lite, name) for name in lvr_lite.__all__}
    functions = [_function(n, thing) for n, thing in things.items() if inspect.isfunction(thing)]
    classes = [_class(n, thing) for n, thing in things.items() if inspect.isclass(thing)]
    parts = [
        f"# The Python API\n\n{MADE}",
        f"```text\n{overview}\n```\n",
        "## Functions\n",
        *functions,
        "## Classes\n",
        *classes,
    ]
    return "\n".join(parts)


def _function(name: str, function: Any) -> str:
    return _entry(f"{name}{_signature(function)}", function)


def _class(name: str, kind: Any) -> str:
    """A class with its fields, which its text explains, and its public methods."""
    if not dataclasses.is_dataclass(kind):
        methods = [m for n, m in inspect.getmembers(kind, inspect.isfunction) if n[0] != "_"]
        entries = [_function(f"{name}.{m.__name__}", m) for m in methods]
        return "\n".join([_entry(f"class {name}", kind), *entries])
    fields = [f"{f.name}: {f.type}" for f in dataclasses.fields(kind) if f.repr]
    return _entry(f"class {name}({', '.join(fields)})", kind)


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


def _entry(title: str, thing: Any) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")
    return f"### `{title}`\n\n```text\n{text}\n```\n"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "python.md").write_text(python_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
