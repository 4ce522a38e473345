"""Measures the rivals: see the package's docstring."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from lvr_lite.bench import machine
from lvr_lite.bench.experiments import rivals
from lvr_lite.bench.experiments.rivals.builders import build, choose, installed
from lvr_lite.bench.experiments.rivals.runtimes import RIVALS, ROOM
from lvr_lite.bench.experiments.rivals.worker import Ended, Process
from lvr_lite.bench.experiments.runner import (
    Names,
    Out,
    Page,
    Rounds,
    launch,
    publish,
    table,
    write_json,
)

WARMUP_STEPS = 4
TITLES = (
    "",
    "version",
    "a token, ms",
    "ours / theirs",
    "prefill, ms",
    "ours / theirs",
    "peak RSS, MiB",
    "computes in",
)


@dataclass
class Measured:
    """A rival's times over all rounds, in ms, and its peak RSS in MiB."""

    computes: str
    version: str | None
    prefill_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    peak_rss_mb: float | None = None

    def cells(self, name: str, ours: Measured | None) -> list[object]:
        """A row of the table. ours: lvr-lite's times."""
        cells: list[object] = [name, self.version]
        for key, form in (("step_ms", ".1f"), ("prefill_ms", ".0f")):
            median = statistics.median(getattr(self, key))
            reference = 0.0
            if ours is not None:
                reference = statistics.median(getattr(ours, key))
            cells += [format(median, form), f"{reference / median:.2f}"]
        return [*cells, f"{self.peak_rss_mb or 0:.0f}", self.computes]


class Contest:
    """Rivals that take turns."""

    def __init__(self, names: list[str], out: Path, threads: int) -> None:
        self.threads = threads
        self.measured: dict[str, Measured] = {}
        # {name: why}.
        self.left_out: dict[str, str] = {}
        # GB/s, before the first round and after each.
        self.bandwidth: list[float] = []
        self._processes = {name: Process(name, out, threads) for name in names}

    def warm_up(self, past: int) -> None:
        """Wait until all have loaded; those whose process ends are left out."""
        for name in self._processes:
            self._warm_up(name, past)

    def _warm_up(self, name: str, past: int) -> None:
        process = self._processes[name]
        try:
            computes = process.computes()
            process.turn(past, WARMUP_STEPS)
        except Ended as error:
            self.left_out[name] = str(error)
            print(f"{name}: left out, {error}", file=sys.stderr)
            return
        self.measured[name] = Measured(computes, installed(RIVALS[name].package))

    def run(self, rounds: int, past: int, steps: int) -> None:
        names = list(self.measured)
        order = random.Random(0)
        self.bandwidth.append(machine.read_bandwidth(self.threads))
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                # Threads of the one before stop spinning.
                time.sleep(0.2)
                turn = self._processes[name].turn(past, steps)
                measured = self.measured[name]
                measured.prefill_ms.append(turn.prefill_ms)
                measured.step_ms += turn.step_ms
                measured.peak_rss_mb = turn.peak_rss_mb
            self.bandwidth.append(machine.read_bandwidth(self.threads))

    def end(self) -> None:
        for process in self._processes.values():
            process.end()

    def report(self, card: dict[str, Any], conditions: str) -> str:
        """The table, under a line about the machine."""
        speeds = self.bandwidth
        speed = f"{np.median(speeds):.1f} GB/s ({min(speeds):.1f} to {max(speeds):.1f})"
        cores = f"{self.threads} of {card['cores']} cores, {card['memory_gib']:.0f} GiB"
        software = f"{card['os']}, Python {card['python']}, {card['date']}, commit {card['commit']}"
        heading = f"{card['cpu']}, {cores}, {software}; {conditions}; memory read at {speed}:"
        ours = self.measured.get("lvr-lite")
        rows: list[Sequence[object]] = [
            measured.cells(name, ours) for name, measured in self.measured.items()
        ]
        notes = [f"Left out: {name}, {why}" for name, why in self.left_out.items()]
        return "\n".join([heading, "", table(TITLES, rows), "", *notes]).strip()


def main(
    out: Out,
    only: Names = None,
    without: Names = None,
    rounds: Rounds = 12,
    threads: int = 2,
    past: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 300,
    steps: Annotated[int, typer.Option(min=1, max=ROOM - 8, help="Tokens of each round.")] = 24,
    page: Page = None,
) -> None:
    packages = {name: entry.package for name, entry in RIVALS.items()}
    names = choose(packages, only, without, out)
    out.mkdir(parents=True, exist_ok=True)
    build(out, names)
    contest = Contest(names, out, threads)
    contest.warm_up(past)
    contest.run(rounds, past, steps)
    contest.end()
    card = machine.card(threads)
    results = {
        "machine": card,
        "bandwidth_gb_s": contest.bandwidth,
        "past": past,
        "rivals": contest.measured,
        "left_out": contest.left_out,
    }
    write_json(out / f"rivals-{past}.json", results)
    report = contest.report(card, f"{rounds} rounds of {steps} tokens after {past}")
    print(report)
    publish(report, page, f"rivals --past {past}")


if __name__ == "__main__":
    launch(main, rivals.__doc__)
