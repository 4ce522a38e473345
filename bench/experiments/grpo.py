"""Stage 2 on the embedded model: SFT, then GRPO, beside more SFT with as many samples; scored and
probed on held-out scenes.

    python docs/results/grpo.py --out build/grpo [--jobs 2] [--seeds 0,1,2] [--n 2000]

Two starts: `bottleneck` (the default method) and `grounded` (lvr-free: latents grounded in boxes,
text still sees the picture). On the first seed of the bottleneck also with the latents as constants
(the paper), with the format reward, and with the latent-use reward. Runs the commands as a user
would, one thread each, and goes on where an earlier call stopped. Writes docs/results/grpo.json and
grpo_curves.png there, and prints the table of grpo.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from latents import command, whole

from lvr_lite.eval.suite import versus

ROOT = Path(__file__).resolve().parents[2]
STARTS = {"bottleneck": "lvr-bottleneck", "grounded": "lvr-free"}
SFT_STEPS, SFT_BATCH = 250, 16
GRPO_STEPS, GRPO_BATCH, GRPO_LR = 300, 32, 2e-4
MORE = GRPO_STEPS * GRPO_BATCH // SFT_BATCH  # steps of SFT over as many samples
VARIANTS = {
    "accuracy": ["grpo.rewards=accuracy=1", "grpo.latents=recomputed"],
    "recorded": ["grpo.rewards=accuracy=1", "grpo.latents=recorded"],
    "with-format": ["grpo.rewards=accuracy=1,format=0.2", "grpo.latents=recomputed"],
    "latent-use": ["grpo.rewards=accuracy=1,latent-use=0.5", "grpo.latents=recomputed"],
}
PROBED = "noise,donor_same_question,self"


def tuned(here: Path, start: str, seed: int, name: str, steps: int) -> Path:
    """SFT of so many steps, whole or made now."""
    out = here / name
    if not whole(here / f"{name}.json"):
        shutil.rmtree(out, ignore_errors=True)
        settings = [
            f"data.seed={seed}",
            f"train.seed={seed}",
            f"train.steps={steps}",
            "train.eval_every=1000",
            "data.eval_count=16",
        ]
        recipe = ROOT / "configs" / "methods" / f"{STARTS[start]}.yaml"
        line = [
            "finetune",
            "--model",
            "tiny",
            "--data",
            "scenes",
            "--out",
            str(out),
            "--config",
            str(recipe),
        ]
        command(
            [
                *line,
                *(part for s in settings for part in ("--set", s)),
                "--json",
                str(here / f"{name}.json"),
            ],
            here / "log.txt",
        )
    return out


def reinforced(here: Path, sft: Path, seed: int, name: str) -> Path:
    """GRPO from `sft`, on scenes that it has not seen."""
    out = here / name
    if not whole(here / f"{name}.json"):
        shutil.rmtree(out, ignore_errors=True)
        settings = [
            f"data.seed={100 + seed}",
            f"train.seed={seed}",
            f"train.steps={GRPO_STEPS}",
            f"train.batch={GRPO_BATCH}",
        ]
        settings += ["train.eval_every=1000", "data.eval_count=16", "train.log_every=5"]
        settings += [*VARIANTS[name], f"train.lr={GRPO_LR}"]
        line = ["grpo", "--checkpoint", str(sft), "--data", "scenes", "--out", str(out)]
        command(
            [
                *line,
                *(part for s in settings for part in ("--set", s)),
                "--json",
                str(here / f"{name}.json"),
            ],
            here / "log.txt",
        )
    return out


def scored(here: Path, model: Path, n: int, probe: bool) -> None:
    """Accuracy of a checkpoint, exported to int8, and what its latents are worth."""
    name, log = model.name, here / "log.txt"
    bundle = here / f"{name}-int8"
    if not (bundle / "lvr.json").is_file():
        command(["export", str(model), str(bundle), "--precision", "int8"], log)
    if not whole(here / f"{name}-eval.json"):
        line = ["eval", str(bundle), "--limit", str(n), "--threads", "1", "--skills", "300"]
        command([*line, "--json", str(here / f"{name}-eval.json")], log)
    if probe and not whole(here / f"{name}-probe.json"):
        line = ["probe", str(bundle), "--limit", str(n // 4), "--threads", "1", "--only", PROBED]
        command([*line, "--json", str(here / f"{name}-probe.json")], log)


def job(out: Path, start: str, seed: int, n: int, variants: bool) -> None:
    here = out / f"{start}-{seed}"
    here.mkdir(parents=True, exist_ok=True)
    sft = tuned(here, start, seed, "sft", SFT_STEPS)
    names = list(VARIANTS)[: None if variants else 1]
    models = [
        sft,
        reinforced(here, sft, seed, names[0]),
        tuned(here, start, seed, "more", SFT_STEPS + MORE),
    ]
    for model in models:
        scored(here, model, n, model.name != "more")
    for name in names[1:]:
        scored(here, reinforced(here, sft, seed, name), n, True)


def read(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text())) if whole(path) else None


def collect(out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    runs = []
    for start in STARTS:
        for seed in seeds:
            here = out / f"{start}-{seed}"
            sft = read(here / "sft-eval.json")
            for name in ("sft", "more", *VARIANTS):
                found, made = read(here / f"{name}-eval.json"), read(here / f"{name}.json")
                if sft is None or found is None or made is None:
                    continue
                run = {
                    "start": start,
                    "seed": seed,
                    "model": name,
                    "n": found["n"],
                    "accuracy": found["accuracy"],
                    "minutes": made["minutes"],
                }
                run |= {
                    "peak_memory_gb": made["peak_memory_gb"],
                    "skills": (found.get("skills") or {}).get("accuracy"),
                    "by_type": found["by_type"],
                }
                if name != "sft":
                    gain = versus(found, sft)
                    run |= {"gain": gain["difference"], "interval": gain["interval"]}
                if probe := read(here / f"{name}-probe.json"):
                    run["probe"] = {k: v for k, v in probe.items() if k not in ("items", "answers")}
                if name in VARIANTS:
                    run["history"] = [h for h in made["history"] if "reward" in h]
                runs.append(run)
    return runs


def flips(run: dict[str, Any]) -> float | None:
    """Share of answers that become the donor's."""
    found = run.get("probe", {}).get("interventions", {}).get("donor_same_question", {})
    value = found.get("flips_to_donor")
    return None if value is None else float(value)


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| start | model | accuracy, % | gain over the start, points [95 %] | the donor's answer, % | skills, % | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for start in STARTS:
        for name in ("sft", "more", *VARIANTS):
            own = [r for r in runs if (r["start"], r["model"]) == (start, name)]
            if not own:
                continue
            gains = "; ".join(
                f"{100 * r['gain']:+.1f} [{100 * r['interval'][0]:.1f}, {100 * r['interval'][1]:.1f}]"
                for r in own
                if "gain" in r
            )
            mean = " ".join(f"{100 * r['accuracy']:.1f}" for r in own)
            donor = " ".join(f"{100 * f:.1f}" for f in map(flips, own) if f is not None)
            skills = " ".join(f"{100 * r['skills']:.0f}" for r in own if r["skills"] is not None)
            lines.append(
                f"| {start} | {name} | {mean} | {gains} | {donor} | {skills} | {np.mean([r['minutes'] for r in own]):.1f} |"
            )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, key, title in zip(
        panels,
        ("accuracy", "latents", "flat"),
        ("right answers", "answers through latents", "questions that teach nothing"),
        strict=True,
    ):
        for run in runs:
            if "history" in run:
                style = {"accuracy": "-", "recorded": ":", "with-format": "--", "latent-use": "-."}[
                    run["model"]
                ]
                colour = "tab:blue" if run["start"] == "bottleneck" else "tab:orange"
                axes.plot(
                    [h["step"] for h in run["history"]],
                    [h[key] for h in run["history"]],
                    style,
                    color=colour,
                    linewidth=1,
                )
        axes.set(title=title, xlabel="step", ylim=(0, 1))
    panels[0].set_ylabel("share of rollouts")
    told = "blue: bottleneck, orange: grounded; dotted: latents as constants, dashed: with the format reward, dash-dotted: for latent use"
    figure.suptitle(told, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "grpo")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 2))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument(
        "--variants",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the other ways, on the first seed",
    )
    a = parser.parse_args()
    seeds = [int(s) for s in a.seeds.split(",")]
    jobs = [(start, seed) for seed in seeds for start in a.starts.split(",")]
    with ThreadPoolExecutor(a.jobs) as pool:
        list(
            pool.map(
                lambda j: job(a.out, *j, a.n, a.variants and j == ("bottleneck", seeds[0])), jobs
            )
        )
    runs = collect(a.out, seeds)
    Path(__file__).with_suffix(".json").write_text(json.dumps(runs, indent=1))
    draw(runs, Path(__file__).with_name("grpo_curves.png"))
    print(table(runs))


if __name__ == "__main__":
    main()
