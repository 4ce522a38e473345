"""Charts as inline SVG, and numbers in words.

May import: markupsafe.

Charts stretch with their column: lengths are in percent of the width and heights in pixels, so that
text keeps its size on a phone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

# Colours that the style defines.
SERIES = 8
NONE = "–"


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
    if share is None:
        return NONE
    return f"{100 * share:.1f} %"


def words(value: object) -> str:
    """A JSON value for people: lists and objects flattened, a dash for nothing."""
    if value is None or value == [] or value == {} or value == "":
        return NONE
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(v)}" for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(words(v) for v in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


# ----------------------------------------------------------------------------------------------
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
        '<rect x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" rx="2" class="s{}">'
        "<title>{}</title></rect>"
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
        top = i * 52
        left = 0.0
        body += [
            _text("0", top + 14, name, "name"),
            _text("100%", top + 14, f"{number(sum(values))} {unit}", "value", "end"),
        ]
        for series, (part, value) in enumerate(zip(parts, values, strict=True)):
            width = 100 * value / longest
            if width > 0:
                title = f"{name}, {part}: {number(value)} {unit}"
                body.append(_bar(left, top + 22, max(width - 0.25, 0.05), 18, series, title))
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
        accuracy = percent(share)
        if interval:
            accuracy += f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
        value = f"{accuracy}, {note}" if note else accuracy
        title = f"{name}: {accuracy} {note}"
        body.append(_text("0", top + 16, name, "name"))
        body.append(_text("100%", top + 16, value, "value", "end"))
        body.append(_bar(0, top + 24, max(100 * share, 0.2), 18, series, title))
        if interval:
            lo = 100 * interval[0]
            hi = 100 * interval[1]
            middle = top + 33
            body.append(_line(lo, middle, hi, middle, "whisker"))
            body += [_line(end, middle - 6, end, middle + 6, "whisker") for end in (lo, hi)]
    return _svg(height + 24, "accuracy with its 95 % interval", body)


@dataclass(frozen=True)
class TypeBars:
    """The bars of one system: of each type of question (n, share)."""

    name: str
    shares: dict[str, tuple[int, float | None]]


def bars_by_type(systems: list[TypeBars]) -> Markup:
    """Accuracy by type of question: a group of bars for each type, a colour for each system. ""
    without types.
    """
    types = list(dict.fromkeys(kind for system in systems for kind in system.shares))
    if not types:
        return Markup("")
    group = 34 + 14 * len(systems)
    height = len(types) * group
    body = _grid(height)
    for i, kind in enumerate(types):
        top = i * group
        counts = {system.shares[kind][0] for system in systems if kind in system.shares}
        numbers = ", ".join(str(n) for n in sorted(counts))
        body.append(_text("0", top + 16, f"{kind} (n = {numbers})", "name"))
        for series, system in enumerate(systems):
            n, share = system.shares.get(kind, (0, None))
            if share is None:
                continue
            title = f"{system.name}, {kind}: {percent(share)}, n = {n}"
            y = top + 22 + 14 * series
            body.append(_bar(0, y, max(100 * share, 0.2), 12, series, title))
    svg = _svg(height + 24, "accuracy by type of question", body)
    return legend([system.name for system in systems]) + svg


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
            '<svg x="9%" y="8" width="91%" height="{h}" viewBox="0 0 1000 {h}" '
            'preserveAspectRatio="none">'
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
