"""Evaluations for people: tables on the terminal, and the probe's page.

May import: rich and what stands above `eval`.

All of it is made from the JSON alone, so that a saved file can be shown again.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lvr_lite.eval.benchmarks import PUBLISHED
from lvr_lite.files import JsonObject, write_atomically
from lvr_lite.views.charts import NONE, interval_bars, number, percent
from lvr_lite.views.page import render_page

# Rows that could not be asked.
SHOWN_BROKEN = 20
# A share of looks below which benchmarks say why that may be.
SELDOM = 0.5
# A skill that falls by more than this is said to fall in words.
LOSS_IN_WORDS = 0.02
BOTTLENECK = (
    "Text sees nothing of the picture but the latents and their places, so that the same-question "
    "donor's answer comes nearly by construction."
)
WHAT = {
    "none": "its own latents: the baseline",
    "zero": "zeros",
    "noise": "noise of the same length",
    "mean": "the mean over all items, step by step",
    "first": "the first one, K times",
    "shuffle": "the same ones in another order",
    "donor_unrelated": "another picture's, under another question",
    "donor_same_question": "another picture's, same question, other answer",
    "oracle": "the visual tokens in the boxes",
    "k0": "no latents and no markers",
    "markers": "the markers alone",
    "self": "its own again: the sham",
}


def show(result: JsonObject, console: Console | None = None) -> None:
    """Print the `eval` JSON: the score overall with its interval, by type, and by pairs; the
    differences to other models; the skills.

    A benchmark has its own scores instead, beside what the paper published, and the rows that could
    not be asked. Several numbers of latent steps have a column each.
    """
    console = console or Console()
    runs = result.get("by_steps", [result])
    if "scores" in result or len(runs) > 1:
        console.print(_columns(runs))
    else:
        console.print(_score(result))
    several = len(runs) > 1
    for run in runs:
        title = ""
        if several:
            title = f"{run['steps']} latent steps: "
        console.print(title + looks_and_sizes(run), highlight=False, soft_wrap=True)
    for note in _warnings(result):
        console.print(f"[bold]{escape(note)}[/]", highlight=False, soft_wrap=True)
    if published := PUBLISHED.get(result["suite"]) if "scores" in result else None:
        console.print(_beside_published(runs, published))
    for run in runs:
        title = ""
        if several:
            title = f", {run['steps']} latent steps"
        against = run.get("against", [])
        if "against" in run:
            console.print(_differences(against, title))
        if "skills" in run:
            console.print(_skills(run["skills"], against, title))
    if result.get("broken"):
        _show_broken(result, console)


def _show_broken(result: JsonObject, console: Console) -> None:
    """The first of the rows that could not be asked."""
    broken = result["broken"]
    count = f"[bold]{result['n']} of {result['of']} rows were asked[/]"
    console.print(f"{count}; not asked, and in no score:", highlight=False)
    for row in broken[:SHOWN_BROKEN]:
        line = f"  {row['where']}: {row['problem']}"
        console.print(escape(line), highlight=False, soft_wrap=True)
    more = len(broken) - SHOWN_BROKEN
    if more > 0:
        console.print(f"  … and {more} more; --json lists all", highlight=False)


def looks_and_sizes(result: JsonObject) -> str:
    """What share of the answers looked, and how large pictures were; files of older releases do
    not tell.
    """
    parts = []
    if result.get("looked") is not None:
        parts.append(f"{result['looked']:.0%} of the answers looked")
    if result.get("look", "auto") != "auto":
        parts.append(f"--look {result['look']}")
    if sizes := visual_tokens(result):
        parts.append(f"visual tokens a picture: {sizes}")
    if result.get("prompt"):
        parts.append(f"prompt {result['prompt']}")
    return "; ".join(parts)


def visual_tokens(result: JsonObject) -> str:
    """ "512, at most 640"; "" where nothing is known."""
    sizes = result.get("visual_tokens") or {}
    if sizes.get("max") is None:
        return ""
    return f"{sizes['p50']:g}, at most {sizes['max']}"


def _warnings(result: JsonObject) -> list[str]:
    """What must be known before these numbers are compared with others."""
    lines = []
    if penalty := (result.get("not_applied") or {}).get("repetition_penalty"):
        lines.append(
            f"generation_config.json of the base asks for a repetition penalty of {penalty}, which "
            "is not applied here: greedy figures elsewhere may differ by that"
        )
    looked = result.get("looked")
    direct = result.get("prompt") == "direct" and result.get("look") == "auto"
    if direct and result["steps"] and looked is not None and looked < SELDOM:
        lines.append(
            "most answers came without a look, which the sentence \"answer with the option's "
            'letter directly" can do: try --prompt plain, or --look always'
        )
    return lines


def _score(result: JsonObject) -> Table:
    """One run on a suite that is not a benchmark."""
    low, high = result["interval"]
    table = Table(title=f"{result['model']} on {result['suite']}", title_justify="left")
    table.add_column("questions")
    table.add_column("n", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    for kind, score in result["by_type"].items():
        table.add_row(kind, str(score["n"]), f"{score['accuracy']:.1%}", "")
    table.add_section()
    table.add_row(
        "all", str(result["n"]), f"[bold]{result['accuracy']:.1%}[/]", f"{low:.1%} – {high:.1%}"
    )
    if result["pair_accuracy"] is not None:
        table.add_row("pairs, both right", "", f"{result['pair_accuracy']:.1%}", "")
    return table


def _columns(runs: list[JsonObject]) -> Table:
    """A benchmark, or several numbers of latent steps: scores and types down, the runs across."""
    first = runs[0]
    table = Table(
        "in %, with 95 % intervals",
        title=f"{first['model']} on {first['suite']}",
        title_justify="left",
    )
    table.add_column("n", justify="right")
    for run in runs:
        table.add_column(f"K = {run['steps']}", justify="right", no_wrap=True)
    scores = [_named_scores(run) for run in runs]
    first_type = next(iter(first["by_type"]), None)
    for name, one in scores[0].items():
        if name == first_type:
            table.add_section()
        count = ""
        if one["n"] is not None:
            count = str(one["n"])
        cells = [_score_cell(run[name]) for run in scores]
        table.add_row(escape(name), count, *cells)
    return table


def _score_cell(score: JsonObject) -> str:
    if score["n"] == 0:
        return NONE
    return _with_interval(score["accuracy"], score.get("interval"))


def _named_scores(run: JsonObject) -> dict[str, JsonObject]:
    """Everything that a run is scored by: its own scores, or of a suite that is no benchmark all
    questions and pairs; then its types.
    """
    scores: dict[str, JsonObject] = {score["name"]: score for score in run.get("scores", [])}
    if not scores:
        scores["all"] = run
        if run["pair_accuracy"] is not None:
            scores["pairs, both right"] = {"n": None, "accuracy": run["pair_accuracy"]}
    scores.update(run["by_type"])
    return scores


def _beside_published(
    runs: list[JsonObject], published: list[tuple[str, dict[str, float]]]
) -> Table:
    """Ours above, and marked as theirs what the paper published for the same scores."""
    names = list(published[0][1])
    title = (
        "beside the published rows, which are the numbers of arXiv 2509.24251 and were not "
        "measured here; in %"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", vertical="bottom")
    for run in runs:
        scores = _named_scores(run)
        ours = f"{run['model']}, {run['steps']} steps, n = {run['n']}"
        table.add_row(
            f"[bold]{escape(ours)}[/]",
            *(points(scores[n]["accuracy"]) if n in scores else NONE for n in names),
        )
    for system, row in published:
        table.add_row(
            f"{system}, published", *(f"{row[name]:.1f}" if name in row else NONE for name in names)
        )
    return table


def _differences(against: list[JsonObject], what: str = "") -> Table:
    """One row for each model that was compared."""
    table = Table(
        "less that of",
        title=f"difference on the same questions{what}, in points",
        title_justify="left",
    )
    for title in ("n", "all", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("looked", justify="right")
    table.add_column("visual tokens", justify="right")
    table.add_column("by type")
    for other in against:
        kinds = ", ".join(
            f"{kind} {points(of_kind['difference'])}" for kind, of_kind in other["by_type"].items()
        )
        difference = _with_interval(other["difference"], other["interval"])
        table.add_row(
            escape(other["source"]),
            str(other["n"]),
            f"[bold]{difference}[/]",
            _p(other["p"]),
            percent(other.get("looked")),
            visual_tokens(other) or NONE,
            escape(kinds),
        )
    return table


def _skills(skills: JsonObject, against: list[JsonObject], what: str = "") -> Table:
    """The skills by type, and how they changed against each model that was compared."""
    table = Table(f"outside the suite{what}")
    for title in ("n", "accuracy"):
        table.add_column(title, justify="right")
    for other in against:
        table.add_column(f"against {escape(other['source'])}")
    for kind, score in skills["by_type"].items():
        changes = []
        for other in against:
            of_kind = None
            if "skills" in other:
                of_kind = other["skills"]["by_type"][kind]
            changes.append(_change(of_kind))
        table.add_row(kind, str(score["n"]), f"{score['accuracy']:.1%}", *changes)
    table.add_section()
    changes = [_change(other.get("skills")) for other in against]
    table.add_row("all", str(skills["n"]), f"[bold]{skills['accuracy']:.1%}[/]", *changes)
    return table


def _change(other: JsonObject | None) -> str:
    """A difference in words where it is a loss that nobody should miss."""
    if other is None:
        return "not in that file"
    difference = _with_interval(other["difference"], other["interval"])
    loss = -other["difference"]
    if loss <= LOSS_IN_WORDS:
        return difference
    return f"[bold red]falls by {points(loss)} points[/]: {difference}"


def _p(p: float | None) -> str:
    if p is None:
        return NONE
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}"


# ----------------------------------------------------------------------------------------------
# the probe


def show_probe(data: JsonObject, console: Console | None = None) -> None:
    """Print the JSON of `lvr_lite.eval.probe.probe`: every intervention against the baseline,
    retrieval, and the verdict.
    """
    console = console or Console()
    title = (
        f"{data['model']} on {data['data']}: accuracy in %, difference to its own latents in "
        "points, on the same items"
    )
    table = Table(
        "latents fed",
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in ("n", "accuracy", "difference", "p", "changed"):
        table.add_column(column, justify="right")
    for name, one in data["interventions"].items():
        table.add_row(name, *_cells(one))
    console.print(table)
    for line in notes(data):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"[bold]{data['verdict']}[/]", highlight=False, soft_wrap=True)


def notes(data: JsonObject) -> list[str]:
    """What else the probe measured, a sentence a line: which model and items, retrieval, the shape
    of the latents.
    """
    latent = data["latent"]
    lines = [
        f"{latent['steps']} latent steps, mode {latent['mode']}, feedback {latent['feedback']}; "
        f"the loop was opened in {data['opened']} of {data['n']} answers, and the interventions "
        f"concern these. Seed {data['seeds']['interventions']}."
    ]
    if sizes := visual_tokens(data):
        lines.append(f"Visual tokens a picture: {sizes}.")
    lines += [_flips_note(name, effect) for name, effect in donors(data).items()]
    if latent["mode"] == "bottleneck":
        lines.append(BOTTLENECK)
    retrieval = data["retrieval"]
    if retrieval["r_at_1"] is not None:
        r_at_1 = _with_interval(retrieval["r_at_1"], retrieval["interval"])
        lines.append(
            f"R@1 of the free-running latents {r_at_1} % (n = {retrieval['n']}) against "
            f"{percent(retrieval['chance'])} by area, {number(retrieval['ratio'])} times; in the "
            f"step's own tokens {percent(retrieval['own_box'])} against "
            f"{percent(retrieval['own_box_chance'])}."
        )
    geometry = data["geometry"]
    lines.append(
        f"Participation ratio {number(geometry['participation_ratio'])} a step, "
        f"{number(geometry['participation_ratio_all'])} of all; cosine between items "
        f"{number(geometry['similarity'])}, {number(geometry['similarity_centred'])} without the "
        "mean."
    )
    return lines


def _flips_note(name: str, effect: JsonObject) -> str:
    share = percent(effect["flips_to_donor"])
    note = f"{name}: the donor's answer in {share} of {effect['pairs']} pairs"
    note += f", lift {points(effect['lift'])} points"
    if effect["flips_by_noise"] is not None:
        note += f"; under noise in {percent(effect['flips_by_noise'])}"
    return f"{note}."


def donors(data: JsonObject) -> dict[str, JsonObject]:
    """The interventions that fed another picture's latents, where there were pairs to count."""
    return {name: one for name, one in data["interventions"].items() if one.get("pairs")}


def _cells(effect: JsonObject) -> tuple[str, ...]:
    return (
        str(effect["n"]),
        _with_interval(effect["accuracy"], effect["interval"]),
        _with_interval(effect["difference"], effect["difference_interval"]),
        _p(effect["mcnemar_p"]),
        percent(effect["changed"]),
    )


def _with_interval(share: float | None, interval: list[float] | None) -> str:
    """Percent or points with their interval: -1.0 [-7.3, 6.2]."""
    if interval is None:
        return points(share)
    low, high = interval
    return f"{points(share)} [{points(low)}, {points(high)}]"


def points(share: float | None) -> str:
    """A share or a difference of shares in percentage points; a dash for None."""
    if share is None:
        return NONE
    return f"{round(100 * share, 1) + 0:.1f}"


def write_probe_page(data: JsonObject, out: Path) -> None:
    """Write the probe's JSON as one self-contained HTML page. Raises BundleError where the file
    cannot be written.
    """
    interventions = data["interventions"]
    kinds: set[str] = set()
    bars = []
    rows = []
    for name, one in interventions.items():
        kinds.update(one["by_type"])
        bars.append((name, one["accuracy"], one["interval"], f"n = {one['n']}"))
        rows.append((name, WHAT[name], *_cells(one)))
    flips = []
    for name, one in donors(data).items():
        share = _with_interval(one["flips_to_donor"], one["flips_interval"])
        flips.append((name, one, share))
    bottleneck = ""
    if data["latent"]["mode"] == "bottleneck":
        bottleneck = BOTTLENECK
    html = render_page(
        "probe.html.j2",
        data=data,
        bars=interval_bars(bars),
        baseline=f"{100 * interventions['none']['accuracy']:.2f}%",
        notes=notes(data),
        rows=rows,
        flips=flips,
        kinds=sorted(kinds),
        points=points,
        bottleneck=bottleneck,
    )
    write_atomically(out, html)
