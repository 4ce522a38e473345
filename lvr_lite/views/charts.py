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
    magnitude = math.floor(math.log10(abs(value)))
    places = max(0, digits - 1 - magnitude)
    return f"{value:,.{places}f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash for None."""
    if share is None:
        return NONE
    return f"{100 * share:.1f} %"


def words(value: object) -> str:
    """A JSON value for people: lists and objects flattened, a dash for nothing."""
    if value is None or value == "":
        return NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        fields = [f"{key} {words(field)}" for key, field in value.items()]
        return ", ".join(fields) or NONE
    if isinstance(value, list):
        return " ".join(map(words, value)) or NONE
    if isinstance(value, tuple):
        return " ".join(map(words, value))
    return str(value)


# ----------------------------------------------------------------------------------------------
# charts


def _svg(height: float, label: str, body: list[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" width="100%" height="{height}" role="img" aria-label="{label}">'
        "{parts}</svg>"
    ).format(
        height=round(height),
        label=label,
        parts=Markup("").join(body),
    )


def _text(x: str, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup(
        '<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{text}</text>'
    ).format(
        x=x,
        y=y,
        kind=kind,
        anchor=anchor,
        text=text,
    )


def _title(y: float, name: str, value: str) -> list[Markup]:
    """The line of text above a bar: what it is of, and at the right end what it shows."""
    return [
        _text("0", y, name, "name"),
        _text("100%", y, value, "value", "end"),
    ]


def _bar(x: float, y: float, width: float, height: float, series: int, title: str) -> Markup:
    """A bar from x, `width` long, both in percent; y and height in pixels."""
    return Markup(
        '<rect x="{x:.3f}%" y="{y}" width="{width:.3f}%" height="{height}" rx="2" '
        'class="s{colour}"><title>{title}</title></rect>'
    ).format(
        x=x,
        y=y,
        width=width,
        height=height,
        colour=series % SERIES,
        title=title,
    )


def _line(x0: float, y0: float, x1: float, y1: float, kind: str) -> Markup:
    line = Markup('<line x1="{x0:.3f}%" y1="{y0}" x2="{x1:.3f}%" y2="{y1}" class="{kind}"/>')
    return line.format(
        x0=x0,
        y0=y0,
        x1=x1,
        y1=y1,
        kind=kind,
    )


def legend(names: list[str]) -> Markup:
    """The names of series 0, 1, … beside their colours."""
    entry = Markup('<li><i class="s{colour}"></i>{name}</li>')
    entries = [
        entry.format(
            colour=series % SERIES,
            name=name,
        )
        for series, name in enumerate(names)
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries))


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
        body += _title(top + 14, name, f"{number(sum(values))} {unit}")
        for series, value in enumerate(values):
            width = 100 * value / longest
            if width > 0:
                bar = _bar(
                    x=left,
                    y=top + 22,
                    width=max(width - 0.25, 0.05),
                    height=18,
                    series=series,
                    title=f"{name}, {parts[series]}: {number(value)} {unit}",
                )
                body.append(bar)
            left += width
    return legend(parts) + _svg(len(rows) * 52, f"{unit} by part, stacked", body)


def _grid(height: float) -> list[Markup]:
    """Lines at 0, 25, … 100 % of the width with their labels below `height`."""
    anchors = {
        0: "start",
        25: "middle",
        50: "middle",
        75: "middle",
        100: "end",
    }
    body = []
    for tick, anchor in anchors.items():
        line = _line(tick, 0, tick, height, "grid")
        label = _text(f"{tick}%", height + 16, f"{tick} %", "tick", anchor)
        body += [line, label]
    return body


def interval_bars(rows: list[tuple[str, float | None, list[float] | None, str]]) -> Markup:
    """A bar for each share 0–1 with its interval as a whisker: (name, share, [lo, hi], note). ""
    where no row has a share.
    """
    count = sum(share is not None for _, share, _, _ in rows)
    if not count:
        return Markup("")
    height = count * 56
    body = _grid(height)
    top = 0
    for series, (name, share, interval, note) in enumerate(rows):
        if share is None:
            continue
        accuracy = percent(share)
        if interval:
            low, high = (100 * bound for bound in interval)
            accuracy += f" ({low:.1f} to {high:.1f})"
        value = f"{accuracy}, {note}" if note else accuracy
        body += _title(top + 16, name, value)
        bar = _bar(
            x=0,
            y=top + 24,
            width=max(100 * share, 0.2),
            height=18,
            series=series,
            title=f"{name}: {accuracy} {note}",
        )
        body.append(bar)
        if interval:
            body += _whisker(low, high, top + 33)
        top += 56
    return _svg(height + 24, "accuracy with its 95 % interval", body)


def _whisker(low: float, high: float, middle: float) -> list[Markup]:
    """An interval at the height `middle`, with a stroke at either end."""
    return [
        _line(low, middle, high, middle, "whisker"),
        _line(low, middle - 6, low, middle + 6, "whisker"),
        _line(high, middle - 6, high, middle + 6, "whisker"),
    ]


@dataclass(frozen=True)
class TypeBars:
    """The bars of one system: of each type of question (n, share)."""

    name: str
    shares: dict[str, tuple[int, float | None]]


def bars_by_type(systems: list[TypeBars]) -> Markup:
    """Accuracy by type of question: a group of bars for each type, a colour for each system. ""
    without types.
    """
    types: dict[str, None] = {}
    for system in systems:
        types |= dict.fromkeys(system.shares)
    if not types:
        return Markup("")
    group = 34 + 14 * len(systems)
    height = len(types) * group
    body = _grid(height)
    for i, kind in enumerate(types):
        top = i * group
        counts = {system.shares[kind][0] for system in systems if kind in system.shares}
        numbers = ", ".join(map(str, sorted(counts)))
        body.append(_text("0", top + 16, f"{kind} (n = {numbers})", "name"))
        for series, system in enumerate(systems):
            n, share = system.shares.get(kind, (0, None))
            if share is None:
                continue
            bar = _bar(
                x=0,
                y=top + 22 + 14 * series,
                width=max(100 * share, 0.2),
                height=12,
                series=series,
                title=f"{system.name}, {kind}: {percent(share)}, n = {n}",
            )
            body.append(bar)
    names = [system.name for system in systems]
    return legend(names) + _svg(height + 24, "accuracy by type of question", body)


def _round_up(value: float) -> float:
    """The next number from `value` > 0 whose quarters are short to write: 1, 2, 3, 4, 6, 8, 10
    times a power of ten; 1 for 0.
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    candidates = [factor * power for factor in (1, 2, 3, 4, 6, 8, 10)]
    return next(candidate for candidate in candidates if candidate >= value)


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
    first, first_value = points[0]
    last, last_value = points[-1]
    most = top or _round_up(max(value for _, value in points))
    length = max(last - first, 1e-9)
    height = 180
    body = []
    for quarter in range(5):
        y = height - height * quarter / 4
        line = _line(9, y + 8, 100, y + 8, "grid")
        tick = _text("0", y + 12, f"{most * quarter / 4:.3g}", "tick")
        body += [line, tick]
    places = []
    for step, value in points:
        x = 1000 * (step - first) / length
        y = height - height * value / most
        places.append(f"{x:.1f},{y:.1f}")
    polyline = Markup(
        '<svg x="9%" y="8" width="91%" height="{height}" viewBox="0 0 1000 {height}" '
        'preserveAspectRatio="none">'
        '<polyline points="{path}" class="l{series}"/></svg>'
    ).format(
        height=height,
        path=" ".join(places),
        series=series,
    )
    body += [
        polyline,
        _text("9%", height + 28, f"{unit} {first:,.7g}", "tick"),
        _text("100%", height + 28, f"{unit} {last:,.7g}", "tick", "end"),
    ]
    values = f"from {number(first_value)} to {number(last_value)}"
    return _svg(height + 34, f"{label} by {unit}, {values}", body)
