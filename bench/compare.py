"""What changed between two runs of the bench beyond noise. May import: numpy, rich, the core.

A median counts as changed where two things hold: it moved by more than a tolerance beyond what the
machine itself moved (the speed of its memory, and of its cores, both measured in each run), and so
did, without the tolerance, the whole interval of the ratio of medians, bootstrapped. Not samples
are drawn but stretches of rounds, since what follows each other shares its luck: the steps of one
answer, and the rounds of the same seconds. The level of the interval is divided among all
comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lvr_lite.bench.measure import LATENCIES, STAGES
from lvr_lite.bench.report import TITLES, rounds_of
from lvr_lite.errors import DataError

TOLERANCE = 0.05  # of a median
SHARE = 0.05  # of a request, below which a stage is not looked at
RISK = 0.01  # of calling any noise a change
DRAWS = 4000
STRETCHES = 10  # at most twice as many, and each of at least one round


def compare(
    before: dict[str, Any], after: dict[str, Any], tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Two runs, as JSON, beside each other: every latency and stage of every system that both have.

    Returns {"rows": [{"system", "measure", "before_ms", "after_ms", "ratio", "interval", "verdict":
    "same", "slower" or "faster"}], "answers": [systems that say other things now], "tolerance",
    "by_machine": [least, most] that a ratio may be by the machine alone, "machine": notes}. Raises
    DataError where they have no system in common.
    """
    systems = {s["name"]: s for s in before["systems"]}
    pairs = [(systems[s["name"]], s) for s in after["systems"] if s["name"] in systems]
    if not pairs:
        raise DataError(
            f"no system is in both runs: {', '.join(systems)} in one, {', '.join(s['name'] for s in after['systems'])} in the other"
        )
    notes = _machine(before, after)
    cores = (_cores(before), _cores(after))
    slower = [
        1.0,
        before["bandwidth_gb_s"] / after["bandwidth_gb_s"],
        cores[1] / cores[0] if cores[0] and cores[1] else 1.0,
    ]
    least, most = min(slower), max(slower)  # what a ratio may be by the machine alone
    cases = [(a["name"], name, x, y) for a, b in pairs for name, x, y in _measures(a, b)]
    rng, level = np.random.default_rng(0), RISK / max(len(cases), 1)
    rows = []
    for system, name, x, y in cases:
        first, second = (
            _by_round(x["samples_ms"], rounds_of(before)),
            _by_round(y["samples_ms"], rounds_of(after)),
        )
        ratio = float(y["p50_ms"] / x["p50_ms"])
        low, high = _interval(first, second, level, rng)
        changed = (
            min(low, ratio / (1 + tolerance)) > most or max(high, ratio * (1 + tolerance)) < least
        )
        verdict = "same" if not changed else "slower" if ratio > 1 else "faster"
        rows.append({"system": system, "measure": name, "before_ms": x["p50_ms"], "after_ms": y["p50_ms"], "ratio": ratio,
                     "interval": [low, high], "verdict": verdict})  # fmt: skip
    answers = [
        a["name"]
        for a, b in pairs
        if before["plan"] == after["plan"] and a["output_md5"] != b["output_md5"]
    ]
    told = {
        "rows": rows,
        "answers": answers,
        "tolerance": tolerance,
        "by_machine": [least, most],
        "machine": notes,
    }
    return {"schema": "lvr-lite/bench-compare", "version": 1, **told}


def _measures(
    a: dict[str, Any], b: dict[str, Any]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, summary in one, summary in the other) of what both measured. Times below 0.1 ms are
    the clock's and Python's; of a stage that takes little of a request nobody would notice a
    change, and it is Python's luck of a process.
    """
    found = [(name, a.get(f"{name}_ms"), b.get(f"{name}_ms")) for name in LATENCIES]
    stages = [
        name
        for name in STAGES
        if name != "latent_step" and max(_share(a, name), _share(b, name)) >= SHARE
    ]  # that one is tpls
    found += [(name, a["stages"].get(name), b["stages"].get(name)) for name in stages]
    return [
        (n, x, y)
        for n, x, y in found
        if x and y and x["samples_ms"] and y["samples_ms"] and min(x["p50_ms"], y["p50_ms"]) >= 0.1
    ]


def _share(system: dict[str, Any], stage: str) -> float:
    """What a stage takes of a request."""
    spent = system.get("request_ms", {}).get(stage)
    return 1.0 if spent is None else float(spent / system["end_to_end_ms"]["p50_ms"])


def _by_round(samples: list[float], rounds: int) -> np.ndarray:
    """The median of each round's samples, where rounds have equally many."""
    values = np.array(samples)
    return np.median(values.reshape(rounds, -1), axis=1) if len(values) % rounds == 0 else values


def _interval(
    first: np.ndarray, second: np.ndarray, level: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Of the ratio of medians, second over first, at 1 - level."""
    drawn = []
    for values in (first, second):
        each = max(1, len(values) // STRETCHES)
        stretches = values[len(values) % each :].reshape(-1, each)
        chosen = stretches[rng.integers(0, len(stretches), (DRAWS, len(stretches)))]
        drawn.append(np.median(chosen.reshape(DRAWS, -1), axis=1))
    low, high = np.quantile(drawn[1] / drawn[0], [level / 2, 1 - level / 2])
    return float(low), float(high)


def _cores(data: dict[str, Any]) -> float | None:
    """Median ms of `machine.read_compute`; None in older files, which took another one."""
    return float(np.median(data["core_ms"])) if data.get("core_ms") else None


def _machine(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    notes = [
        f"{name}: {before['machine'].get(name)} in one run, {after['machine'].get(name)} in the other"
        for name in ("cpu", "threads", "governor", "packages")
        if before["machine"].get(name) != after["machine"].get(name)
    ]
    if before["plan"] != after["plan"]:
        notes.append(f"plan: {before['plan']} in one run, {after['plan']} in the other")
    notes.append(
        f"memory read at {before['bandwidth_gb_s']:.1f} GB/s in one run, {after['bandwidth_gb_s']:.1f} in the other"
    )
    if (first := _cores(before)) and (second := _cores(after)):
        notes.append(
            f"a fixed computation took {first:.2f} ms in one run, {second:.2f} in the other"
        )
    return notes


def show(data: dict[str, Any], console: Console) -> None:
    table = Table("system", "measure", title="medians, ms", title_justify="left")
    for title in ("before", "after", "ratio", "interval", ""):
        table.add_column(title, justify="right")
    for row in data["rows"]:
        colour = {"same": "dim", "slower": "red", "faster": "green"}[row["verdict"]]
        interval = f"{row['interval'][0]:.2f} … {row['interval'][1]:.2f}"
        numbers = (
            f"{row['before_ms']:.2f}",
            f"{row['after_ms']:.2f}",
            f"{row['ratio']:.3f}",
            interval,
        )
        table.add_row(
            row["system"],
            TITLES.get(row["measure"], row["measure"]),
            *numbers,
            f"[{colour}]{row['verdict']}[/]",
        )
    console.print(table)
    for note in data["machine"]:
        console.print(note, highlight=False)
    for name in data["answers"]:
        console.print(f"[red]{name} gives other answers than before[/]", highlight=False)
    count = sum(row["verdict"] != "same" for row in data["rows"])
    console.print(
        f"{count or 'nothing'} of {len(data['rows'])} changed by more than {data['tolerance']:.0%} beyond noise and the machine's speed",
        highlight=False,
    )
