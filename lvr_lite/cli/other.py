"""`lvr-lite inspect`, `doctor` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lvr_lite.cli.options import JsonOut, ModelFolder, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from lvr_lite.commands.demo import DemoSystem
    from lvr_lite.commands.doctor import Check


def inspect(model: ModelFolder, json_: JsonOut = None) -> None:
    """Show what is in a bundle or a checkpoint: graphs, precision, sizes, hashes, parity.

    Example: lvr-lite inspect bundle
    """
    from rich.console import Console

    from lvr_lite.cli.contents import show
    from lvr_lite.commands.inspect import BundleContents
    from lvr_lite.commands.inspect import inspect as look_into
    from lvr_lite.model.bundle import Bundle

    contents = look_into(model)
    show(contents, Console())
    write_json(json_, contents.to_json())
    if isinstance(contents, BundleContents) and not contents.intact:
        # Raises the error that names the file.
        Bundle.open(contents.folder)


def doctor(json_: JsonOut = None) -> None:
    """Say what this machine can do, what is missing, and the line that mends it.

    Example: lvr-lite doctor
    """
    from rich.console import Console

    from lvr_lite.commands.doctor import doctor as examine

    diagnosis = examine()
    Console().print(_findings(diagnosis.checks))
    write_json(json_, diagnosis.to_json())
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _findings(checks: list[Check]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]–[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        mend = f"[bold]{escape(check.mend)}[/]" if check.mend else ""
        table.add_row(marks[check.ok], escape(check.name), escape(check.detail), mend)
    return table


def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, bundles and report.")] = Path(
        "demo-out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and questions: does everything run?")
    ] = False,
) -> None:
    """The whole job on the embedded model and scenes; ends with a table and a report page.

    Example: lvr-lite demo --out demo-out
    """
    from rich.console import Console

    from lvr_lite.commands.demo import demo as run_demo
    from lvr_lite.terminal import stderr

    result = run_demo(out, quick)
    console = Console()
    console.print(_systems(result.systems))
    console.print(f"probe of ONNX int8: {result.probe['verdict']}", highlight=False)
    stderr().print(f"{result.minutes['all']:.1f} min; the page: {result.page}")


def _systems(systems: list[DemoSystem]) -> Table:
    from rich.table import Table

    table = Table(title="held-out scenes, greedy decoding", title_justify="left")
    for column in ("", "accuracy", "95 % interval", "n", "MB", "TTFT ms", "TPLS ms", "TPOT ms"):
        table.add_column(column, justify="right" if column else "left")
    for s in systems:
        low, high = s.interval
        table.add_row(
            s.name,
            f"{s.accuracy:.1%}",
            f"{low:.1%} – {high:.1%}",
            str(s.n),
            _rounded(s.size_mb, 1),
            _rounded(s.ttft_ms, 2),
            _rounded(s.tpls_ms, 3),
            _rounded(s.tpot_ms, 3),
        )
    return table


def _rounded(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
