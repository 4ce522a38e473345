"""What a run of the bench says: the JSON, a table for the terminal, an HTML page. May import: rich, the core.

The table and the page are made from the JSON alone, so that a saved file can be shown again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lvr_lite.bench.measure import LATENCIES, STAGES, Measured, Run, summary
from lvr_lite.bundle import GRAPHS, write_atomically
from lvr_lite.page import interval_bars, number, percent, render_page, stacked_bars

SCHEMA, VERSION = "lvr-lite/bench", 1
TITLES = {"ttft": "TTFT", "ttfa": "TTFA", "tpls": "TPLS", "tpot": "TPOT", "end_to_end": "end to end"}


def to_json(run: Run, machine: dict[str, Any]) -> dict[str, Any]:
    """The run as docs/design.md specifies it. machine: `machine.card()`."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "machine": machine,
        "bandwidth_gb_s": run.bandwidth,
        "bandwidth": {
            "before_gb_s": run.bandwidth_before,
            "after_gb_s": run.bandwidth_after,
            "threads": run.plan.threads,
            "steady": run.steady,
            "load_before": run.loads[0],
            "load_after": run.loads[1],
        },
        "plan": {
            "rounds": run.plan.rounds,
            "warmup": run.plan.warmup,
            "tokens": run.plan.tokens,
            "steps": run.plan.steps,
            "seed": run.plan.seed,
            "requests": run.requests,
        },
        "systems": [_system(measured, run.bandwidth) for measured in run.systems],
    }


def _system(measured: Measured, bandwidth_gb_s: float) -> dict[str, Any]:
    system, quality = measured.system, measured.quality
    return {
        "name": system.name,
        "precision": system.precision,
        "stages": {name: summary(measured.stage(name)) for name in STAGES},
        **{f"{name}_ms": summary(measured.latency(name)) for name in LATENCIES},
        "request_ms": {name: measured.spent(name) for name in STAGES},
        "peak_rss_mb": measured.peak_rss_mb,
        "peak_rss_shared": measured.rss_is_shared,
        "bytes": dict(system.bytes),
        "bandwidth_fraction": measured.bandwidth_fraction(bandwidth_gb_s),
        "output_md5": measured.output_md5(),
        "quality": None
        if quality is None
        else {
            "reference": quality.reference,
            "n": quality.n,
            "token_agreement": quality.token_agreement,
            "latent_cosine": quality.latent_cosine,
        },
        "accuracy": system.accuracy,
    }


# ---------------------------------------------------------------------------------------------------------- for terminals


def show(data: dict[str, Any], console: Console) -> None:
    """Print a run's JSON for people: latencies, stages, memory and quality, and what the machine was like meanwhile."""
    systems = data["systems"]
    latencies = Table("system", "precision", title="median, p90 in brackets, ms", title_justify="left")
    for title in TITLES.values():
        latencies.add_column(title, justify="right")
    for s in systems:
        latencies.add_row(s["name"], s["precision"], *(_median_p90(s[f"{name}_ms"]) for name in TITLES))
    stages = Table("stage", title="median of one, ms", title_justify="left")
    for s in systems:
        stages.add_column(s["name"], justify="right")
    for stage in STAGES:
        stages.add_row(stage, *(number(s["stages"][stage]["p50_ms"]) for s in systems))
    rest = Table("system", title="size, memory, quality", title_justify="left")
    for title in ("size MB", "peak RSS MiB", "of bandwidth", "token agreement", "latent cosine", "accuracy", "output md5"):
        rest.add_column(title, justify="right")
    for s in systems:
        shared = " (all)" if s["peak_rss_shared"] else ""
        cells = (
            number(_megabytes(s)),
            number(s["peak_rss_mb"]) + shared,
            percent(s["bandwidth_fraction"]),
            *_quality_cells(s),
            s["output_md5"][:8],
        )
        rest.add_row(s["name"], *cells)
    for table in (latencies, stages, rest):
        console.print(table)
    console.print(_conditions(data), highlight=False)


def _median_p90(values: dict[str, Any]) -> str:
    return f"{number(values['p50_ms'])} ({number(values['p90_ms'])})" if values["samples_ms"] else number(None)


def _megabytes(system: dict[str, Any]) -> float | None:
    return sum(system["bytes"].values()) / 1e6 if system["bytes"] else None


def _quality_cells(system: dict[str, Any]) -> tuple[str, str, str]:
    """Token agreement, the latents' cosine at the first and the last step, accuracy with its interval."""
    quality, accuracy = system["quality"] or {}, system["accuracy"] or {}
    cosines = quality.get("latent_cosine") or []
    drift = number(None) if not cosines else f"{cosines[0]:.4f} … {cosines[-1]:.4f}"
    told = percent(accuracy.get("accuracy"))
    if accuracy.get("interval"):
        told += f" [{percent(accuracy['interval'][0])}, {percent(accuracy['interval'][1])}], n = {accuracy.get('n')}"
    return percent(quality.get("token_agreement")), drift, told


def _conditions(data: dict[str, Any]) -> str:
    """Under what conditions the times were taken, with a warning where the machine changed its speed meanwhile."""
    plan, bandwidth = data["plan"], data["bandwidth"]
    text = (
        f"{plan['rounds']} interleaved rounds over {plan['requests']} requests, {plan['tokens']} text tokens forced, seed {plan['seed']}. "
        f"Memory read at {bandwidth['before_gb_s']:.1f} GB/s before and {bandwidth['after_gb_s']:.1f} after "
        f"({bandwidth['threads']} threads); load {number(bandwidth['load_before'])} and {number(bandwidth['load_after'])}."
    )
    if bandwidth["steady"]:
        return text
    return text + " The machine's speed changed during the run: measure again before comparing with other runs."


# -------------------------------------------------------------------------------------------------------------- the page


def write_html(data: dict[str, Any], out: Path) -> None:
    """Write a run's JSON as one self-contained HTML page. Raises BundleError where the file cannot be written."""
    systems = data["systems"]
    scores = [s["accuracy"] or {} for s in systems]
    shares = [(s["name"], a.get("accuracy"), a.get("interval"), f"n = {a.get('n')}") for s, a in zip(systems, scores, strict=True)]
    html = render_page(
        "page.html.j2",
        "lvr_lite.bench",
        systems=systems,
        stages=STAGES,
        titles=TITLES,
        request=stacked_bars([(s["name"], [s["request_ms"][stage] for stage in STAGES]) for s in systems], list(STAGES), "ms"),
        sizes=stacked_bars(
            [(s["name"], [s["bytes"].get(graph, 0) / 1e6 for graph in GRAPHS]) for s in systems if s["bytes"]], list(GRAPHS), "MB"
        ),
        accuracy=interval_bars(shares),
        quality=[(s["name"], *_quality_cells(s)) for s in systems],
        megabytes={s["name"]: _megabytes(s) for s in systems},
        conditions=_conditions(data),
        machine=data["machine"],
    )
    write_atomically(out, html)
