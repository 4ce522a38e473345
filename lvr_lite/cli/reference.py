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
    sections = "\n".join(_sections(group, "lvr-lite"))
    return f"# Commands\n\n{MADE}{sections}"


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
    parameters = command.params
    arguments = [_argument(p) for p in parameters if p.param_type_name == "argument"]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    lines = [
        f"## {name}",
        "",
        f"`{usage}`",
        "",
        inspect.cleandoc(command.help or ""),
    ]
    rows = [_row(parameter) for parameter in parameters if parameter.name != "help"]
    if rows:
        lines += [
            "",
            "| argument or option | default | what |",
            "|---|---|---|",
            *rows,
        ]
    lines.append("")
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _row(parameter: Any) -> str:
    name = _argument(parameter)
    if parameter.param_type_name == "option":
        names = (*parameter.opts, *parameter.secondary_opts)
        name = ", ".join(names)
    text = getattr(parameter, "help", None) or ""
    text = text.replace("|", "\\|")
    return f"| `{name}` | {_default(parameter)} | {text} |"


def _default(parameter: Any) -> str:
    default = parameter.default
    if default is None or callable(default) or default in ((), [], False, ""):
        return "needed" if parameter.required else ""
    return f"`{default}`"


def python_page() -> str:
    """The overview of `help(lvr_lite)`, then every public name with its signature and its text."""
    overview = inspect.cleandoc(lvr_lite.__doc__ or "")
    functions = []
    classes = []
    for name in lvr_lite.__all__:
        public = getattr(lvr_lite, name)
        if inspect.isfunction(public):
            functions.append(_function(name, public))
        elif inspect.isclass(public):
            classes.append(_class(name, public))
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
    if dataclasses.is_dataclass(kind):
        fields = [f"{f.name}: {f.type}" for f in dataclasses.fields(kind) if f.repr]
        return _entry(f"class {name}({', '.join(fields)})", kind)
    entries = [_entry(f"class {name}", kind)]
    for method_name, method in inspect.getmembers(kind, inspect.isfunction):
        if not method_name.startswith("_"):
            entries.append(_function(f"{name}.{method.__name__}", method))
    return "\n".join(entries)


def _signature(function: Any) -> str:
    signature = str(inspect.signature(function))
    return signature.replace("'", "")


def _entry(title: str, thing: Any) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")
    return f"### `{title}`\n\n```text\n{text}\n```\n"


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "python.md").write_text(python_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
