"""Random inputs for everything that reads what others wrote: `make fuzz`.

    python -m tests.fuzz --seconds 600                     all kinds in turn
    python -m tests.fuzz --inputs 500 --kinds rewards      one kind
    python -m tests.fuzz --replay build/fuzz/finds/NAME    one find again

What was found is kept in OUT/finds, a folder each with its input, and OUT/fuzz.json has the counts.
Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Before anything that reads them: no threads in the process that forks.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy

from tests.fuzz import originals, watch
from tests.fuzz.actions import act, import_all, warm_up
from tests.fuzz.kinds import KINDS
from tests.fuzz.watch import Case, Verdict, World

# Inputs of a kind before it is the next kind's turn.
BATCH = 25


@dataclass
class Count:
    """Of one kind: inputs, those refused in one line, slowest in seconds, highest peak in MiB."""

    inputs: int = 0
    refused: int = 0
    finds: int = 0
    slowest: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Fuzzing:
    """A run: what was asked, and what came of it."""

    world: World
    finds: Path
    limit: float
    inputs: int
    until: float
    counts: dict[str, Count] = field(default_factory=dict)
    places: Counter[str] = field(default_factory=Counter)
    most: int = 3

    @property
    def total(self) -> int:
        return sum(count.inputs for count in self.counts.values())

    @property
    def over(self) -> bool:
        return self.total >= self.inputs or time.monotonic() > self.until

    def judge(self, kind: str, case: Case) -> None:
        """Run a case, count it, and keep it where it is a find of a new place."""
        if self.over:
            return
        verdict = watch.run(case, self.world, act, self.limit)
        if verdict.find in ("hang", "memory"):
            # Other work on the machine may have held it up.
            verdict = watch.run(case, self.world, act, self.limit)
        count = self.counts.setdefault(kind, Count())
        count.inputs += 1
        count.refused += verdict.refused > 0
        count.slowest = max(count.slowest, verdict.seconds)
        count.peak_mb = max(count.peak_mb, verdict.peak_mb)
        if verdict.find is None:
            return
        count.finds += 1
        place = f"{kind} {verdict.find} {verdict.place}"
        self.places[place] += 1
        if self.places[place] <= self.most:
            self._keep(case, place, verdict)

    def _keep(self, case: Case, place: str, verdict: Verdict) -> None:
        number = self.places[place]
        name = re.sub(r"[^\w.]+", "-", f"{place} {number}")[:120]
        watch.keep(case, self.finds / name, self.world)
        (self.finds / name / "find.txt").write_text(f"{place}\n{verdict.detail}\n")
        if number == 1:
            print(f"FIND {place}\n{verdict.detail.rstrip()}", flush=True)
            print(f"again: python -m tests.fuzz --replay {self.finds / name}\n", flush=True)


def main() -> int:
    options = _options()
    import_all()
    out = options.out.resolve()
    models = (options.models or out / "models").resolve()
    world = World(out / "world", {}, ((models / "checkpoint").resolve(),))
    if options.replay:
        return _replay(options.replay, world, options.limit)
    originals.make_models(models)
    made = originals.make(out / "bases", models, world.root)
    world.bases.update(made.bases)
    warm_up(made.bases, out)
    kinds = options.kinds or list(KINDS)
    print(
        f"seed {options.seed}, {options.seconds:g} s or {options.inputs} inputs, {len(kinds)} kinds"
    )
    began = time.monotonic()
    fuzzing = Fuzzing(world, out / "finds", options.limit, options.inputs, began + options.seconds)
    turn = 0
    while not fuzzing.over:
        for kind in kinds:
            if fuzzing.over:
                break
            _batch(fuzzing, kind, KINDS[kind](made), f"{options.seed} {turn} {kind}", options.batch)
        turn += 1
    seconds = time.monotonic() - began
    _report(fuzzing, out / "fuzz.json", options.seed, seconds)
    return 1 if fuzzing.places else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--inputs", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=BATCH, help="inputs of a kind in a row")
    parser.add_argument("--kinds", type=lambda text: text.split(","), help=", ".join(KINDS))
    parser.add_argument("--limit", type=float, default=watch.SECONDS, help="seconds of a command")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--models", type=Path, help=f"folder with {', '.join(originals.MODELS)}")
    parser.add_argument("--replay", type=Path, help="a folder of a find")
    options = parser.parse_args()
    if unknown := set(options.kinds or ()) - set(KINDS):
        parser.error(f"--kinds {', '.join(unknown)}: must be of {', '.join(KINDS)}")
    return options


def _batch(
    fuzzing: Fuzzing, kind: str, strategy: SearchStrategy[Case], name: str, count: int
) -> None:
    """So many inputs of a kind, the same for the same name."""

    @seeded(zlib.crc32(name.encode()))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def judge(case: Case) -> None:
        fuzzing.judge(kind, case)

    judge()


def _replay(folder: Path, world: World, limit: float) -> int:
    verdict = watch.run(watch.read_kept(folder), world, act, limit)
    log = world.out / "log"
    print(log.read_text(errors="replace") if log.exists() else "", end="")
    print(f"{verdict.find or 'nothing'} {verdict.place}\n{verdict.detail}")
    return 1 if verdict.find else 0


def _report(fuzzing: Fuzzing, path: Path, seed: int, seconds: float) -> None:
    rows = ["| kind | inputs | refused in one line | finds | slowest, s | peak, MiB |"]
    rows.append("|---|---|---|---|---|---|")
    for kind, count in fuzzing.counts.items():
        counts = f"{count.inputs} | {count.refused} | {count.finds}"
        rows.append(f"| {kind} | {counts} | {count.slowest:.1f} | {count.peak_mb:.0f} |")
    print("\n".join(rows))
    print(
        f"{fuzzing.total} inputs in {seconds / 60:.1f} min, {sum(fuzzing.places.values())} finds "
        f"at {len(fuzzing.places)} places; seed {seed}"
    )
    report = {
        "seed": seed,
        "seconds": seconds,
        "inputs": fuzzing.total,
        "kinds": {kind: asdict(count) for kind, count in fuzzing.counts.items()},
        "places": dict(fuzzing.places),
    }
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
