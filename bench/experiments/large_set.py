"""What a large data file costs in memory: peak RSS of a short `finetune` on so many lines.

    python docs/results/large_set.py --out build/large [--lines 1000,1000000]        (about 12 minutes on 2 cores)

All lines name the same few pictures, each with an id, a question and a box of its own; two steps of
four samples, one worker.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lvr_lite.toy.make import scene_samples

PICTURES = 100


def write(path: Path, lines: int) -> None:
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    found = list(scene_samples(PICTURES, 0, "train"))
    for i, (_, picture) in enumerate(found):
        picture.save(path.parent / "images" / f"{i}.png")
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for n in range(lines):
            sample = found[n % PICTURES][0]
            x, y = rng.random(2) * 0.5
            one = {
                "id": f"sample-number-{n:09d}",
                "image": f"images/{n % PICTURES}.png",
                "question": f"{sample.question} {n}",
            }
            file.write(
                json.dumps(
                    one | {"answer": sample.answer, "boxes": [[round(x, 4), round(y, 4), 0.9, 0.9]]}
                )
                + "\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lines", default="1000,1000000")
    a = parser.parse_args()
    peaks = []
    write(
        a.out / "held-out.jsonl", 4
    )  # of the large file's own pictures ten thousand questions each would be held out
    print("| lines | file, MB | peak RSS, MiB | seconds |\n|---|---|---|---|")
    for lines in map(int, a.lines.split(",")):
        path, tuned = a.out / f"{lines}.jsonl", a.out / f"tuned-{lines}-{time.time():.0f}"
        if not path.is_file():
            write(path, lines)
        began = time.time()
        settings = [
            "train.steps=2",
            "train.batch=4",
            "train.eval_every=2",
            "train.save_every=2",
            "train.workers=1",
        ]
        settings += [
            "data.replay=null",
            "data.eval_count=4",
            f"data.eval_file={a.out / 'held-out.jsonl'}",
        ]
        command = [
            sys.executable,
            "-m",
            "lvr_lite",
            "finetune",
            "--model",
            "tiny",
            "--data",
            str(path),
            "--out",
            str(tuned),
        ]
        command += [part for s in settings for part in ("--set", s)] + [
            "--json",
            str(tuned) + ".json",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peaks.append(json.loads(Path(str(tuned) + ".json").read_text())["peak_memory_gb"] * 1024)
        print(
            f"| {lines:,} | {path.stat().st_size / 1e6:.1f} | {peaks[-1]:.0f} | {time.time() - began:.0f} |",
            flush=True,
        )
    print(f"the last takes {peaks[-1] - peaks[0]:.0f} MiB more than the first")


if __name__ == "__main__":
    main()
