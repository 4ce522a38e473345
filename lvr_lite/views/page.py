"""Self-contained HTML pages: the demo's report, and the charts and the frame that the bench's page
shares.

May import: jinja2, Pillow, the core.

Nothing on a page comes from elsewhere: style is inline, charts are inline SVG, pictures are PNG in
base64. Charts stretch with their column: lengths are in percent of the width and heights in pixels,
so that text keeps its size on a phone.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from lvr_lite.files import write_atomically
from lvr_lite.views import look

WIDEST = 640  # pixels of an enlarged or shrunk picture
PANEL = 168  # pixels of a heat map's longer side
SERIES = 8  # colours that the style defines
NONE = "–"
SHOWN_INTERVENTIONS = (
    "noise",
    "donor_unrelated",
    "donor_same_question",
    "oracle",
    "k0",
    "self",
)  # of the probe, on the demo's page


def write_page(results: dict[str, Any], out: Path) -> None:
    """Write the demo's report to the file `out`, one HTML page.

    results: "systems" [{"name", "accuracy" 0–1, "interval" [lo, hi], "n", "by_type" {type: {"n",
    "accuracy"}}, "size_mb", "ttft_ms", "tpls_ms", "tpot_ms", "peak_rss_mb"}], "examples" [{"image"
    a picture, "question", "answer", "expected", "by_system" {name: answer}, "boxes" [[x0, y0, x1,
    y1], …] normalized, "view" its latent steps (`look.View`)}], "curve" [{"step", "loss",
    "accuracy"}], "machine" {…}, "commands" [lines], "minutes" {stage: minutes}. All but "systems",
    and "view", may be left out, and any number may be None. Raises BundleError where the file
    cannot be written.
    """
    systems, examples = results["systems"], results.get("examples") or []
    seen = [e["view"] for e in examples if e.get("view")]
    scale = look.bounds(seen) if seen else None
    sections = {
        "accuracy": interval_bars(
            [
                (
                    s["name"],
                    s.get("accuracy"),
                    s.get("interval"),
                    f"n = {s['n']}" if s.get("n") else "",
                )
                for s in systems
            ]
        ),
        "by_type": _by_type(systems),
        "probe": _probe(results.get("probe")),
        "loss": curve(
            [
                (p["step"], p["loss"])
                for p in results.get("curve") or []
                if p.get("loss") is not None
            ],
            "loss",
        ),
        "learned": curve(
            [
                (p["step"], p["accuracy"])
                for p in results.get("curve") or []
                if p.get("accuracy") is not None
            ],
            "accuracy",
            series=1,
            top=1.0,
        ),
        "examples": [_example(e, scale) for e in examples],
        "scale": _scale(scale) if scale else None,
        "machine": results.get("machine") or {},
        "commands": results.get("commands") or [],
        "minutes": results.get("minutes") or {},
    }
    write_atomically(out, render_page("demo.html.j2", systems=systems, **sections))


def _probe(probed: dict[str, Any] | None) -> dict[str, Any] | None:
    """The verdict of `lvr-lite probe` on the demo's int8 bundle, and accuracy by what the latent
    steps were fed, as bars.
    """
    if probed is None:
        return None
    own = probed["interventions"]["none"]  # of the items that the interventions concern, not of all
    bars = [("own latents", own["accuracy"], own["interval"], f"n = {own['n']}")]
    bars += [
        (name.replace("_", " "), p["accuracy"], p["interval"], f"n = {p['n']}")
        for name, p in probed["interventions"].items()
        if name in SHOWN_INTERVENTIONS and p["accuracy"] is not None
    ]
    return {"verdict": probed["verdict"], "bars": interval_bars(bars)}


def render_page(template: str, **values: Any) -> str:
    """The HTML of a template in views/templates; each but the demo's extends `demo.html.j2`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lvr_lite.views"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, words=words)
    return environment.get_template(template).render(**values)


# ------------------------------------------------------------------------------------------------------
# numbers in words


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, whole from there on: 0.123, 14.0, 1,234; a dash
    for None.
    """
    if value is None:
        return NONE
    if not value:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash for None."""
    return NONE if share is None else f"{100 * share:.1f} %"


def words(value: Any) -> str:
    """A JSON value for people: lists and objects flattened, a dash for nothing."""
    if value is None or value == [] or value == {} or value == "":
        return NONE
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(words(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------
# charts


def _svg(height: float, label: str, body: list[Markup]) -> Markup:
    parts = Markup("").join(body)
    return Markup(
        '<svg class="chart" width="100%" height="{}" role="img" aria-label="{}">{}</svg>'
    ).format(round(height), label, parts)


def _text(x: str, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, text
    )


def _bar(x: float, y: float, width: float, height: float, series: int, title: str) -> Markup:
    """A bar from x, `width` long, both in percent; y and height in pixels."""
    return Markup(
        '<rect x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" rx="2" class="s{}"><title>{}</title></rect>'
    ).format(x, y, width, height, series % SERIES, title)


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Markup:
    return Markup('<line x1="{:.3f}%" y1="{}" x2="{:.3f}%" y2="{}" class="{}"/>').format(
        x0, y0, x1, y1, kind
    )


def legend(names: list[str]) -> Markup:
    """The names of series 0, 1, … beside their colours."""
    entries = Markup("").join(
        Markup('<li><i class="s{}"></i>{}</li>').format(i % SERIES, name)
        for i, name in enumerate(names)
    )
    return Markup('<ul class="legend">{}</ul>').format(entries)


def stacked_bars(rows: list[tuple[str, list[float]]], parts: list[str], unit: str) -> Markup:
    """One bar a row, stacked from a value for each of `parts`; the row's sum stands beside its
    name. "" without rows or values.
    """
    longest = max((sum(values) for _, values in rows), default=0.0)
    if longest <= 0:
        return Markup("")
    body = []
    for i, (name, values) in enumerate(rows):
        top, left = i * 52, 0.0
        body += [
            _text("0", top + 14, name, "name"),
            _text("100%", top + 14, f"{number(sum(values))} {unit}", "value", "end"),
        ]
        for series, (part, value) in enumerate(zip(parts, values, strict=True)):
            width = 100 * value / longest
            if width > 0:
                body.append(
                    _bar(
                        left,
                        top + 22,
                        max(width - 0.25, 0.05),
                        18,
                        series,
                        f"{name}, {part}: {number(value)} {unit}",
                    )
                )
            left += width
    return legend(parts) + _svg(len(rows) * 52, f"{unit} by part, stacked", body)


def _grid(height: float) -> list[Markup]:
    """Lines at 0, 25, … 100 % of the width with their labels below `height`."""
    body = []
    for tick in (0, 25, 50, 75, 100):
        anchor = "start" if tick == 0 else "end" if tick == 100 else "middle"
        body += [
            _line(tick, 0, tick, height, "grid"),
            _text(f"{tick}%", height + 16, f"{tick} %", "tick", anchor),
        ]
    return body


def interval_bars(rows: list[tuple[str, float | None, list[float] | None, str]]) -> Markup:
    """A bar for each share 0–1 with its interval as a whisker: (name, share, [lo, hi], note). ""
    where no row has a share.
    """
    known = [(i, *row) for i, row in enumerate(rows) if row[1] is not None]
    if not known:
        return Markup("")
    height = len(known) * 56
    body = _grid(height)
    for place, (series, name, share, interval, note) in enumerate(known):
        assert share is not None
        top = place * 56
        told = percent(share) + (
            f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
        )
        body += [
            _text("0", top + 16, name, "name"),
            _text("100%", top + 16, f"{told}{', ' if note else ''}{note}", "value", "end"),
        ]
        body.append(_bar(0, top + 24, max(100 * share, 0.2), 18, series, f"{name}: {told} {note}"))
        if interval:
            lo, hi, middle = 100 * interval[0], 100 * interval[1], top + 33
            body += [_line(lo, middle, hi, middle, "whisker")]
            body += [_line(end, middle - 6, end, middle + 6, "whisker") for end in (lo, hi)]
    return _svg(height + 24, "accuracy with its 95 % interval", body)


def _by_type(systems: list[dict[str, Any]]) -> Markup:
    """Accuracy by type of question: a group of bars for each type, a colour for each system. ""
    where no system tells it by type.
    """
    types = list(dict.fromkeys(t for s in systems for t in s.get("by_type") or {}))
    if not types:
        return Markup("")
    group = 34 + 14 * len(systems)
    height = len(types) * group
    body = _grid(height)
    for i, kind in enumerate(types):
        found = [(s["by_type"] or {}).get(kind) if s.get("by_type") else None for s in systems]
        counts = {f["n"] for f in found if f}
        body.append(
            _text(
                "0",
                i * group + 16,
                f"{kind} (n = {', '.join(str(n) for n in sorted(counts))})",
                "name",
            )
        )
        for series, (system, cell) in enumerate(zip(systems, found, strict=True)):
            if cell and cell.get("accuracy") is not None:
                title = f"{system['name']}, {kind}: {percent(cell['accuracy'])}, n = {cell['n']}"
                body.append(
                    _bar(
                        0,
                        i * group + 22 + 14 * series,
                        max(100 * cell["accuracy"], 0.2),
                        12,
                        series,
                        title,
                    )
                )
    return legend([s["name"] for s in systems]) + _svg(
        height + 24, "accuracy by type of question", body
    )


def _round_up(value: float) -> float:
    """The next number from `value` > 0 whose quarters are short to write: 1, 2, 3, 4, 6, 8, 10
    times a power of ten; 1 for 0.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 3, 4, 6, 8, 10) if factor * power >= value)


def curve(
    points: list[tuple[float, float]],
    label: str,
    series: int = 0,
    top: float | None = None,
    unit: str = "step",
) -> Markup:
    """A line through (step, value) points, values from 0 to `top` or their maximum. "" for fewer
    than two points.
    """
    if len(points) < 2:
        return Markup("")
    points = sorted(points)
    first, last = points[0][0], points[-1][0]
    most = top or _round_up(max(value for _, value in points))
    height = 180
    body = []
    for quarter in range(5):
        y = height - height * quarter / 4
        body += [
            _line(9, y + 8, 100, y + 8, "grid"),
            _text("0", y + 12, f"{most * quarter / 4:.3g}", "tick"),
        ]
    path = " ".join(
        f"{1000 * (x - first) / max(last - first, 1e-9):.1f},{height - height * y / most:.1f}"
        for x, y in points
    )
    body.append(
        Markup(
            '<svg x="9%" y="8" width="91%" height="{h}" viewBox="0 0 1000 {h}" preserveAspectRatio="none">'
            '<polyline points="{path}" class="l{series}"/></svg>'
        ).format(h=height, path=path, series=series)
    )
    body += [
        _text("9%", height + 28, f"{unit} {first:,.7g}", "tick"),
        _text("100%", height + 28, f"{unit} {last:,.7g}", "tick", "end"),
    ]
    return _svg(
        height + 34,
        f"{label} by {unit}, from {number(points[0][1])} to {number(points[-1][1])}",
        body,
    )


# --------------------------------------------------------------------------------------------------------------
# pictures


def _example(example: dict[str, Any], scale: tuple[float, float] | None) -> dict[str, Any]:
    picture = _scaled(example["image"])
    answers = example.get("by_system") or {"": example.get("answer", "")}
    return {
        "src": _png(picture),
        "width": picture.width,
        "height": picture.height,
        "question": example["question"],
        "expected": example["expected"],
        "answers": [
            {"name": name, "text": text, "right": _same(text, example["expected"])}
            for name, text in answers.items()
        ],
        "looks": _looks(example["view"], scale) if scale and example.get("view") else [],
        "boxes": [
            [f"{100 * v:.2f}%" for v in (x0, y0, x1 - x0, y1 - y0)]
            for x0, y0, x1, y1 in example.get("boxes") or []
        ],
    }


def _looks(view: look.View, scale: tuple[float, float]) -> list[dict[str, Any]]:
    """A small heat map a latent step, and what it shows in words."""
    found = []
    for step in range(len(view.similarities)):
        row, column, top = view.nearest(step)
        drawn = look.panel(view, step, scale, PANEL)
        told = f"latent step {step + 1}: nearest to the visual token in row {row + 1}, column {column + 1}, of {view.grid[0]} x {view.grid[1]}"
        found.append(
            {
                "src": _png(drawn),
                "width": drawn.width,
                "height": drawn.height,
                "alt": told,
                "label": f"{step + 1}: {top:.2f}",
            }
        )
    return found


def _scale(scale: tuple[float, float]) -> dict[str, str]:
    """The colour bar of the heat maps as CSS, its ends in numbers, and what it means."""
    colours = ", ".join("rgb({}, {}, {})".format(*colour) for colour in look.SCALE)
    low, high = (f"{value:.2f}" for value in scale)
    return {
        "gradient": f"linear-gradient(to right, {colours})",
        "low": low,
        "high": high,
        "meaning": look.MEANING,
        "note": look.NOTE,
    }


def _same(answer: str, expected: str) -> bool:
    return answer.strip().casefold() == expected.strip().casefold()


def _scaled(picture: Image.Image) -> Image.Image:
    """A small picture twice as large without smoothing, so that its pixels show; a large one shrunk
    to `WIDEST`.
    """
    picture = picture.convert("RGB")
    if 2 * max(picture.size) <= WIDEST:
        return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    picture.thumbnail((WIDEST, WIDEST))
    return picture


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
