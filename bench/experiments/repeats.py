"""Does `bench` say the same twice? A bundle measured again and again, and every run compared with
the one before it.

    python docs/results/repeats.py BUNDLE --out build/repeats [--tries 20]

Nothing else should run meanwhile; 20 tries take seven minutes with the embedded model on 2 cores,
and go on where they stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from lvr_lite.bench.compare import compare
from lvr_lite.bench.report import read


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("bundle", type=Path)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--tries", type=int, default=20)
    options.add_argument(
        "--runs", type=int, help="as of `bench`, which goes on for 15 seconds by default"
    )
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = [given.out / f"{i:02}.json" for i in range(given.tries + 1)]
    silent = near = 0
    for i, file in enumerate(files):
        if not file.is_file():
            runs = [] if given.runs is None else ["--runs", str(given.runs)]
            line = [
                sys.executable,
                "-m",
                "lvr_lite",
                "bench",
                str(given.bundle),
                *runs,
                "--json",
                str(file),
            ]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if i == 0:
            continue
        found = compare(read(files[i - 1]), read(file))
        worst = max(found["rows"], key=lambda row: max(row["ratio"], 1 / row["ratio"]))
        changed = [row["measure"] for row in found["rows"] if row["verdict"] != "same"]
        silent, near = (
            silent + (not changed),
            near + (max(worst["ratio"], 1 / worst["ratio"]) <= 1.05),
        )
        said = f"changed: {', '.join(changed)}" if changed else "no change"
        print(
            f"{i}: {said}; largest ratio {worst['ratio']:.3f} ({worst['measure']}); tolerance {found['tolerance']:.1%}",
            flush=True,
        )
    print(f"{silent} of {given.tries} report no change; every median within 5 % in {near}")


if __name__ == "__main__":
    main()
