"""The command line: each file parses the options of some commands, calls them and prints.

May import at the top: typer, the standard library and this folder, so that --help is instant;
inside functions everything.
"""

from lvr_lite.cli.app import main

__all__ = ["main"]
