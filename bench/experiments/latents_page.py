"""docs/results/latents.json -> the tables of latents.md and its pictures. Called by latents.py;
`python docs/results/latents_page.py` alone writes them again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by latents_page.py: below -->", "<!-- made by latents_page.py: above -->"
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
Run = dict[str, Any]


def spread(values: Sequence[float], digits: int = 1, scale: float = 100.0) -> str:
    """Mean over seeds with the smallest and largest: "81.2 (80.1 – 82.0)"."""
    if not values:
        return "–"
    mean = statistics.fmean(values) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return (
        f"{mean:.{digits}f} ({min(values) * scale:.{digits}f} – {max(values) * scale:.{digits}f})"
    )


def of(runs: list[Run], value: Callable[[Run], float | None]) -> list[float]:
    return [v for r in runs if (v := value(r)) is not None]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)])


def write(results: Path) -> None:
    data = json.loads(results.read_text())
    runs: list[Run] = data["runs"]
    methods = list(dict.fromkeys(r["method"] for r in runs))
    by_method = {m: [r for r in runs if r["method"] == m] for m in methods}
    base = list(data["base"].values())
    kinds = list(base[0]["by_type"])
    parts = [
        "## Accuracy by type of question",
        _accuracy(by_method, base, kinds),
        "![accuracy](latents_accuracy.png)",
    ]
    parts += ["## Against the controls, on the same items", _paired(by_method)]
    parts += [
        "## Interventions",
        _interventions(by_method),
        "![interventions](latents_interventions.png)",
    ]
    parts += [
        "## Where the latents look",
        _retrieval(by_method),
        "## Verdicts of `probe`",
        _verdicts(runs),
    ]
    parts += ["## Outside the suite", _skills(by_method, base), "## Cost", _cost(by_method)]
    page = HERE / "latents.md"
    text = page.read_text() if page.is_file() else f"# Latents that matter\n\n{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after)
    _figure_accuracy(by_method, base, kinds)
    _figure_interventions(by_method)


def _accuracy(by_method: dict[str, list[Run]], base: list[Run], kinds: list[str]) -> str:
    before = [b["accuracy"] for b in base]
    rows = [
        [
            "before tuning",
            spread(before),
            *(spread([b["by_type"][k]["accuracy"] for b in base]) for k in kinds),
        ]
    ]
    for method, runs in by_method.items():
        evals = [r["eval"] for r in runs]
        rows.append([f"`{method}`", f"**{spread([e['accuracy'] for e in evals])}**"])
        rows[-1] += [spread([e["by_type"][k]["accuracy"] for e in evals]) for k in kinds]
    return table(["method", "all", *kinds], rows)


def _paired(by_method: dict[str, list[Run]]) -> str:
    rows = []
    for method, runs in by_method.items():
        for control in ("sft", "dummy"):
            found = [(r["seed"], r["against"][control]) for r in runs if control in r["against"]]
            for seed, a in found:
                low, high = a["interval"]
                row = [
                    f"`{method}`",
                    control,
                    str(seed),
                    str(a["n"]),
                    f"{100 * a['difference']:+.1f}",
                ]
                rows.append([*row, f"{100 * low:+.1f} – {100 * high:+.1f}", f"{a['p']:.1e}"])
    return table(
        [
            "method",
            "against",
            "seed",
            "n",
            "points",
            "95 % interval (paired bootstrap)",
            "McNemar p",
        ],
        rows,
    )


def _interventions(by_method: dict[str, list[Run]]) -> str:
    probed = {m: runs for m, runs in by_method.items() if any("probe" in r for r in runs)}
    rows = [
        [
            "none",
            *(
                spread([r["probe"]["interventions"]["none"]["accuracy"] for r in runs])
                for runs in probed.values()
            ),
        ]
    ]
    for name in SHOWN:
        cells = [
            [r["probe"]["interventions"][name] for r in runs if name in r["probe"]["interventions"]]
            for runs in probed.values()
        ]
        rows.append([name, *(spread([c["accuracy"] for c in cell]) for cell in cells)])
        if name.startswith("donor"):
            flips = [
                [c["flips_to_donor"] for c in cell if c["flips_to_donor"] is not None]
                for cell in cells
            ]
            rows.append([f"{name}: flips to the donor's answer", *(spread(f) for f in flips)])
    return table(["accuracy, % under", *(f"`{m}`" for m in probed)], rows)


def _retrieval(by_method: dict[str, list[Run]]) -> str:
    rows = []
    for method, runs in by_method.items():
        found = [
            r["probe"]["retrieval"]
            for r in runs
            if (r.get("probe", {}).get("retrieval") or {}).get("r_at_1") is not None
        ]
        if found:
            ratio = [f["r_at_1"] / f["chance"] for f in found]
            rows.append(
                [
                    f"`{method}`",
                    spread([f["r_at_1"] for f in found]),
                    spread([f["chance"] for f in found]),
                    spread(ratio, scale=1),
                ]
            )
    return table(["method", "R@1, %", "area-matched chance, %", "times chance"], rows)


def _verdicts(runs: list[Run]) -> str:
    return "\n".join(
        f"- `{r['method']}`, seed {r['seed']}: {r['probe']['verdict']}"
        for r in runs
        if "probe" in r
    )


def _skills(by_method: dict[str, list[Run]], base: list[Run]) -> str:
    kinds = list(base[0]["skills"]["by_type"])
    rows = [
        [
            "before tuning",
            *(spread([b["skills"]["by_type"][k]["accuracy"] for b in base]) for k in kinds),
        ]
    ]
    for method, runs in by_method.items():
        rows.append(
            [
                f"`{method}`",
                *(
                    spread([r["eval"]["skills"]["by_type"][k]["accuracy"] for r in runs])
                    for k in kinds
                ),
            ]
        )
    return table(["method", *kinds], rows)


def _cost(by_method: dict[str, list[Run]]) -> str:
    rows = []
    for method, runs in by_method.items():
        minutes, memory = (
            [r["finetune"]["minutes"] for r in runs],
            [r["finetune"]["peak_memory_gb"] for r in runs],
        )
        rows.append(
            [
                f"`{method}`",
                str(runs[0]["finetune"]["steps"]),
                spread(minutes, scale=1),
                spread(memory, 2, 1),
            ]
        )
    return table(["method", "steps", "minutes, one thread", "peak memory, GiB"], rows)


def _figure_accuracy(by_method: dict[str, list[Run]], base: list[Run], kinds: list[str]) -> None:
    columns = ["all", *kinds]
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    systems = {"before tuning": base} | {
        m: [r["eval"] for r in runs] for m, runs in by_method.items()
    }
    width = 0.85 / len(systems)
    for i, (name, found) in enumerate(systems.items()):
        values = [
            [100 * (e["accuracy"] if c == "all" else e["by_type"][c]["accuracy"]) for e in found]
            for c in columns
        ]
        middle = [statistics.fmean(v) for v in values]
        pairs = list(zip(middle, values, strict=True))
        error = [[max(0.0, m - min(v)) for m, v in pairs], [max(0.0, max(v) - m) for m, v in pairs]]
        places = [x + (i - len(systems) / 2 + 0.5) * width for x in range(len(columns))]
        axes.bar(places, middle, width, yerr=error, label=name, capsize=1.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("accuracy, % (bars: all seeds)")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    figure.savefig(HERE / "latents_accuracy.png", dpi=110)
    plt.close(figure)


def _figure_interventions(by_method: dict[str, list[Run]]) -> None:
    probed = {m: runs for m, runs in by_method.items() if any("probe" in r for r in runs)}
    figure, panels = plt.subplots(
        1, len(probed), figsize=(2.6 * len(probed) + 1, 4), sharey=True, layout="constrained"
    )
    for axes, (method, runs) in zip(
        list(panels) if len(probed) > 1 else [panels], probed.items(), strict=True
    ):
        names = ["none", *SHOWN]
        for r in runs:
            p = r["probe"]
            found = p["interventions"]
            places = [i for i, n in enumerate(names) if n in found]
            axes.plot(
                [100 * found[names[i]]["accuracy"] for i in places],
                places,
                "o",
                alpha=0.6,
                markersize=5,
            )
        axes.axvline(
            100 * statistics.fmean([r["probe"]["interventions"]["none"]["accuracy"] for r in runs]),
            color="grey",
            linewidth=0.8,
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_title(method, fontsize=9)
        axes.set_xlim(0, 100)
        axes.grid(axis="x", alpha=0.3)
    panels_list = list(panels) if len(probed) > 1 else [panels]
    panels_list[0].invert_yaxis()
    panels_list[0].set_xlabel("accuracy, % (a point a seed)")
    figure.savefig(HERE / "latents_interventions.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    write(HERE / "latents.json")
