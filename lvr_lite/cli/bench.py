"""`lvr-lite bench BUNDLE` (that is, `bench run BUNDLE`), `bench compare`, `bench table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lvr_lite.cli.options import (
    Html,
    JsonOut,
    MaxPixels,
    Provider,
    Threads,
    look_when,
    numbers,
    write_json,
)

DEFAULT = "run"


class MeasureByDefault(TyperGroup):
    """A group that takes `run` for the sub-command where the first argument names none.

    Contexts and formatters are click's, which later versions of typer hold a copy of: Any.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The group's own help, then all of `run`'s."""
        super().format_help(ctx, formatter)
        formatter.write_paragraph()
        command = self.commands[DEFAULT]
        command.format_help(typer.Context(command, parent=ctx, info_name="[run]"), formatter)


app = typer.Typer(
    cls=MeasureByDefault,
    rich_markup_mode=None,
    help="Measure latency, memory and answers; compare such runs.\n\n"
    "`lvr-lite bench BUNDLE` measures; its options stand below. `lvr-lite bench compare` and "
    "`lvr-lite bench table` show files that it wrote with --json.",
)

RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="A run that --json wrote.")]


@app.command(DEFAULT)
def run(
    model: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle, or a checkpoint.")],
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", help="Another bundle or checkpoint, measured in the same rounds."),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed requests per system; by default 20, and more until 15 seconds have passed.",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed requests per system.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Text tokens of every answer.")] = 16,
    steps: Annotated[
        str | None,
        typer.Option(help="Latent steps, several with commas: 0,4,8; the model's own by default."),
    ] = None,
    image_tokens: Annotated[
        str | None, typer.Option(help="Visual tokens that pictures are scaled to: 64,256,1024.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Requests decoded together: 1,4,8.")] = "1",
    image: Annotated[
        Path | None, typer.Option(help="A picture to ask about; drawn scenes by default.")
    ] = None,
    question: Annotated[str, typer.Option(help="The question for --image.")] = "describe",
    look: Annotated[
        str | None,
        typer.Option(
            "--look",
            metavar="auto|always|never",
            help="Whether answers look; by default always, wherever latent steps are measured.",
        ),
    ] = None,
    max_pixels: MaxPixels = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Held-out scenes to score beside the speed; 0 for none.")
    ] = 0,
    provider: Provider = "cpu",
    threads: Threads = None,
    html: Html = None,
    csv: Annotated[Path | None, typer.Option(help="Write every raw sample.")] = None,
    json_: JsonOut = None,
) -> None:
    """Measure latency by stage, memory and answers, interleaved, with a machine card; the last line
    of stdout is JSON.

    Example: lvr-lite bench int8 --vs int4 --runs 30 --steps 0,8 --html bench.html
    """
    from rich.console import Console

    from lvr_lite.bench import report
    from lvr_lite.commands.bench import BenchOptions, benchmark

    options = BenchOptions(
        vs=tuple(vs or ()),
        runs=runs,
        warmup=warmup,
        tokens=tokens,
        steps=(None,) if steps is None else numbers("--steps", steps),
        image_tokens=(None,) if image_tokens is None else numbers("--image-tokens", image_tokens),
        batch=numbers("--batch", batch),
        image=image,
        question=question,
        look=None if look is None else look_when(look),
        max_pixels=max_pixels,
        limit=limit,
        provider=provider,
        threads=threads,
    )
    result = benchmark(model, options)
    report.show(result, Console())
    if html is not None:
        report.write_html(result, html)
    if csv is not None:
        report.write_csv(result, csv)
    write_json(json_, result.to_json())
    print(json.dumps(result.to_json()))


@app.command()
def compare(
    before: RunFile,
    after: RunFile,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="What a median may move without being called changed."),
    ] = 0.05,
    json_: JsonOut = None,
) -> None:
    """Say what changed between two runs beyond noise; exit code 1 where something became slower, or
    answers changed.

    Example: lvr-lite bench compare before.json after.json
    """
    from rich.console import Console

    from lvr_lite.bench import compare
    from lvr_lite.commands.bench import compare_benchmarks

    comparison = compare_benchmarks(before, after, tolerance)
    compare.show(comparison, Console())
    write_json(json_, comparison.to_json())
    if comparison.regressed:
        raise typer.Exit(1)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs that --json wrote.")],
) -> None:
    """Show runs of several machines in one table (Markdown).

    Example: lvr-lite bench table desktop.json laptop.json
    """
    from lvr_lite.commands.bench import table_of_benchmarks

    print(table_of_benchmarks(files))
