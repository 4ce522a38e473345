"""Self-contained HTML pages: the demo's report, and the frame that other pages share.

May import: jinja2, Pillow and what stands above `views`.

Nothing on a page comes from elsewhere: style is inline, charts are inline SVG, pictures are PNG in
base64.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from lvr_lite.files import JsonObject, write_atomically
from lvr_lite.views import look
from lvr_lite.views.charts import (
    TypeBars,
    bars_by_type,
    curve,
    interval_bars,
    number,
    percent,
    words,
)

# Pixels of an enlarged or shrunk picture.
WIDEST = 640
# Pixels of a heat map's longer side.
PANEL = 168
# Of the probe, on the demo's page.
SHOWN_INTERVENTIONS = (
    "noise",
    "donor_unrelated",
    "donor_same_question",
    "oracle",
    "k0",
    "self",
)


def write_page(results: JsonObject, out: Path) -> None:
    """Write the demo's report to the file `out`, one HTML page.

    results: any number may be None, and all fields but "systems" may be missing:
        "systems": [{"name", "accuracy" 0–1, "interval" [lo, hi], "n", "by_type" {type: {"n",
            "accuracy"}}, "size_mb", "ttft_ms", "tpls_ms", "tpot_ms", "peak_rss_mb"}]
        "examples": [{"image" a picture, "question", "answer", "expected", "by_system" {name:
            answer}, "boxes" [[x0, y0, x1, y1], …] normalized, "view" its latent steps
            (`look.View`)}]
        "probe": the JSON of the probe
        "curve": [{"step", "loss", "accuracy"}]
        "machine": {…}
        "commands": [lines]
        "minutes": {stage: minutes}

    Raises OutputError where the file cannot be written.
    """
    systems = results["systems"]
    examples = results.get("examples") or []
    views = [example["view"] for example in examples if example.get("view")]
    scale = look.bounds(views) if views else None
    points = results.get("curve") or []
    html = render_page(
        "demo.html.j2",
        systems=systems,
        accuracy=interval_bars([_accuracy_bar(system) for system in systems]),
        by_type=bars_by_type([_type_bars(system) for system in systems]),
        probe=_probe(results.get("probe")),
        loss=curve(_known(points, "loss"), "loss"),
        learned=curve(_known(points, "accuracy"), "accuracy", series=1, top=1.0),
        examples=[_example(example, scale) for example in examples],
        scale=_scale(scale) if scale else None,
        machine=results.get("machine") or {},
        commands=results.get("commands") or [],
        minutes=results.get("minutes") or {},
    )
    write_atomically(out, html)


def _accuracy_bar(system: JsonObject) -> tuple[str, float | None, list[float] | None, str]:
    note = ""
    if system.get("n"):
        note = f"n = {system['n']}"
    return system["name"], system.get("accuracy"), system.get("interval"), note


def _type_bars(system: JsonObject) -> TypeBars:
    shares = {}
    by_type = system.get("by_type") or {}
    for kind, score in by_type.items():
        if score:
            shares[kind] = (score["n"], score.get("accuracy"))
    return TypeBars(system["name"], shares)


def _known(points: list[JsonObject], name: str) -> list[tuple[float, float]]:
    """(step, value) of the points that have the value."""
    return [(point["step"], point[name]) for point in points if point.get(name) is not None]


def _probe(probed: JsonObject | None) -> JsonObject | None:
    """The verdict of `lvr-lite probe` on the demo's int8 bundle, and accuracy by what the latent
    steps were fed, as bars.
    """
    if probed is None:
        return None
    effects = probed["interventions"]
    # Of the items that the interventions concern, not of all.
    bars = [_effect_bar("own latents", effects["none"])]
    for name, effect in effects.items():
        if name in SHOWN_INTERVENTIONS and effect["accuracy"] is not None:
            bars.append(_effect_bar(name.replace("_", " "), effect))
    return {"verdict": probed["verdict"], "bars": interval_bars(bars)}


def _effect_bar(name: str, effect: JsonObject) -> tuple[str, float | None, list[float] | None, str]:
    note = f"n = {effect['n']}"
    return name, effect["accuracy"], effect["interval"], note


def render_page(template: str, **values: object) -> str:
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


# ----------------------------------------------------------------------------------------------
# pictures


def _example(example: JsonObject, scale: tuple[float, float] | None) -> JsonObject:
    picture = _scaled(example["image"])
    expected = example["expected"]
    texts = example.get("by_system") or {"": example.get("answer", "")}
    answers = []
    for name, text in texts.items():
        right = _same(text, expected)
        answers.append({"name": name, "text": text, "right": right})
    boxes = []
    for x0, y0, x1, y1 in example.get("boxes") or []:
        sides = (x0, y0, x1 - x0, y1 - y0)
        boxes.append([f"{100 * side:.2f}%" for side in sides])
    view = example.get("view")
    return {
        "src": _png(picture),
        "width": picture.width,
        "height": picture.height,
        "question": example["question"],
        "expected": expected,
        "answers": answers,
        "looks": _looks(view, scale) if scale and view else [],
        "boxes": boxes,
    }


def _looks(view: look.View, scale: tuple[float, float]) -> list[JsonObject]:
    """A small heat map a latent step, and what it shows in words."""
    rows, columns = view.grid
    looks: list[JsonObject] = []
    for step in range(len(view.similarities)):
        row, column, top = view.nearest(step)
        panel = look.panel(view, step, scale, PANEL)
        place = f"row {row + 1}, column {column + 1}, of {rows} x {columns}"
        step_look: JsonObject = {
            "src": _png(panel),
            "width": panel.width,
            "height": panel.height,
            "alt": f"latent step {step + 1}: nearest to the visual token in {place}",
            "label": f"{step + 1}: {top:.2f}",
        }
        looks.append(step_look)
    return looks


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
    encoded = base64.b64encode(file.getvalue())
    return f"data:image/png;base64,{encoded.decode('ascii')}"
