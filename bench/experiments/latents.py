"""What the latents are worth: every method of training, three seeds, the same data and steps; then
`eval` and `probe` on the exported int8 bundles. About two hours on two cores.

    python -m lvr_lite.bench.experiments.latents --out build/latents
    python -m lvr_lite.bench.experiments.latents --seeds 0 --methods sft,lvr --set train.steps=60

--n is of questions; of 2,400 about 2,100 have boxes, and are probed. --only chooses interventions;
by default all for the default method, the telling ones for the others. --set is that of `finetune`.
Goes on where an earlier call stopped: what has its JSON is not made again. Writes
docs/results/latents.json (all figures) and, from it, docs/results/latents.md and its pictures
(latents_page).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lvr_lite.bench.experiments import latents_page, tiny
from lvr_lite.bench.experiments.runner import (
    CORES,
    RESULTS,
    Jobs,
    JsonObject,
    Out,
    Seeds,
    Settings,
    in_parallel,
    is_whole,
    launch,
    read_json,
    write_results,
)
from lvr_lite.eval.comparing import versus

# The most telling first.
METHODS = ("sft", "lvr-bottleneck", "dummy", "lvr", "lvr-free", "lvr-bottleneck-untargeted")
CONTROLS = ("sft", "dummy")
# Questions outside the suite.
SKILLS = 600
# Probed in full; the others by the telling interventions, on half of the questions.
DEFAULT = "lvr-bottleneck"
TELLING = "noise,donor_unrelated,donor_same_question,self"
STAGES = ("train", "eval", "probe")


def base(out: Path, seed: int, questions: int) -> None:
    """Accuracy of the model before tuning, on the same questions."""
    bundle = out / "tiny" / "int8"
    tiny.export("tiny", bundle)
    report = out / "tiny" / f"eval-{seed}.json"
    tiny.evaluate(bundle, report, questions, SKILLS, "--seed", seed)


def train(
    folder: Path,
    method: str,
    seed: int,
    settings: list[str],
) -> None:
    checkpoint = folder / "checkpoint"
    seeds = (f"data.seed={seed}", f"train.seed={seed}")
    # Evaluation while training is not looked at.
    quiet = ("train.eval_every=500", "data.eval_count=16")
    tiny.finetune(checkpoint, folder / "finetune.json", method, *seeds, *quiet, *settings)
    tiny.export(checkpoint, folder / "int8")


def probe(
    folder: Path,
    method: str,
    seed: int,
    questions: int,
    only: str | None,
) -> None:
    if method != DEFAULT:
        questions //= 2
        only = only or TELLING
    more = ("--seed", seed, "--html", folder / "probe.html")
    tiny.probe(folder / "int8", folder / "probe.json", questions, only, *more)


def collect(out: Path, methods: list[str], seeds: list[int]) -> JsonObject:
    """All figures of all runs, without the answers; each run compared with the base and the
    controls of its seed, item by item.

    Returns {"base": {seed: figures}, "runs": [{"method", "seed", "eval", "against": {control:
    difference}, "finetune", "probe"}]}; what has not run (yet) is left out.
    """
    runs = []
    for method, seed in [(method, seed) for method in methods for seed in seeds]:
        folder = out / f"{method}-{seed}"
        if not is_whole(folder / "eval.json"):
            continue
        scores = read_json(folder / "eval.json")
        references = {"base": out / "tiny" / f"eval-{seed}.json"}
        for control in CONTROLS:
            if control != method:
                references[control] = out / f"{control}-{seed}" / "eval.json"
        run: JsonObject = {"method": method, "seed": seed, "eval": _without_answers(scores)}
        run["against"] = {
            name: versus(scores, read_json(path))
            for name, path in references.items()
            if is_whole(path)
        }
        for part in ("finetune", "probe"):
            if is_whole(folder / f"{part}.json"):
                run[part] = _without_answers(read_json(folder / f"{part}.json"))
        runs.append(run)
    before = {
        str(seed): _without_answers(read_json(out / "tiny" / f"eval-{seed}.json")) for seed in seeds
    }
    return {"base": before, "runs": runs}


def _without_answers(report: Any) -> JsonObject:
    figures = {
        name: value for name, value in report.items() if name not in ("answers", "items", "history")
    }
    if figures.get("skills"):
        figures["skills"] = _without_answers(figures["skills"])
    return figures


def job(
    out: Path,
    method: str,
    seed: int,
    questions: int,
    only: str | None,
    stages: list[str],
    settings: list[str],
) -> None:
    """The stages of one model."""
    folder = out / f"{method}-{seed}"
    if "train" in stages:
        train(folder, method, seed, settings)
    if not is_whole(folder / "int8" / "lvr.json"):
        return
    if "eval" in stages:
        report = folder / "eval.json"
        tiny.evaluate(folder / "int8", report, questions, SKILLS, "--seed", seed)
    if "probe" in stages and method != "sft":
        probe(folder, method, seed, questions, only)


def main(
    out: Out = Path("build/latents"),
    jobs: Jobs = CORES,
    seeds: Seeds = "0,1,2",
    methods: str = ",".join(METHODS),
    stages: str = ",".join(STAGES),
    n: int = 2400,
    only: str | None = None,
    settings: Settings = None,
) -> None:
    numbers = [int(seed) for seed in seeds.split(",")]
    chosen = [method for method in METHODS if method in methods.split(",")]
    wanted = stages.split(",")
    if "eval" in wanted:
        # The first one alone, for it writes the bundle that the others read.
        base(out, numbers[0], n)
        in_parallel(jobs, base, [(out, seed, n) for seed in numbers[1:]])
    more = (n, only, wanted, settings or [])
    cases = [(out, method, seed, *more) for method in chosen for seed in numbers]
    in_parallel(jobs, job, cases)
    if wanted[-1] == STAGES[-1]:
        results = RESULTS / "latents.json"
        write_results(results, collect(out, methods.split(","), numbers))
        latents_page.write(results)


if __name__ == "__main__":
    launch(main, __doc__)
