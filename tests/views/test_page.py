"""The demo's page: whole, self-contained, and safe with whatever a model says."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lvr_lite.errors import OutputError
from lvr_lite.views import charts, page

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Balance(HTMLParser):
    """Fails where a tag is closed that was not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    @property
    def seen(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def results(**more: Any) -> dict[str, Any]:
    fp32 = {
        "name": "fp32",
        "accuracy": 0.8,
        "interval": [0.75, 0.85],
        "n": 96,
        "by_type": {"count": {"n": 16, "accuracy": 0.5}},
        "size_mb": 41.2,
    }
    int4 = {
        "name": "int4",
        "accuracy": None,
        "interval": None,
        "n": 0,
        "by_type": None,
        "ttft_ms": 1234.5,
        "peak_rss_mb": None,
    }
    example = {
        "image": Image.new("RGB", (140, 112), "red"),
        "question": "what colour is it",
        "answer": "red",
        "expected": "red",
        "by_system": {"fp32": " Red", "int4": "<script>alert(1)</script>"},
        "boxes": [[0.1, 0.2, 0.5, 0.6]],
    }
    whole = {
        "systems": [fp32, int4],
        "examples": [example],
        "curve": [
            {"step": 0, "loss": 2.5},
            {"step": 10, "loss": 1.5, "accuracy": 0.2},
            {"step": 20, "loss": 0.5, "accuracy": 0.6},
        ],
        "machine": {
            "cpu": "a CPU",
            "packages": {"numpy": "2"},
            "flags": ["avx2"],
            "governor": None,
        },
        "commands": ["lvr-lite finetune --model tiny", "lvr-lite export a b"],
        "minutes": {"fine-tune": 7.25},
    }
    return whole | more


def written(tmp_path: Path, **more: Any) -> tuple[str, Balance]:
    page.write_page(results(**more), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    parsed = Balance()
    parsed.feed(html)
    assert parsed.open == []
    return html, parsed


def test_the_page_shows_all_it_was_given(tmp_path: Path) -> None:
    _, parsed = written(tmp_path)
    for word in (
        "fp32",
        "80.0 %",
        "75.0 % to 85.0 %",
        "1,23",
        "count (n = 16)",
        "what colour is it",
        "a CPU",
        "numpy 2",
        "lvr-lite export a b",
        "7.25",
    ):
        assert word in parsed.text
    assert {"table", "svg", "rect", "polyline", "img"} <= parsed.seen


def test_the_page_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    html, parsed = written(tmp_path)
    assert not {"script", "link", "iframe"} & parsed.seen
    assert not re.search(r"https?:|@import|url\(", html)
    assert set(re.findall(r'src="(.{10})', html)) == {"data:image"}


def test_what_a_model_says_is_text_and_never_markup(tmp_path: Path) -> None:
    html, parsed = written(tmp_path)
    assert "<script>" not in html
    assert "<script>alert(1)</script>" in parsed.text


def test_answers_are_marked_right_and_wrong_by_more_than_a_colour(tmp_path: Path) -> None:
    _, parsed = written(tmp_path)
    assert re.search(r"✓\s+Red", parsed.text)
    assert re.search(r"✗\s+<script", parsed.text)


def test_boxes_lie_over_the_picture(tmp_path: Path) -> None:
    _, parsed = written(tmp_path)
    sides = ("x", "y", "width", "height")
    boxes = [[attrs.get(side) for side in sides] for tag, attrs in parsed.elements if tag == "rect"]
    assert ["10.00%", "20.00%", "40.00%", "40.00%"] in boxes


def test_a_bare_result_gives_a_page_without_empty_sections(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "examples": [],
        "curve": [],
        "machine": None,
        "commands": None,
        "minutes": {},
    }
    html, _ = written(tmp_path, systems=[{"name": "fp32"}], **nothing)
    assert all(
        f"<h2>{title}</h2>" not in html
        for title in (
            "Accuracy",
            "Training",
            "Machine",
            "Time it took",
            "Pictures, questions, answers",
        )
    )


def test_small_pictures_grow_with_sharp_pixels_and_large_ones_shrink() -> None:
    small = Image.new("RGB", (2, 1))
    small.putpixel((1, 0), (255, 0, 0))
    assert page._scaled(small).size == (4, 2)
    assert page._scaled(small).getpixel((1, 1)) == (0, 0, 0)
    assert max(page._scaled(Image.new("L", (4000, 1000))).size) == page.WIDEST


def test_a_picture_that_is_drawn_is_not_changed() -> None:
    large = Image.new("RGB", (1000, 900))
    page._scaled(large)
    assert large.size == (1000, 900)


def test_stacked_bars_are_as_long_as_their_values() -> None:
    chart = charts.stacked_bars([("a", [1.0, 3.0]), ("b", [1.0, 0.0])], ["x", "y"], "ms")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)%"', chart)]
    assert np.array(widths) / 25 == pytest.approx([1, 3, 1], abs=0.02)
    assert charts.stacked_bars([], ["x"], "ms") == ""


def test_a_curve_needs_two_points() -> None:
    assert charts.curve([(0, 1.0)], "loss") == ""
    assert "<polyline" in charts.curve([(5, 1.0), (9, 0.0)], "loss")


def test_numbers_are_short() -> None:
    assert [charts.number(v) for v in (None, 0.0, 0.12345, 14.0, 123.4, 1234.5)] == [
        "–",
        "0",
        "0.123",
        "14.0",
        "123",
        "1,234",
    ]
    assert charts.percent(0.5) == "50.0 %"
    assert charts.words({"a": [1, 2.0], "b": None}) == "a 1 2, b –"


def test_a_page_that_cannot_be_written_is_an_error_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        page.write_page(results(), tmp_path / "report.html")
