"""kill -9 at random moments: does anything broken stay?

python -m lvr_lite.bench.experiments.kill demo-out/checkpoint demo-out/fp32 --tries 8
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from lvr_lite.bench.experiments.runner import command, launch, overrides, run
from lvr_lite.model.bundle import Bundle
from lvr_lite.train.run_folder import last_whole_checkpoint

RUNS_OF_TRAINING = 6
SETTINGS = (
    "data.count=400",
    "data.eval_count=4",
    "train.steps=60",
    "train.save_every=5",
    "train.eval_every=60",
    "train.batch=4",
)


def is_killed(arguments: list[object], seconds: float) -> bool:
    """Start a command and kill it after so long; False where it had ended by itself."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def write_bundles(target: Path, longest: float, tries: int, *arguments: object) -> None:
    """After each kill the target is absent or a whole bundle; at the end the command, undisturbed,
    leaves no temporary folder.
    """
    kills = 0
    for _ in range(tries):
        kills += is_killed([*arguments], random.uniform(0.3, longest))
        if target.exists():
            # Raises where a file is missing or changed.
            Bundle.open(target)
    run(*arguments, log=target.parent.with_suffix(".log"))
    Bundle.open(target)
    rest = [path.name for path in target.parent.iterdir() if path != target]
    print(
        f"{arguments[0]}: {kills} of {tries} runs killed, no broken bundle; "
        f"beside it after a whole run: {rest or 'nothing'}"
    )


def train(out: Path) -> None:
    """After each kill the run goes on from a whole checkpoint, at most one interval (and the step
    under way) behind.
    """
    source = ("finetune", "--model", "tiny", "--data", "scenes", "--out", out)
    reached = 0
    for number in range(RUNS_OF_TRAINING):
        arguments = [*source, *overrides(*SETTINGS)]
        if out.is_dir() and last_whole_checkpoint(out):
            arguments.append("--resume")
        else:
            shutil.rmtree(out, ignore_errors=True)
        killed = is_killed(arguments, random.uniform(6, 11))
        last = last_whole_checkpoint(out) if out.is_dir() else None
        step = int(last.name.split("-")[1]) if last else 0
        assert step >= reached, f"went back from step {reached} to {step}"
        reached = step
        end = "killed" if killed else "ended"
        print(f"finetune, try {number + 1}: {end}, last whole checkpoint at step {step}")
        if not killed:
            break


def main(
    checkpoint: Path,
    fp32: Path,
    tries: int = 8,
    seed: int = 0,
) -> None:
    random.seed(seed)
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("export", "quantize"):
            (folder / part).mkdir()
        target = folder / "export" / "int8"
        write_bundles(target, 20, tries, "export", checkpoint, target)
        target = folder / "quantize" / "int4"
        write_bundles(target, 3, tries, "quantize", fp32, target, "--precision", "int4")
        train(folder / "run")
    print(f"{(time.time() - began) / 60:.1f} min")


if __name__ == "__main__":
    launch(main, __doc__)
