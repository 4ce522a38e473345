"""`optimum-cli export lvr`: the command of `lvr-lite export` among those of optimum.

optimum loads every file of the namespace `optimum.commands.register`, as which this folder is
installed (pyproject.toml); a namespace of several packages has no `__init__.py`. May import:
optimum, and what `--help` of lvr-lite may.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from lvr_lite.cli.app import app, main


def _parameters() -> list[Any]:
    """The arguments and options of `lvr-lite export`, as click has them."""
    command = typer.main.get_command(app).commands["export"]  # type: ignore[attr-defined]
    return [parameter for parameter in command.params if parameter.name != "help"]


def _words(given: Namespace) -> list[str]:
    """The same call as words of a command line."""
    positional = []
    options = []
    for parameter in _parameters():
        value = getattr(given, parameter.name)
        if value is None or value is False:
            continue
        if parameter.param_type_name == "argument":
            positional.append(value)
        elif value is True:
            options.append(parameter.opts[0])
        else:
            options += [parameter.opts[0], value]
    return [*options, "--", *positional]


class LvrExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="lvr",
        help="Export a checkpoint with latent visual reasoning (`lvr-lite export`).",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        for parameter in _parameters():
            # argparse formats help texts with "%".
            help_ = (parameter.help or "").replace("%", "%%")
            if parameter.param_type_name == "argument":
                needed = None if parameter.required else "?"
                parser.add_argument(parameter.name, nargs=needed, help=help_)
            elif parameter.is_flag:
                parser.add_argument(
                    *parameter.opts, dest=parameter.name, action="store_true", help=help_
                )
            else:
                parser.add_argument(
                    *parameter.opts, dest=parameter.name, metavar=parameter.metavar, help=help_
                )

    def run(self) -> None:
        sys.argv = ["lvr-lite", "export", *_words(self.args)]
        main()


REGISTER_COMMANDS = [(LvrExportCommand, ExportCommand)]
