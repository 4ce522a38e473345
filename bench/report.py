"""A run of the bench for people: tables for the terminal, an HTML page, a CSV file. May import:
rich, views/, model/.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lvr_lite.bench.record import LATENCIES, STAGES, Benchmark, Summary, SystemResult
from lvr_lite.files import write_atomically
from lvr_lite.model.bundle import GRAPHS
from lvr_lite.views.charts import curve, interval_bars, number, percent, stacked_bars
from lvr_lite.views.page import render_page

# {what settings vary: the latencies that are drawn over it}
SCALING = {
    "visual_tokens": ("ttft", "tpot"),
    "steps": ("ttfa", "end_to_end"),
    "batch": ("tpot", "end_to_end"),
}


# -------------------------------------------------------------------------------------------------
# for terminals


def show(run: Benchmark, console: Console) -> None:
    """Print a run for people: latencies, stages, memory and quality, and what the machine was like
    meanwhile.
    """
    for table in (_latencies(run), _stages(run), _rest(run)):
        console.print(table)
    console.print(_conditions(run), highlight=False)
    for warning in run.warnings:
        console.print(f"[bold]{escape(warning)}[/]", highlight=False)


def _latencies(run: Benchmark) -> Table:
    table = Table("system", "precision", title="median, p90 in brackets, ms", title_justify="left")
    for title in LATENCIES.values():
        table.add_column(title, justify="right")
    for system in run.systems:
        cells = [_median_p90(system.latencies[name]) for name in LATENCIES]
        table.add_row(system.name, system.precision, *cells)
    return table


def _stages(run: Benchmark) -> Table:
    table = Table("stage", title="median of one, ms", title_justify="left")
    for system in run.systems:
        table.add_column(system.name, justify="right")
    for stage in STAGES:
        table.add_row(stage, *(number(system.stages[stage].p50_ms) for system in run.systems))
    return table


def _rest(run: Benchmark) -> Table:
    """What is neither a latency nor a stage; a row that says nothing of any system is left out."""
    systems = run.systems
    table = Table("", title="size, memory, quality", title_justify="left")
    for system in systems:
        table.add_column(system.name, justify="right")
    agreements, cosines, accuracies = zip(*map(_quality_cells, systems), strict=True)
    rows: dict[str, Sequence[str]] = {
        "size MB": [number(s.megabytes) for s in systems],
        "peak RSS MiB": [_peak_rss(s) for s in systems],
        "answers that looked": [percent(s.looked) for s in systems],
        "latent steps an answer": [number(s.latent_steps) for s in systems],
        "visual tokens a picture": [sizes(s) for s in systems],
        "tokens/s": [number(s.throughput_tokens_s) for s in systems],
        "J a request": [number(s.joules) for s in systems],
        "of bandwidth": [percent(s.bandwidth_fraction) for s in systems],
        "token agreement": agreements,
        "latent cosine": cosines,
        "accuracy": accuracies,
        "output md5": [s.output_md5[:8] for s in systems],
    }
    for title, cells in rows.items():
        if any(cell != number(None) for cell in cells):
            table.add_row(title, *cells)
    return table


def _peak_rss(system: SystemResult) -> str:
    peak = number(system.peak_rss_mb)
    if system.peak_rss_shared:
        return f"{peak} (all)"
    return peak


def sizes(system: SystemResult) -> str:
    """The visual tokens of its pictures: "256", or "200, at most 256"."""
    tokens = system.visual_tokens or {}
    if tokens.get("max") is None:
        return number(None)
    if tokens["p50"] == tokens["max"]:
        return str(tokens["max"])
    return f"{tokens['p50']:g}, at most {tokens['max']}"


def _median_p90(summary: Summary) -> str:
    if not summary.samples_ms:
        return number(None)
    return f"{number(summary.p50_ms)} ({number(summary.p90_ms)})"


def _quality_cells(system: SystemResult) -> tuple[str, str, str]:
    """Token agreement, the latents' cosine at the first and the last step, accuracy with its
    interval.
    """
    agreement = number(None)
    cosine = number(None)
    accuracy = number(None)
    quality = system.quality
    if quality:
        agreement = percent(quality.token_agreement)
        cosines = quality.latent_cosine
        if cosines:
            cosine = f"{cosines[0]:.4f} … {cosines[-1]:.4f}"
    score = system.accuracy
    if score:
        low, high = score.interval
        accuracy = f"{percent(score.accuracy)} [{percent(low)}, {percent(high)}], n = {score.n}"
    return agreement, cosine, accuracy


def _conditions(run: Benchmark) -> str:
    """Under what conditions the times were taken."""
    plan = run.plan
    bandwidth = run.bandwidth
    text = (
        f"{run.rounds} interleaved rounds over {plan['requests']} requests, "
        f"{plan['tokens']} text tokens forced, seed {plan['seed']}. "
        f"Memory read at {bandwidth.before_gb_s:.1f} GB/s before and {bandwidth.after_gb_s:.1f} "
        f"after ({bandwidth.threads} threads); "
        f"load {number(bandwidth.load_before)} and {number(bandwidth.load_after)}."
    )
    if all(system.joules is None for system in run.systems):
        text += " Energy: this machine does not say (no RAPL counter that this user may read)."
    return text


# -------------------------------------------------------------------------------------------------
# files


def write_csv(run: Benchmark, out: Path) -> None:
    """Write every raw sample as one line: system, what was measured, its number, ms. Raises
    OutputError as `write_html`.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            "system",
            "precision",
            "steps",
            "visual_tokens",
            "batch",
            "measure",
            "sample",
            "ms",
        ]
    )
    for system in run.systems:
        setting = system.setting
        first = [
            system.name,
            system.precision,
            setting.steps,
            setting.visual_tokens,
            setting.batch,
        ]
        measures = system.latencies | system.stages
        for name, summary in measures.items():
            for i, ms in enumerate(summary.samples_ms):
                table.writerow([*first, name, i, f"{ms:.6g}"])
    write_atomically(out, text.getvalue())


def write_html(run: Benchmark, out: Path) -> None:
    """Write a run as one self-contained HTML page. Raises OutputError where the file cannot be
    written.
    """
    systems = run.systems
    requests = []
    megabytes = []
    for system in systems:
        by_stage = [system.request_ms[stage] for stage in STAGES]
        requests.append((system.name, by_stage))
        if system.bytes:
            by_graph = [system.bytes.get(graph, 0) / 1e6 for graph in GRAPHS]
            megabytes.append((system.name, by_graph))
    html = render_page(
        "bench.html.j2",
        systems=systems,
        sizes_of=sizes,
        stages=STAGES,
        titles=LATENCIES,
        request=stacked_bars(requests, list(STAGES), "ms"),
        sizes=stacked_bars(megabytes, list(GRAPHS), "MB"),
        accuracy=interval_bars([_accuracy_bar(system) for system in systems]),
        quality=[(system.name, *_quality_cells(system)) for system in systems],
        conditions=_conditions(run),
        warnings=run.warnings,
        scaling=_scaling(systems),
        machine=run.machine,
    )
    write_atomically(out, html)


def _accuracy_bar(system: SystemResult) -> tuple[str, float | None, list[float] | None, str]:
    score = system.accuracy
    if score is None:
        return system.name, None, None, ""
    return system.name, score.accuracy, score.interval, f"n = {score.n}"


def _scaling(systems: Sequence[SystemResult]) -> list[tuple[str, Markup]]:
    """(title, curve) of medians over what settings vary, a curve a system."""
    curves = []
    for axis, names in SCALING.items():
        words = axis.replace("_", " ")
        for name in names:
            lines = _lines(systems, axis, name)
            top = max((y for points in lines.values() for _, y in points), default=0.0)
            for label, points in lines.items():
                drawn = curve(points, f"{LATENCIES[name]}, ms", top=top, unit=words)
                if drawn:
                    curves.append((f"{LATENCIES[name]} by {words}: {label}", drawn))
    return curves


def _lines(
    systems: Sequence[SystemResult], axis: str, name: str
) -> dict[str, list[tuple[float, float]]]:
    """{a system and its setting less `axis`: (value on the axis, median of a latency, ms)}"""
    lines: dict[str, list[tuple[float, float]]] = {}
    for system in systems:
        setting = system.setting
        values = {
            "steps": setting.steps,
            "batch": setting.batch,
            "visual_tokens": setting.visual_tokens,
        }
        x = values.pop(axis)
        y = system.latencies[name].p50_ms
        if x is None or y is None:
            continue
        others = [f"{key} {value}" for key, value in values.items() if value is not None]
        label = ", ".join([system.system, *others])
        lines.setdefault(label, []).append((float(x), y))
    return lines


def machines_table(runs: Sequence[tuple[str, Benchmark]]) -> str:
    """Runs of several machines, (file's name, run) each, as one Markdown table: a row a system."""
    titles = [
        "machine",
        "system",
        *LATENCIES.values(),
        "tokens/s",
        "latent steps",
        "visual tokens",
        "peak RSS, MiB",
        "GB/s",
        "commit",
    ]
    rows = [titles, ["---"] * len(titles)]
    for name, run in sorted(runs, key=lambda named: named[0]):
        card = run.machine
        machine = card.get("cpu") or name
        provider = card.get("provider", "cpu")
        for system in run.systems:
            medians = [number(system.latencies[latency].p50_ms) for latency in LATENCIES]
            rows.append(
                [
                    f"{machine}, {card.get('threads')} threads, {provider}",
                    f"{system.name} ({system.precision})",
                    *medians,
                    number(system.throughput_tokens_s),
                    number(system.latent_steps),
                    sizes(system),
                    number(system.peak_rss_mb),
                    f"{run.bandwidth_gb_s:.1f}",
                    (card.get("commit") or "")[:8],
                ]
            )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines[1] = f"|{'---|' * len(titles)}"
    return "\n".join(lines)
