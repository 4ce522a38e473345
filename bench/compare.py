"""What changed between two runs of the bench beyond noise. May import: numpy, rich, files.

A median counts as changed where two things hold: it moved by more than a tolerance beyond what the
machine itself moved (the speed of its memory, and of its cores, both measured in each run), and so
did, without the tolerance, the whole interval of the ratio of medians, bootstrapped. Not samples
are drawn but stretches of rounds, since neighbours are not independent: the steps of one answer,
and the rounds of the same seconds. The level of the interval is divided among all comparisons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from lvr_lite.bench.record import LATENCIES, STAGES, Benchmark, Summary, SystemResult
from lvr_lite.errors import DataError
from lvr_lite.files import JsonObject

# Of a median.
TOLERANCE = 0.05
# Of a request, below which a stage is not compared.
SHARE = 0.05
# Of a stage or a latency, in ms, below which it is not compared.
SHORTEST_MS = 0.1
# Of calling any noise a change.
RISK = 0.01
DRAWS = 4000
# At most twice as many, and each of at least one round.
STRETCHES = 10
COLOURS = {"same": "dim", "slower": "red", "faster": "green"}


@dataclass(frozen=True)
class Change:
    """One stage or latency of one system in both runs.

    ratio: of medians, after over before; interval: of the ratio.
    verdict: "same", "slower" or "faster".
    """

    system: str
    measure: str
    before_ms: float
    after_ms: float
    ratio: float
    interval: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other, as `bench compare --json` writes it.

    answers: the systems that give other answers now.
    by_machine: the least and the most that a ratio may be by the machine alone.
    machine: what differs between the machines, and how fast they were.
    """

    rows: list[Change]
    answers: list[str]
    tolerance: float
    by_machine: tuple[float, float]
    machine: list[str]

    @property
    def regressed(self) -> bool:
        """Whether something became slower, or a system gives other answers."""
        if self.answers:
            return True
        return any(row.verdict == "slower" for row in self.rows)

    def to_json(self) -> JsonObject:
        return {"schema": "lvr-lite/bench-compare", "version": 1} | asdict(self)


def compare(before: Benchmark, after: Benchmark, tolerance: float = TOLERANCE) -> Comparison:
    """Every latency and stage of every system that both runs have.

    Raises DataError where they have no system in common.
    """
    systems = {system.name: system for system in before.systems}
    pairs = [(systems[s.name], s) for s in after.systems if s.name in systems]
    if not pairs:
        others = ", ".join(system.name for system in after.systems)
        raise DataError(
            f"no system is in both runs: {', '.join(systems)} in one, {others} in the other"
        )
    cases = []
    answers = []
    asked_the_same = before.plan == after.plan
    for first, second in pairs:
        cases += [(first.name, *measure) for measure in _measures(first, second)]
        if asked_the_same and first.output_md5 != second.output_md5:
            answers.append(first.name)
    by_machine = _by_machine(before, after)
    rng = np.random.default_rng(0)
    level = RISK / max(len(cases), 1)
    rows = []
    for system, name, x, y in cases:
        assert x.p50_ms is not None
        assert y.p50_ms is not None
        ratio = float(y.p50_ms / x.p50_ms)
        interval = _interval(
            _by_round(x.samples_ms, before.rounds),
            _by_round(y.samples_ms, after.rounds),
            level,
            rng,
        )
        change = Change(
            system=system,
            measure=name,
            before_ms=x.p50_ms,
            after_ms=y.p50_ms,
            ratio=ratio,
            interval=interval,
            verdict=_verdict(ratio, interval, tolerance, by_machine),
        )
        rows.append(change)
    return Comparison(
        rows=rows,
        answers=answers,
        tolerance=tolerance,
        by_machine=by_machine,
        machine=_machine_notes(before, after),
    )


def _verdict(
    ratio: float,
    interval: tuple[float, float],
    tolerance: float,
    by_machine: tuple[float, float],
) -> str:
    """Of a ratio of medians: "same" unless all of its interval, and the ratio by more than the
    tolerance, lie beyond what the machine alone makes of it.
    """
    low, high = interval
    least, most = by_machine
    above = min(low, ratio / (1 + tolerance)) > most
    below = max(high, ratio * (1 + tolerance)) < least
    if not above and not below:
        return "same"
    return "slower" if ratio > 1 else "faster"


def _by_machine(before: Benchmark, after: Benchmark) -> tuple[float, float]:
    """The least and the most that a ratio may be by the machine alone."""
    ratios = [1.0, before.bandwidth_gb_s / after.bandwidth_gb_s]
    first = _core_ms(before)
    second = _core_ms(after)
    if first and second:
        ratios.append(second / first)
    return min(ratios), max(ratios)


def _measures(a: SystemResult, b: SystemResult) -> Iterator[tuple[str, Summary, Summary]]:
    """(name, summary in one, summary in the other) of what both measured and can be compared.

    Not stages below SHORTEST_MS, which vary between processes with memory layout, and not those
    that take so little of a request that nobody would notice a change. `latent_step` is the latency
    `tpls`.
    """
    large = [name for name in STAGES if max(_share(a, name), _share(b, name)) >= SHARE]
    cases = [
        *((name, a.latencies[name], b.latencies[name]) for name in LATENCIES),
        *((name, a.stages[name], b.stages[name]) for name in large if name != "latent_step"),
    ]
    for name, x, y in cases:
        medians = [summary.p50_ms for summary in (x, y) if summary.p50_ms is not None]
        if len(medians) == 2 and min(medians) >= SHORTEST_MS:
            yield name, x, y


def _share(system: SystemResult, stage: str) -> float:
    """What a stage takes of a request; 1 where that is not known."""
    spent = system.request_ms.get(stage)
    whole = system.latencies["end_to_end"].p50_ms
    if spent is None or not whole:
        return 1.0
    return float(spent / whole)


def _by_round(samples: list[float], rounds: int) -> np.ndarray:
    """The median of each round's samples, where rounds have equally many."""
    values = np.array(samples)
    if len(values) % rounds:
        return values
    by_round = values.reshape(rounds, -1)
    return np.asarray(np.median(by_round, axis=1))


def _interval(
    first: np.ndarray,
    second: np.ndarray,
    level: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Of the ratio of medians, second over first, at 1 - level."""
    before = _drawn_medians(first, rng)
    after = _drawn_medians(second, rng)
    low, high = np.quantile(after / before, [level / 2, 1 - level / 2])
    return float(low), float(high)


def _drawn_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS,): the medians of as many stretches of rounds as there are, drawn again and again."""
    rounds = max(1, len(values) // STRETCHES)
    rest = len(values) % rounds
    stretches = values[rest:].reshape(-1, rounds)
    count = len(stretches)
    drawn = stretches[rng.integers(0, count, (DRAWS, count))]
    return np.asarray(np.median(drawn.reshape(DRAWS, -1), axis=1))


def _core_ms(run: Benchmark) -> float | None:
    """Median ms of `machine.read_compute`; None in files of older releases, which took another
    computation.
    """
    if not run.core_ms:
        return None
    return float(np.median(run.core_ms))


def _machine_notes(before: Benchmark, after: Benchmark) -> list[str]:
    facts = [
        (name, before.machine.get(name), after.machine.get(name))
        for name in ("cpu", "threads", "governor", "packages")
    ]
    facts.append(("plan", before.plan, after.plan))
    notes = [
        f"{name}: {first} in one run, {second} in the other"
        for name, first, second in facts
        if first != second
    ]
    notes.append(
        f"memory read at {before.bandwidth_gb_s:.1f} GB/s in one run, "
        f"{after.bandwidth_gb_s:.1f} in the other"
    )
    first = _core_ms(before)
    second = _core_ms(after)
    if first and second:
        notes.append(
            f"a fixed computation took {first:.2f} ms in one run, {second:.2f} in the other"
        )
    return notes


def show(comparison: Comparison, console: Console) -> None:
    table = Table("system", "measure", title="medians, ms", title_justify="left")
    for title in ("before", "after", "ratio", "interval", ""):
        table.add_column(title, justify="right")
    for row in comparison.rows:
        table.add_row(
            row.system,
            LATENCIES.get(row.measure, row.measure),
            f"{row.before_ms:.2f}",
            f"{row.after_ms:.2f}",
            f"{row.ratio:.3f}",
            f"{row.interval[0]:.2f} … {row.interval[1]:.2f}",
            f"[{COLOURS[row.verdict]}]{row.verdict}[/]",
        )
    console.print(table)
    for note in comparison.machine:
        console.print(note, highlight=False)
    for name in comparison.answers:
        console.print(f"[red]{name} gives other answers than before[/]", highlight=False)
    count = sum(row.verdict != "same" for row in comparison.rows)
    console.print(
        f"{count or 'nothing'} of {len(comparison.rows)} changed by more than "
        f"{comparison.tolerance:.0%} beyond noise and the machine's speed",
        highlight=False,
    )
