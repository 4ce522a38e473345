"""kill -9 at random moments: does anything broken stay?

.venv/bin/python docs/results/kill.py demo-out/checkpoint demo-out/fp32 --tries 8
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lvr_lite.model.bundle import read_manifest
from lvr_lite.train.finetune import last_whole_checkpoint

LVR = [sys.executable, "-m", "lvr_lite"]


def killed_after(command: list[str], seconds: float) -> bool:
    """Start a command and kill it; False where it had ended by itself."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def bundles(name: str, command: list[str], target: Path, longest: float, tries: int) -> None:
    """After each kill the target is absent or a whole bundle; at the end the command, undisturbed,
    leaves no temporary folder.
    """
    kills = 0
    for _ in range(tries):
        kills += killed_after(command, random.uniform(0.3, longest))
        if target.exists():
            read_manifest(target)  # raises where a file is missing or changed
    subprocess.run(command, check=True, capture_output=True)
    read_manifest(target)
    left = [p.name for p in target.parent.iterdir() if p != target]
    print(
        f"{name}: {kills} of {tries} runs killed, no broken bundle; left beside it after a whole run: {left or 'nothing'}"
    )


def training(out: Path, tries: int) -> None:
    """After each kill the run goes on from a whole checkpoint, at most one interval (and the step
    under way) behind.
    """
    command = [
        *LVR,
        "finetune",
        "--model",
        "tiny",
        "--data",
        "scenes",
        "--out",
        str(out),
        "--set",
        "data.count=400",
        "--set",
        "train.steps=60",
    ]
    command += [
        "--set",
        "train.save_every=5",
        "--set",
        "train.eval_every=60",
        "--set",
        "train.batch=4",
        "--set",
        "data.eval_count=4",
    ]
    reached = 0
    for number in range(tries):
        resume = ["--resume"] if out.is_dir() and last_whole_checkpoint(out) else []
        if not resume and out.exists():
            subprocess.run(["rm", "-r", str(out)], check=True)
        killed = killed_after(command + resume, random.uniform(6, 11))
        last = last_whole_checkpoint(out) if out.is_dir() else None
        step = int(last.name.split("-")[1]) if last else 0
        assert step >= reached, f"went back from step {reached} to {step}"
        reached = step
        print(
            f"finetune, try {number + 1}: {'killed' if killed else 'ended'}, last whole checkpoint at step {step}"
        )
        if not killed:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("fp32")
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    random.seed(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").mkdir()
        (Path(folder) / "b").mkdir()
        began = time.time()
        target = Path(folder) / "a" / "int8"
        bundles("export", [*LVR, "export", a.checkpoint, str(target)], target, 20, a.tries)
        target = Path(folder) / "b" / "int4"
        bundles(
            "quantize",
            [*LVR, "quantize", a.fp32, str(target), "--precision", "int4"],
            target,
            3,
            a.tries,
        )
        training(Path(folder) / "run", 6)
        print(f"{(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
