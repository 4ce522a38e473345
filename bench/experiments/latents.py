"""`make results-latents`: every method, three seeds, the same data and steps; then eval and probe
on the exported int8 bundles.

    python docs/results/latents.py --out build/latents [--jobs 2] [--seeds 0,1,2] [--n 2000] [--set train.steps=…]

Runs the commands as a user would, `--jobs` at a time with one thread each, and goes on where an
earlier call stopped: what has its JSON is not made again. Writes docs/results/latents.json (all
figures) and, from it, docs/results/latents.md and its pictures (latents_page.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lvr_lite.eval.suite import versus

ROOT = Path(__file__).resolve().parents[2]
METHODS = (
    "sft",
    "lvr-bottleneck",
    "dummy",
    "lvr",
    "lvr-free",
    "lvr-bottleneck-untargeted",
)  # the most telling first
CONTROLS = ("sft", "dummy")
SKILLS = 600  # questions outside the suite
# probed in full; the others by the interventions that the bars are about, on half of the questions
DEFAULT = "lvr-bottleneck"
TELLING = "noise,donor_unrelated,donor_same_question,self"
STAGES = ("train", "eval", "probe")


def command(line: list[str], log: Path) -> None:
    """One command of lvr-lite on one thread, its output appended to `log`; stops the whole run
    where it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as out:
        out.write(f"$ lvr-lite {' '.join(line)}\n")
        out.flush()
        code = subprocess.run(
            [sys.executable, "-m", "lvr_lite", *line],
            stdout=out,
            stderr=out,
            env=environment,
            check=False,
        ).returncode
    if code != 0:
        raise SystemExit(f"lvr-lite {' '.join(line)} ended with {code}; see {log}")


def whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def train(out: Path, method: str, seed: int, overrides: list[str]) -> None:
    """Tune one model and export it."""
    here = out / f"{method}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    log, tuned = here / "log.txt", here / "checkpoint"
    if not whole(here / "finetune.json"):
        shutil.rmtree(tuned, ignore_errors=True)
        # evaluation while training is not looked at here
        settings = [
            f"data.seed={seed}",
            f"train.seed={seed}",
            "train.eval_every=500",
            "data.eval_count=16",
            *overrides,
        ]
        line = [
            "finetune",
            "--model",
            "tiny",
            "--data",
            "scenes",
            "--out",
            str(tuned),
            "--json",
            str(here / "finetune.json"),
        ]
        recipe = ROOT / "configs" / "methods" / f"{method}.yaml"
        command(
            [*line, "--config", str(recipe), *(part for s in settings for part in ("--set", s))],
            log,
        )
    if not (here / "int8" / "lvr.json").is_file():
        command(["export", str(tuned), str(here / "int8"), "--precision", "int8"], log)


def score(out: Path, method: str, seed: int, n: int) -> None:
    """Accuracy and skills of one bundle."""
    here = out / f"{method}-{seed}"
    if whole(here / "eval.json") or not (here / "int8" / "lvr.json").is_file():
        return
    line = [
        "eval",
        str(here / "int8"),
        "--seed",
        str(seed),
        "--limit",
        str(n),
        "--threads",
        "1",
        "--skills",
        str(SKILLS),
    ]
    command([*line, "--json", str(here / "eval.json")], here / "log.txt")


def probe(out: Path, method: str, seed: int, n: int, only: str | None) -> None:
    """The interventions on one bundle's latents: `only` some, or for the default method all and for
    the others the telling ones.
    """
    here = out / f"{method}-{seed}"
    if method == "sft" or whole(here / "probe.json") or not (here / "int8" / "lvr.json").is_file():
        return
    only = only or (None if method == DEFAULT else TELLING)
    n = n if method == DEFAULT else n // 2
    line = [
        "probe",
        str(here / "int8"),
        "--seed",
        str(seed),
        "--limit",
        str(n),
        "--threads",
        "1",
        *(["--only", only] if only else []),
    ]
    command(
        [*line, "--json", str(here / "probe.json"), "--html", str(here / "probe.html")],
        here / "log.txt",
    )


def base(out: Path, seed: int, n: int) -> None:
    """The model before tuning, on the same questions."""
    (out / "tiny").mkdir(parents=True, exist_ok=True)
    if not (out / "tiny" / "int8" / "lvr.json").is_file():
        command(
            ["export", "tiny", str(out / "tiny" / "int8"), "--precision", "int8"],
            out / "tiny" / "log.txt",
        )
    if not whole(out / "tiny" / f"eval-{seed}.json"):
        scenes = ["--seed", str(seed), "--limit", str(n), "--threads", "1", "--skills", str(SKILLS)]
        command(
            [
                "eval",
                str(out / "tiny" / "int8"),
                *scenes,
                "--json",
                str(out / "tiny" / f"eval-{seed}.json"),
            ],
            out / "tiny" / "log.txt",
        )


def collect(out: Path, methods: list[str], seeds: list[int]) -> dict[str, Any]:
    """All figures of all runs, without the answers; each run compared with the base and the
    controls of its seed, item by item.
    """

    def read(path: Path) -> dict[str, Any]:
        return dict(json.loads(path.read_text()))

    def without_answers(data: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in data.items() if k not in ("answers", "items", "history")}
        return kept | ({"skills": without_answers(kept["skills"])} if kept.get("skills") else {})

    runs = []
    for method, seed in [(m, s) for m in methods for s in seeds]:
        here = out / f"{method}-{seed}"
        if not whole(here / "eval.json"):
            continue  # not run (yet)
        scored = read(here / "eval.json")
        others = {"base": out / "tiny" / f"eval-{seed}.json"} | {
            c: out / f"{c}-{seed}" / "eval.json" for c in CONTROLS if c != method
        }
        against = {name: versus(scored, read(path)) for name, path in others.items() if whole(path)}
        parts = {
            name: without_answers(read(here / f"{name}.json"))
            for name in ("finetune", "probe")
            if whole(here / f"{name}.json")
        }
        runs.append(
            {"method": method, "seed": seed, "eval": without_answers(scored), "against": against}
            | parts
        )
    return {
        "base": {seed: without_answers(read(out / "tiny" / f"eval-{seed}.json")) for seed in seeds},
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "latents")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument(
        "--n",
        type=int,
        default=2400,
        help="questions; of so many about 2,100 have boxes, and their latents are probed",
    )
    parser.add_argument(
        "--only",
        help=f"interventions, as for probe; by default all for {DEFAULT}, and {TELLING} for the others",
    )
    parser.add_argument(
        "--set", action="append", default=[], help="as for finetune, for all methods"
    )
    a = parser.parse_args()
    seeds, methods = [int(s) for s in a.seeds.split(",")], a.methods.split(",")
    jobs = [(m, s) for m in METHODS if m in methods for s in seeds]
    stages = a.stages.split(",")

    def job(method: str, seed: int) -> None:
        if "train" in stages:
            train(a.out, method, seed, a.set)
        if "eval" in stages:
            score(a.out, method, seed, a.n)
        if "probe" in stages:
            probe(a.out, method, seed, a.n, a.only)

    with ThreadPoolExecutor(a.jobs) as pool:
        if "eval" in stages:
            base(a.out, seeds[0], a.n)  # alone, for it writes the bundle that the others read
            list(pool.map(lambda s: base(a.out, s, a.n), seeds[1:]))
        list(pool.map(lambda pair: job(*pair), jobs))
    if stages[-1] == STAGES[-1]:
        results = Path(__file__).with_suffix(".json")
        results.write_text(json.dumps(collect(a.out, methods, seeds), indent=1))
        from latents_page import write

        write(results)


if __name__ == "__main__":
    main()
