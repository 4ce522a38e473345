"""What a large data file costs in memory: peak RSS of a short `finetune` on so many lines. About 12
minutes on two cores.

    python -m lvr_lite.bench.experiments.large_set --out build/large --lines 1000,1000000

All lines name the same few pictures, each with an id, a question and a box of its own; two steps of
four samples, one worker.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from lvr_lite.bench.experiments.runner import Out, header, launch, overrides, read_json, row, run
from lvr_lite.toy.make import scene_samples

PICTURES = 100
SETTINGS = (
    "data.replay=null",
    "data.eval_count=4",
    "train.steps=2",
    "train.batch=4",
    "train.eval_every=2",
    "train.save_every=2",
    "train.workers=1",
)


def write(path: Path, lines: int) -> None:
    """A data file of so many lines, its pictures in `images` beside it."""
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for i, (sample, picture) in enumerate(scene_samples(PICTURES, 0, "train")):
        picture.save(images / f"{i}.png")
        samples.append(sample)
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for n in range(lines):
            sample = samples[n % PICTURES]
            left, top = np.round(rng.random(2) * 0.5, 4)
            line = {
                "id": f"sample-number-{n:09d}",
                "image": f"images/{n % PICTURES}.png",
                "question": f"{sample.question} {n}",
                "answer": sample.answer,
                "boxes": [[left, top, 0.9, 0.9]],
            }
            file.write(json.dumps(line) + "\n")


def finetune(out: Path, data: Path) -> float:
    """Peak RSS of a short training, in MiB."""
    tuned = out / f"tuned-{data.stem}-{time.time():.0f}"
    report = tuned.with_suffix(".json")
    # Of the large file's own pictures ten thousand questions each would be held out.
    settings = overrides(*SETTINGS, f"data.eval_file={out / 'held-out.jsonl'}")
    source = ("finetune", "--model", "tiny", "--data", data, *settings)
    run(
        *source,
        "--out",
        tuned,
        "--json",
        report,
        log=out / "log.txt",
    )
    return float(read_json(report)["peak_memory_gb"]) * 1024


def main(
    out: Out,
    lines: str = "1000,1000000",
) -> None:
    write(out / "held-out.jsonl", 4)
    print(header(["lines", "file, MB", "peak RSS, MiB", "seconds"]))
    peaks = []
    for count in map(int, lines.split(",")):
        path = out / f"{count}.jsonl"
        if not path.is_file():
            write(path, count)
        began = time.time()
        peaks.append(finetune(out, path))
        size = path.stat().st_size / 1e6
        cells = [f"{count:,}", f"{size:.1f}", f"{peaks[-1]:.0f}", f"{time.time() - began:.0f}"]
        print(row(cells), flush=True)
    print(f"the last takes {peaks[-1] - peaks[0]:.0f} MiB more than the first")


if __name__ == "__main__":
    launch(main, __doc__)
