"""An evaluation for people: a table on the terminal. May import: rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the score of `lvr_lite.eval.suite.evaluate`: overall with its interval, by type, and by pairs."""
    low, high = result["interval"]
    table = Table(title=f"{result['model']} on {result['suite']}", title_justify="left")
    table.add_column("questions")
    table.add_column("n", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    for kind, score in result["by_type"].items():
        table.add_row(kind, str(score["n"]), f"{score['accuracy']:.1%}", "")
    table.add_section()
    table.add_row("all", str(result["n"]), f"[bold]{result['accuracy']:.1%}[/]", f"{low:.1%} – {high:.1%}")
    if result["pair_accuracy"] is not None:
        table.add_row("pairs, both right", "", f"{result['pair_accuracy']:.1%}", "")
    (console or Console()).print(table)
