"""What a run of the bench says: the JSON, a table for the terminal, an HTML page. May import: rich,
the core.

The table and the page are made from the JSON alone, so that a saved file can be shown again.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lvr_lite.bench.measure import LATENCIES, STAGES, Measured, Run, summary
from lvr_lite.errors import DataError
from lvr_lite.files import write_atomically
from lvr_lite.model.bundle import GRAPHS
from lvr_lite.views.charts import curve, interval_bars, number, percent, stacked_bars
from lvr_lite.views.page import render_page

SCHEMA, VERSION = "lvr-lite/bench", 1
TITLES = {
    "ttft": "TTFT",
    "ttft_again": "TTFT again",
    "ttfa": "TTFA",
    "tpls": "TPLS",
    "tpot": "TPOT",
    "end_to_end": "end to end",
}


def to_json(run: Run, machine: dict[str, Any]) -> dict[str, Any]:
    """The run as docs/design.md specifies it. machine: `machine.card()`."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "machine": machine,
        "bandwidth_gb_s": run.bandwidth,
        "rounds": len(run.compute),
        "core_ms": run.compute,
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
            "seconds": run.plan.seconds,
            "warmup": run.plan.warmup,
            "tokens": run.plan.tokens,
            "settings": [asdict(setting) for setting in run.plan.settings],
            "seed": run.plan.seed,
            "requests": run.requests,
        },
        "warnings": run.warnings,
        "systems": [_system(measured, run.bandwidth, run.plan.rounds) for measured in run.systems],
    }


def _system(measured: Measured, bandwidth_gb_s: float, rounds: int) -> dict[str, Any]:
    system, quality = measured.system, measured.quality
    return {
        "name": measured.name,
        "system": system.name,
        "precision": system.precision,
        "setting": asdict(measured.setting)
        | {"visual_tokens": measured.image_tokens, "prompt_tokens": measured.prompt_tokens},
        "stages": {name: summary(measured.stage(name)) for name in STAGES},
        **{f"{name}_ms": summary(measured.latency(name)) for name in LATENCIES},
        "request_ms": {name: measured.spent(name) for name in STAGES},
        "throughput_tokens_s": measured.throughput(),
        "joules": measured.joules(),
        "peak_rss_mb": measured.peak_rss_mb,
        "peak_rss_shared": measured.rss_is_shared,
        "bytes": dict(system.bytes),
        "bandwidth_fraction": measured.bandwidth_fraction(bandwidth_gb_s),
        "output_md5": measured.output_md5(rounds),
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


# ----------------------------------------------------------------------------------------------------------
# for terminals


def show(data: dict[str, Any], console: Console) -> None:
    """Print a run's JSON for people: latencies, stages, memory and quality, and what the machine
    was like meanwhile.
    """
    systems = data["systems"]
    latencies = Table(
        "system", "precision", title="median, p90 in brackets, ms", title_justify="left"
    )
    for title in TITLES.values():
        latencies.add_column(title, justify="right")
    for s in systems:
        latencies.add_row(
            s["name"], s["precision"], *(_median_p90(s[f"{name}_ms"]) for name in TITLES)
        )
    stages = Table("stage", title="median of one, ms", title_justify="left")
    for s in systems:
        stages.add_column(s["name"], justify="right")
    for stage in STAGES:
        stages.add_row(stage, *(number(s["stages"][stage]["p50_ms"]) for s in systems))
    rest = Table("", title="size, memory, quality", title_justify="left")
    for s in systems:
        rest.add_column(s["name"], justify="right")
    for title, cells in _rest(systems).items():
        if any(cell != number(None) for cell in cells):
            rest.add_row(title, *cells)
    for table in (latencies, stages, rest):
        console.print(table)
    console.print(_conditions(data), highlight=False)
    for warning in data["warnings"]:
        console.print(f"[bold]{escape(warning)}[/]", highlight=False)


def _rest(systems: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is neither a latency nor a stage: {title: a cell a system}."""
    quality = [_quality_cells(s) for s in systems]
    return {
        "size MB": [number(_megabytes(s)) for s in systems],
        "peak RSS MiB": [
            number(s["peak_rss_mb"]) + (" (all)" if s["peak_rss_shared"] else "") for s in systems
        ],
        "tokens/s": [number(s["throughput_tokens_s"]) for s in systems],
        "J a request": [number(s["joules"]) for s in systems],
        "of bandwidth": [percent(s["bandwidth_fraction"]) for s in systems],
        "token agreement": [cells[0] for cells in quality],
        "latent cosine": [cells[1] for cells in quality],
        "accuracy": [cells[2] for cells in quality],
        "output md5": [s["output_md5"][:8] for s in systems],
    }


def _median_p90(values: dict[str, Any]) -> str:
    return (
        f"{number(values['p50_ms'])} ({number(values['p90_ms'])})"
        if values["samples_ms"]
        else number(None)
    )


def _megabytes(system: dict[str, Any]) -> float | None:
    return sum(system["bytes"].values()) / 1e6 if system["bytes"] else None


def _quality_cells(system: dict[str, Any]) -> tuple[str, str, str]:
    """Token agreement, the latents' cosine at the first and the last step, accuracy with its
    interval.
    """
    quality, accuracy = system["quality"] or {}, system["accuracy"] or {}
    cosines = quality.get("latent_cosine") or []
    drift = number(None) if not cosines else f"{cosines[0]:.4f} … {cosines[-1]:.4f}"
    told = percent(accuracy.get("accuracy"))
    if accuracy.get("interval"):
        told += f" [{percent(accuracy['interval'][0])}, {percent(accuracy['interval'][1])}], n = {accuracy.get('n')}"
    return percent(quality.get("token_agreement")), drift, told


def rounds_of(data: dict[str, Any]) -> int:
    """How many rounds a run's JSON holds: those of its plan (so it was in older files), or more
    where they passed too soon.
    """
    return int(data.get("rounds", data["plan"]["rounds"]))


def _conditions(data: dict[str, Any]) -> str:
    """Under what conditions the times were taken."""
    plan, bandwidth = data["plan"], data["bandwidth"]
    text = (
        f"{rounds_of(data)} interleaved rounds over {plan['requests']} requests, {plan['tokens']} text tokens forced, seed {plan['seed']}. "
        f"Memory read at {bandwidth['before_gb_s']:.1f} GB/s before and {bandwidth['after_gb_s']:.1f} after "
        f"({bandwidth['threads']} threads); load {number(bandwidth['load_before'])} and {number(bandwidth['load_after'])}."
    )
    if all(s["joules"] is None for s in data["systems"]):
        text += " Energy: this machine does not say (no RAPL counter that this user may read)."
    return text


def write_csv(data: dict[str, Any], out: Path) -> None:
    """Write every raw sample of a run's JSON as one line: system, what was measured, its number,
    ms. Raises BundleError as `write_html`.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["system", "precision", "steps", "visual_tokens", "batch", "measure", "sample", "ms"]
    )
    for s in data["systems"]:
        kind = (
            s["name"],
            s["precision"],
            s["setting"]["steps"],
            s["setting"]["visual_tokens"],
            s["setting"]["batch"],
        )
        measures = {name: s[f"{name}_ms"] for name in LATENCIES} | s["stages"]
        for name, values in measures.items():
            table.writerows(
                [*kind, name, i, f"{ms:.6g}"] for i, ms in enumerate(values["samples_ms"])
            )
    write_atomically(out, text.getvalue())


# --------------------------------------------------------------------------------------------------------------
# the page


def write_html(data: dict[str, Any], out: Path) -> None:
    """Write a run's JSON as one self-contained HTML page. Raises BundleError where the file cannot
    be written.
    """
    systems = data["systems"]
    scores = [s["accuracy"] or {} for s in systems]
    shares = [
        (s["name"], a.get("accuracy"), a.get("interval"), f"n = {a.get('n')}")
        for s, a in zip(systems, scores, strict=True)
    ]
    html = render_page(
        "bench.html.j2",
        systems=systems,
        stages=STAGES,
        titles=TITLES,
        request=stacked_bars(
            [(s["name"], [s["request_ms"][stage] for stage in STAGES]) for s in systems],
            list(STAGES),
            "ms",
        ),
        sizes=stacked_bars(
            [
                (s["name"], [s["bytes"].get(graph, 0) / 1e6 for graph in GRAPHS])
                for s in systems
                if s["bytes"]
            ],
            list(GRAPHS),
            "MB",
        ),
        accuracy=interval_bars(shares),
        quality=[(s["name"], *_quality_cells(s)) for s in systems],
        megabytes={s["name"]: _megabytes(s) for s in systems},
        conditions=_conditions(data),
        warnings=data["warnings"],
        scaling=_scaling(systems),
        machine=data["machine"],
    )
    write_atomically(out, html)


def _scaling(systems: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(title, curve) of medians over what settings vary: latencies by visual tokens, by latent
    steps and by batch, a curve a system.
    """
    found = []
    for axis, names in (
        ("visual_tokens", ("ttft", "tpot")),
        ("steps", ("ttfa", "end_to_end")),
        ("batch", ("tpot", "end_to_end")),
    ):
        for name in names:
            lines: dict[str, list[tuple[float, float]]] = {}
            for s in systems:
                others = {
                    k: v
                    for k, v in s["setting"].items()
                    if k not in (axis, "visual_tokens", "prompt_tokens", "image_tokens")
                }
                if axis != "visual_tokens":
                    others["visual_tokens"] = s["setting"]["visual_tokens"]
                x, y = s["setting"][axis], s[f"{name}_ms"]["p50_ms"]
                if x is not None and y is not None:
                    label = ", ".join(
                        [s["system"], *(f"{k} {v}" for k, v in others.items() if v is not None)]
                    )
                    lines.setdefault(label, []).append((float(x), float(y)))
            top = max((y for points in lines.values() for _, y in points), default=0.0)
            for label, points in lines.items():
                drawn = curve(points, f"{TITLES[name]}, ms", top=top, unit=axis.replace("_", " "))
                if drawn:
                    found.append((f"{TITLES[name]} by {axis.replace('_', ' ')}: {label}", drawn))
    return found


# --------------------------------------------------------------------------------------------------------
# saved runs


def read(path: Path) -> dict[str, Any]:
    """A file that `lvr-lite bench --json` wrote. Raises DataError for another one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}; name a file that `lvr-lite bench --json` wrote"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON ({error}); name a file that `lvr-lite bench --json` wrote"
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise DataError(
            f"{path}: not a run of the bench (no schema {SCHEMA}); name a file that `lvr-lite bench --json` wrote"
        )
    if data.get("version") != VERSION:
        raise DataError(
            f"{path}: written in version {data.get('version')} of the format; this lvr-lite reads version {VERSION}"
        )
    return data


def machines_table(runs: list[tuple[str, dict[str, Any]]]) -> str:
    """Runs of several machines, (file's name, JSON) each, as one Markdown table: a row a system."""
    titles = ("machine", "system", *TITLES.values(), "tokens/s", "peak RSS, MiB", "GB/s", "commit")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, data in sorted(runs, key=lambda run: run[0]):
        machine = data["machine"]
        where = f"{machine.get('cpu') or name}, {machine.get('threads')} threads, {machine.get('provider', 'cpu')}"
        for s in data["systems"]:
            times = [number(s[f"{key}_ms"]["p50_ms"]) for key in TITLES]
            rest = (
                number(s["throughput_tokens_s"]),
                number(s["peak_rss_mb"]),
                f"{data['bandwidth_gb_s']:.1f}",
            )
            cells = (
                where,
                f"{s['name']} ({s['precision']})",
                *times,
                *rest,
                (machine.get("commit") or "")[:8],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
