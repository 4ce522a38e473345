"""Does `bench` report the same twice? A bundle measured again and again, and every run compared
with the one before it.

    python -m lvr_lite.bench.experiments.repeats BUNDLE --out build/repeats --tries 20

Nothing else should run meanwhile; 20 tries take seven minutes with the embedded model on two cores,
and go on where they stopped. --runs is that of `bench`, which goes on for 15 seconds by default.
"""

from __future__ import annotations

from pathlib import Path

from lvr_lite.bench.compare import compare
from lvr_lite.bench.experiments.runner import Out, launch, once
from lvr_lite.bench.record import read


def main(
    bundle: Path,
    out: Out,
    tries: int = 20,
    runs: int | None = None,
) -> None:
    rounds = [] if runs is None else ["--runs", runs]
    unchanged = near = 0
    for i in range(tries + 1):
        file = out / f"{i:02}.json"
        once(
            file,
            "bench",
            bundle,
            *rounds,
            "--json",
            file,
            log=out / "log.txt",
        )
        if i == 0:
            continue
        comparison = compare(read(out / f"{i - 1:02}.json"), read(file))
        distances = {row.measure: max(row.ratio, 1 / row.ratio) for row in comparison.rows}
        farthest = max(distances, key=distances.__getitem__)
        changed = [row.measure for row in comparison.rows if row.verdict != "same"]
        unchanged += not changed
        near += distances[farthest] <= 1.05
        verdict = "no change"
        if changed:
            verdict = f"changed: {', '.join(changed)}"
        print(
            f"{i}: {verdict}; farthest by {distances[farthest]:.3f} ({farthest}); "
            f"tolerance {comparison.tolerance:.1%}",
            flush=True,
        )
    print(f"{unchanged} of {tries} report no change; every median within 5 % in {near}")


if __name__ == "__main__":
    launch(main, __doc__)
