"""Stage 2 on the embedded model: SFT, then GRPO, beside more SFT with as many samples; scored and
probed on held-out scenes. About two hours on two cores.

    python -m lvr_lite.bench.experiments.grpo --out build/grpo

Two starts: `bottleneck` (the default method) and `grounded` (lvr-free: latents grounded in boxes,
the text still sees the picture). On the first seed of the bottleneck also with the latents as
constants (the paper), with the format reward, and with the latent-use reward (--variants). --n is
of questions. Goes on where an earlier call stopped. Writes docs/results/grpo.json and
grpo_curves.png there, and prints the table of grpo.md.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lvr_lite.bench.experiments import tiny
from lvr_lite.bench.experiments.runner import (
    CORES,
    RESULTS,
    Jobs,
    JsonObject,
    Out,
    Seeds,
    in_parallel,
    is_whole,
    launch,
    read_json,
    table,
    write_results,
)
from lvr_lite.eval.comparing import versus

STARTS = {"bottleneck": "lvr-bottleneck", "grounded": "lvr-free"}
SFT_STEPS = 250
SFT_BATCH = 16
GRPO_STEPS = 300
GRPO_BATCH = 32
GRPO_LR = 2e-4
# Steps of SFT over as many samples.
MORE_STEPS = GRPO_STEPS * GRPO_BATCH // SFT_BATCH
VARIANTS = {
    "accuracy": ("grpo.rewards=accuracy=1", "grpo.latents=recomputed"),
    "recorded": ("grpo.rewards=accuracy=1", "grpo.latents=recorded"),
    "with-format": ("grpo.rewards=accuracy=1,format=0.2", "grpo.latents=recomputed"),
    "latent-use": ("grpo.rewards=accuracy=1,latent-use=0.5", "grpo.latents=recomputed"),
}
STYLES = {
    "accuracy": "-",
    "recorded": ":",
    "with-format": "--",
    "latent-use": "-.",
}
INTERVENTIONS = "noise,donor_same_question,self"
# Evaluation while training is not looked at.
QUIET = ("train.eval_every=1000", "data.eval_count=16")


@dataclass(frozen=True)
class Run:
    """A model of one start and seed: "sft", "more" (SFT), or one of VARIANTS.

    minutes, peak_memory_gb: of its training.
    skills: accuracy outside the suite.
    gain, interval: over the start, paired by question, with the 95 % interval.
    flips: share of answers that become the donor's.
    probe: what `probe` reports, without the questions.
    history: metrics of the steps of GRPO.
    """

    start: str
    seed: int
    model: str
    n: int
    accuracy: float
    minutes: float
    peak_memory_gb: float
    by_type: JsonObject
    skills: float | None
    gain: float | None
    interval: tuple[float, float] | None
    flips: float | None
    probe: JsonObject | None
    history: list[dict[str, float]] | None


def sft(
    folder: Path,
    start: str,
    seed: int,
    name: str,
    steps: int,
) -> Path:
    """SFT of so many steps."""
    seeds = (f"data.seed={seed}", f"train.seed={seed}", f"train.steps={steps}")
    report = folder / f"{name}.json"
    tiny.finetune(folder / name, report, STARTS[start], *seeds, *QUIET)
    return folder / name


def grpo(folder: Path, seed: int, name: str) -> Path:
    """GRPO from the SFT, on scenes that it has not seen."""
    settings = [f"data.seed={100 + seed}", f"train.seed={seed}", f"train.steps={GRPO_STEPS}"]
    settings += [f"train.batch={GRPO_BATCH}", f"train.lr={GRPO_LR}", "train.log_every=5"]
    settings += [*QUIET, *VARIANTS[name]]
    tiny.reinforce(folder / name, folder / f"{name}.json", folder / "sft", *settings)
    return folder / name


def score(model: Path, questions: int, probe: bool) -> None:
    """Accuracy of a checkpoint, exported to int8, and what its latents are worth."""
    bundle = model.with_name(f"{model.name}-int8")
    tiny.export(model, bundle)
    tiny.evaluate(bundle, model.with_name(f"{model.name}-eval.json"), questions, 300)
    if probe:
        report = model.with_name(f"{model.name}-probe.json")
        tiny.probe(bundle, report, questions // 4, INTERVENTIONS)


def job(
    out: Path,
    start: str,
    seed: int,
    questions: int,
    variants: bool,
) -> None:
    """All models of one start and seed."""
    folder = out / f"{start}-{seed}"
    first, *others = VARIANTS
    score(sft(folder, start, seed, "sft", SFT_STEPS), questions, True)
    score(grpo(folder, seed, first), questions, True)
    score(sft(folder, start, seed, "more", SFT_STEPS + MORE_STEPS), questions, False)
    for name in others if variants else ():
        score(grpo(folder, seed, name), questions, True)


def collect(out: Path, seeds: list[int]) -> list[Run]:
    """All models that are there."""
    runs = []
    for start, seed in [(start, seed) for start in STARTS for seed in seeds]:
        folder = out / f"{start}-{seed}"
        for name in ("sft", "more", *VARIANTS):
            files = [
                folder / "sft-eval.json",
                folder / f"{name}-eval.json",
                folder / f"{name}.json",
            ]
            if all(map(is_whole, files)):
                runs.append(_run(folder, start, seed, name))
    return runs


def _run(
    folder: Path,
    start: str,
    seed: int,
    name: str,
) -> Run:
    scores = read_json(folder / f"{name}-eval.json")
    training = read_json(folder / f"{name}.json")
    gain: dict[str, Any] = {}
    if name != "sft":
        gain = versus(scores, read_json(folder / "sft-eval.json"))
    probe = flips = None
    if is_whole(folder / f"{name}-probe.json"):
        probe = read_json(folder / f"{name}-probe.json")
        flips = probe["interventions"].get("donor_same_question", {}).get("flips_to_donor")
        probe = {key: value for key, value in probe.items() if key not in ("items", "answers")}
    return Run(
        start=start,
        seed=seed,
        model=name,
        n=scores["n"],
        accuracy=scores["accuracy"],
        minutes=training["minutes"],
        peak_memory_gb=training["peak_memory_gb"],
        by_type=scores["by_type"],
        skills=(scores.get("skills") or {}).get("accuracy"),
        gain=gain.get("difference"),
        interval=gain.get("interval"),
        flips=flips,
        probe=probe,
        history=[step for step in training["history"] if "reward" in step]
        if name in VARIANTS
        else None,
    )


def report(runs: list[Run]) -> str:
    """The table of grpo.md: a row for each start and model, its seeds side by side."""
    titles = "start|model|accuracy, %|gain over the start, points [95 %]|the donor's answer, %"
    rows = []
    for start, name in [(start, name) for start in STARTS for name in ("sft", "more", *VARIANTS)]:
        group = [run for run in runs if (run.start, run.model) == (start, name)]
        if not group:
            continue
        gains = []
        for run in group:
            if run.gain is not None and run.interval is not None:
                low, high = (100 * bound for bound in run.interval)
                gains.append(f"{100 * run.gain:+.1f} [{low:.1f}, {high:.1f}]")
        rows.append(
            [
                start,
                name,
                _percents([run.accuracy for run in group]),
                "; ".join(gains),
                _percents([run.flips for run in group]),
                _percents([run.skills for run in group], 0),
                f"{statistics.fmean(run.minutes for run in group):.1f}",
            ]
        )
    return table([*titles.split("|"), "skills, %", "minutes"], rows)


def _percents(shares: list[float] | list[float | None], digits: int = 1) -> str:
    return " ".join(f"{100 * share:.{digits}f}" for share in shares if share is not None)


def draw(runs: list[Run]) -> Figure:
    """How the rollouts change over the steps."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "accuracy": "right answers",
        "latents": "answers through latents",
        "flat": "questions that teach nothing",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for run in runs:
            if run.history is not None:
                steps = [step["step"] for step in run.history]
                shares = [step[key] for step in run.history]
                color = "tab:orange"
                if run.start == "bottleneck":
                    color = "tab:blue"
                axes.plot(
                    steps,
                    shares,
                    STYLES[run.model],
                    color=color,
                    linewidth=1,
                )
        axes.set(title=title, xlabel="step", ylim=(0, 1))
    panels[0].set_ylabel("share of rollouts")
    legend = (
        "blue: bottleneck, orange: grounded; dotted: latents as constants, "
        "dashed: with the format reward, dash-dotted: for latent use"
    )
    figure.suptitle(legend, fontsize=8)
    return figure


def main(
    out: Out = Path("build/grpo"),
    jobs: Jobs = CORES,
    seeds: Seeds = "0,1,2",
    starts: str = ",".join(STARTS),
    n: int = 2000,
    variants: bool = True,
) -> None:
    numbers = [int(seed) for seed in seeds.split(",")]
    first = ("bottleneck", numbers[0])
    cases = [(start, seed) for seed in numbers for start in starts.split(",")]
    in_parallel(jobs, job, [(out, *case, n, variants and case == first) for case in cases])
    runs = collect(out, numbers)
    write_results(RESULTS / "grpo.json", {"runs": runs})
    draw(runs).savefig(RESULTS / "grpo_curves.png", dpi=110)
    print(report(runs))


if __name__ == "__main__":
    launch(main, __doc__)
