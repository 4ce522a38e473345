"""The tables of docs/results/latents.md and its pictures, from docs/results/latents.json.

    python -m lvr_lite.bench.experiments.latents_page

writes them again; `latents` does so at its end.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvr_lite.bench.experiments.runner import RESULTS, launch, publish, read_json, table

MARK = "latents_page"
BEFORE = "before tuning"
SHOWN = (
    "zero",
    "noise",
    "mean",
    "first",
    "shuffle",
    "donor_unrelated",
    "donor_same_question",
    "oracle",
    "k0",
    "markers",
    "self",
)


@dataclass(frozen=True)
class Scores:
    """What `eval` reports: the share of right answers by type of question, in the suite ("all" is
    of the whole suite) and outside of it.
    """

    suite: dict[str, float]
    skills: dict[str, float]

    @classmethod
    def of(cls, report: Any) -> Scores:
        suite, skills = (
            {kind: part["accuracy"] for kind, part in one["by_type"].items()}
            for one in (report, report["skills"])
        )
        return cls({"all": report["accuracy"], **suite}, skills)


@dataclass(frozen=True)
class Probe:
    """What `probe` reports.

    accuracy: under each intervention, and under "none".
    flips: share of answers that become the donor's, under each intervention that has a donor.
    r_at_1, chance: of the retrieval; None where there was none.
    """

    accuracy: dict[str, float]
    flips: dict[str, float]
    r_at_1: float | None
    chance: float | None
    verdict: str

    @classmethod
    def of(cls, report: Any) -> Probe:
        interventions = report["interventions"]
        accuracy = {name: one["accuracy"] for name, one in interventions.items()}
        flips = {
            name: one["flips_to_donor"]
            for name, one in interventions.items()
            if one["flips_to_donor"] is not None
        }
        retrieval = report.get("retrieval") or {}
        rates = (retrieval.get("r_at_1"), retrieval.get("chance"))
        return cls(accuracy, flips, *rates, report["verdict"])


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    against: {control: how it differs over the same items}, as `eval --against` reports it.
    steps, minutes, memory (GiB): of the training.
    """

    method: str
    seed: int
    scores: Scores
    against: dict[str, Any]
    steps: int
    minutes: float
    memory: float
    probe: Probe | None

    @classmethod
    def of(cls, run: Any) -> Run:
        training = run["finetune"]
        return cls(
            run["method"],
            run["seed"],
            Scores.of(run["eval"]),
            run["against"],
            training["steps"],
            training["minutes"],
            training["peak_memory_gb"],
            Probe.of(run["probe"]) if "probe" in run else None,
        )


def spread(values: Iterable[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean over seeds with the smallest and largest: "81.2 (80.1 – 82.0)"."""
    scaled = [value * scale for value in values]
    if not scaled:
        return "–"
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    if len(scaled) == 1:
        return mean
    return f"{mean} ({min(scaled):.{digits}f} – {max(scaled):.{digits}f})"


def write(results: Path, folder: Path = RESULTS) -> None:
    """Write latents.md and its pictures in `folder`. results: what `latents.collect` gave."""
    data = read_json(results)
    runs = [Run.of(run) for run in data["runs"]]
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    systems = {BEFORE: [Scores.of(report) for report in data["base"].values()]}
    for method, group in by_method.items():
        systems[f"`{method}`"] = [run.scores for run in group]
    probes = {
        method: [run.probe for run in group if run.probe is not None]
        for method, group in by_method.items()
    }
    probes = {method: group for method, group in probes.items() if group}
    parts = {
        "Accuracy by type of question": _accuracy(systems),
        "Against the controls, on the same items": _paired(runs),
        "Interventions": _interventions(probes),
        "Where the latents look": _retrieval(probes),
        "Verdicts of `probe`": _verdicts(runs),
        "Outside the suite": _skills(systems),
        "Cost": _cost(by_method),
    }
    text = "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    publish(text, folder / "latents.md", MARK)
    _draw_accuracy(systems).savefig(folder / "latents_accuracy.png", dpi=110)
    _draw_interventions(probes).savefig(folder / "latents_interventions.png", dpi=110)


def _accuracy(systems: dict[str, list[Scores]]) -> str:
    kinds = list(systems[BEFORE][0].suite)
    rows = []
    for name, group in systems.items():
        overall, *cells = (spread(scores.suite[kind] for scores in group) for kind in kinds)
        rows.append([name, overall if name == BEFORE else f"**{overall}**", *cells])
    return f"{table(['method', *kinds], rows)}\n\n![accuracy](latents_accuracy.png)"


def _paired(runs: list[Run]) -> str:
    titles = [
        "method",
        "against",
        "seed",
        "n",
        "points",
        "95 % interval (paired bootstrap)",
        "McNemar p",
    ]
    rows = []
    methods = dict.fromkeys(run.method for run in runs)
    for method, control in [(m, c) for m in methods for c in ("sft", "dummy")]:
        for run in runs:
            if run.method != method or control not in run.against:
                continue
            paired = run.against[control]
            low, high = (100 * bound for bound in paired["interval"])
            cells = [f"`{method}`", control, run.seed, paired["n"]]
            cells += [f"{100 * paired['difference']:+.1f}", f"{low:+.1f} – {high:+.1f}"]
            rows.append([*cells, f"{paired['p']:.1e}"])
    return table(titles, rows)


def _interventions(probes: dict[str, list[Probe]]) -> str:
    rows = []
    for name in ("none", *SHOWN):
        groups = [
            [probe.accuracy[name] for probe in group if name in probe.accuracy]
            for group in probes.values()
        ]
        rows.append([name, *map(spread, groups)])
        if name.startswith("donor"):
            groups = [
                [probe.flips[name] for probe in group if name in probe.flips]
                for group in probes.values()
            ]
            rows.append([f"{name}: flips to the donor's answer", *map(spread, groups)])
    titles = ["accuracy, % under", *(f"`{method}`" for method in probes)]
    return f"{table(titles, rows)}\n\n![interventions](latents_interventions.png)"


def _retrieval(probes: dict[str, list[Probe]]) -> str:
    rows = []
    for method, group in probes.items():
        rates = [
            (probe.r_at_1, probe.chance)
            for probe in group
            if probe.r_at_1 is not None and probe.chance is not None
        ]
        if rates:
            r_at_1 = spread(rate for rate, _ in rates)
            chance = spread(chance for _, chance in rates)
            ratio = spread((rate / chance for rate, chance in rates), scale=1)
            rows.append([f"`{method}`", r_at_1, chance, ratio])
    return table(["method", "R@1, %", "area-matched chance, %", "times chance"], rows)


def _verdicts(runs: list[Run]) -> str:
    return "\n".join(
        f"- `{run.method}`, seed {run.seed}: {run.probe.verdict}"
        for run in runs
        if run.probe is not None
    )


def _skills(systems: dict[str, list[Scores]]) -> str:
    kinds = list(systems[BEFORE][0].skills)
    rows = [
        [name, *(spread(scores.skills[kind] for scores in group) for kind in kinds)]
        for name, group in systems.items()
    ]
    return table(["method", *kinds], rows)


def _cost(by_method: dict[str, list[Run]]) -> str:
    rows = []
    for method, runs in by_method.items():
        minutes = spread((run.minutes for run in runs), scale=1)
        memory = spread((run.memory for run in runs), digits=2, scale=1)
        rows.append([f"`{method}`", runs[0].steps, minutes, memory])
    return table(["method", "steps", "minutes, one thread", "peak memory, GiB"], rows)


def _draw_accuracy(systems: dict[str, list[Scores]]) -> Figure:
    kinds = list(systems[BEFORE][0].suite)
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(systems)
    for i, (name, group) in enumerate(systems.items()):
        shares = 100 * np.array([[scores.suite[kind] for scores in group] for kind in kinds])
        means = shares.mean(1)
        errors = np.maximum(0, [means - shares.min(1), shares.max(1) - means])
        places = np.arange(len(kinds)) + (i - len(systems) / 2 + 0.5) * width
        axes.bar(
            places,
            means,
            width,
            yerr=errors,
            label=name.strip("`"),
            capsize=1.5,
        )
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("accuracy, % (bars: all seeds)")
    axes.legend(
        fontsize=8,
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.2),
    )
    return figure


def _draw_interventions(probes: dict[str, list[Probe]]) -> Figure:
    size = (2.6 * len(probes) + 1, 4)
    figure = Figure(figsize=size, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(
        1,
        len(probes),
        sharey=True,
        squeeze=False,
    )[0]
    names = ["none", *SHOWN]
    for axes, (method, group) in zip(panels, probes.items(), strict=True):
        for probe in group:
            places = [i for i, name in enumerate(names) if name in probe.accuracy]
            shares = [100 * probe.accuracy[names[i]] for i in places]
            axes.plot(
                shares,
                places,
                "o",
                alpha=0.6,
                markersize=5,
            )
        untouched = statistics.fmean(probe.accuracy["none"] for probe in group)
        axes.axvline(100 * untouched, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(method, fontsize=9)
        axes.set_xlim(0, 100)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("accuracy, % (a point a seed)")
    return figure


def main() -> None:
    write(RESULTS / "latents.json")


if __name__ == "__main__":
    launch(main, __doc__)
