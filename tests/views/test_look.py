"""--look: the cosines are right, the frame lies on the nearest token, panels share a scale, and a
call without latents is one line.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvr_lite.commands import demo
from lvr_lite.errors import OutputError, UsageError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Result
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.images import open_picture
from lvr_lite.model.latents import likeness
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import scene_samples
from lvr_lite.views import look, page
from tests.command_line import Call

K = 3  # latent steps of the small bundles (conftest.py)
WHITE = (255, 255, 255)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


# --------------------------------------------------------------------------------------------------
# the numbers


def test_colours_run_over_the_scale_and_stop_at_its_ends() -> None:
    found = look.colours(np.array([-1.0, 0.0, 0.25, 0.5, 9.0]), 0, 0.5)
    middle = np.add(look.SCALE[4], look.SCALE[5]) / 2
    assert [tuple(c) for c in found[[0, 1, 3, 4]]] == [
        look.SCALE[0],
        look.SCALE[0],
        look.SCALE[-1],
        look.SCALE[-1],
    ]
    assert np.abs(found[2] - middle).max() <= 0.5
    lightness = look.colours(np.linspace(0, 1, 50), 0, 1) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


# --------------------------------------------------------------------------------------------------
# the drawing


def whites(image: Image.Image) -> tuple[int, int, int, int]:
    """First and last column, first and last row that hold a white pixel."""
    ys, xs = np.nonzero((np.asarray(image) == WHITE).all(-1))
    return int(xs.min()), int(xs.max()), int(ys.min()), int(ys.max())


@pytest.mark.parametrize("token", [0, 6, 7, 11])
def test_the_frame_lies_on_the_token_that_equals_the_latent(token: int) -> None:
    features = np.eye(12, 32, dtype=np.float32)
    view = look.View(grey(80, 60), (3, 4), likeness(features[[token]], features))
    row, column = divmod(token, 4)
    assert view.nearest(0)[:2] == (row, column)
    drawn = look.panel(view, 0, look.bounds([view]), side=80)  # cells of 20 x 20 pixels
    assert whites(drawn) == (20 * column, 20 * column + 19, 20 * row, 20 * row + 19)
    middle = drawn.getpixel((20 * column + 10, 20 * row + 10))
    assert middle == pytest.approx(blended(look.SCALE[-1]), abs=1)


def test_the_frame_around_a_tiny_token_can_be_seen() -> None:
    view = look.View(grey(64, 64), (64, 64), np.eye(1, 4096, 64 * 20 + 30))
    assert whites(look.panel(view, 0, (0, 1), side=64)) == (25, 35, 15, 25)
    corner = look.View(grey(64, 64), (64, 64), np.eye(1, 4096, 4095))
    assert whites(look.panel(corner, 0, (0, 1), side=64)) == (58, 63, 58, 63)


def blended(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(look._TINT * c + (1 - look._TINT) * look._DIM * 90 for c in colour)


def test_panels_of_all_steps_and_pictures_share_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    first = look.View(grey(56, 56), (1, 2), np.array([[0.0, 0.5], [0.0, 0.25]]))
    second = look.View(grey(56, 56), (2, 1), np.array([[0.2, 0.5], [1.0, -1.0]]))
    panel = look.panel
    scales = []

    def spy(view: look.View, step: int, scale: tuple[float, float]) -> Image.Image:
        scales.append(scale)
        return panel(view, step, scale)

    monkeypatch.setattr(look, "panel", spy)
    look.heat_maps([first, second], "q", "a")
    assert scales == [(-1.0, 1.0)] * 4


def test_a_sheet_has_room_for_what_it_says() -> None:
    def sheet(steps: int, question: str = "q", expected: str | None = None) -> Image.Image:
        view = look.View(grey(56, 28), (1, 2), np.zeros((steps, 2)))
        return look.heat_maps([view], question, "a", expected=expected)

    assert sheet(9, expected="b").height > sheet(9).height
    assert sheet(9).height > sheet(4).height, "steps 5 to 9 have no line of their own"
    assert sheet(9).width == sheet(4).width
    assert sheet(4, "why " * 200).size == sheet(4, "why " * 400).size, "a question is not cut"


def test_boxes_are_drawn_on_the_first_picture_alone() -> None:
    view = look.View(grey(56, 28), (1, 2), np.zeros((4, 2)))
    plain = np.asarray(look.heat_maps([view, view], "q", "a"))
    boxed = np.asarray(look.heat_maps([view, view], "q", "a", boxes=[(0, 0, 1, 1)]))
    rows, columns = np.nonzero((boxed != plain).any(-1))
    assert len(rows)
    assert columns.max() < plain.shape[1] / 5
    assert rows.max() < plain.shape[0] / 2


def test_a_full_disk_leaves_the_drawing_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    look.write_look(tmp_path / "l.png", grey(9, 9))
    before = (tmp_path / "l.png").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"l\.png: cannot be written \(No space left on device\)"):
        look.write_look(tmp_path / "l.png", grey(20, 20))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"l.png": before}


# --------------------------------------------------------------------------------------------------
# a model's


def test_each_picture_is_looked_at_by_its_own_tokens(small_int8: Path) -> None:
    runtime = OnnxRuntime(Bundle.open(small_int8))
    pictures = [picture for _, picture in scene_samples(2, 0, "test")]
    pictures[1] = pictures[1].resize((84, 140))
    prompt, _ = prepare_prompt(runtime, pictures, "what differs")
    told = replace(prompt, features=np.random.default_rng(1).normal(size=prompt.features.shape))
    first, second = look.answer_views(
        runtime, pictures, told, Result(latents=[told.features[2], told.features[-2]])
    )
    assert second.grid == (5, 3)
    assert len(told.features) == first.grid[0] * first.grid[1] + 15
    assert first.similarities.shape == (2, first.grid[0] * first.grid[1])
    assert first.nearest(0)[:2] == (0, 2)
    assert second.nearest(1)[:2] == (4, 1)


def _always(monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    """Every answer of ONNX Runtime opens the latent loop, or none does."""
    head = OnnxRuntime.head

    def forced(self: OnnxRuntime, hidden: np.ndarray) -> np.ndarray:
        logits = np.array(head(self, hidden))
        # Decoding allows the marker once.
        logits[:, self.processor.tokens.lvr_start] = 1e4 if opens else -1e4
        return logits

    monkeypatch.setattr(OnnxRuntime, "head", forced)


@pytest.fixture
def asked(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs `lvr-lite run` in a folder with two pictures."""
    for i, (_, picture) in enumerate(scene_samples(2, 0, "test")):
        picture.save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: call("run", *arguments, "--max-tokens", 3)


def here() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_run_draws_where_its_latents_look_beside_the_same_answer(
    asked: Call, small_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _always(monkeypatch, opens=True)
    plain = asked(small_int8, "0.png", "what is here")
    done = asked(small_int8, "0.png", "what is here", "--look", "new/look.png")
    assert (done.code, done.out) == (0, plain.out)
    assert here() == ["0.png", "1.png", "new"]
    assert f"new/look.png: the nearest visual tokens of {K} latent steps\n" in done.err
    one = open_picture("new/look.png")
    assert one.width == look._GAP + (1 + K) * (look._SIDE + look._GAP)
    asked(small_int8, "0.png", "1.png", "what is here", "--look", "two.png")
    # A second picture has a row of its own.
    assert open_picture("two.png").height > one.height + look._SIDE / 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["0.png", "q", "--steps", "0", "--look", "l.png"],
            2,
            "--look: nothing to look at with --steps 0",
        ),
        (["q", "--look", "l.png"], 2, "--look: nothing to look at without a picture"),
        (
            ["0.png", "q", "--look", "../" + "{here}/0.png"],
            2,
            "0.png: is the picture itself; choose another file",
        ),
        (["0.png", "q", "--look", "0.png/l.png"], 1, "0.png/l.png: cannot be written"),
        (["0.png", "q", "--look", "."], 1, "cannot be written"),
        (["0.png", "q", "--look", ".."], 1, "cannot be written"),
    ],
)
def test_a_look_that_cannot_be_is_one_line(
    asked: Call,
    small_int8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    _always(monkeypatch, opens=True)
    before = (tmp_path / "0.png").read_bytes()
    done = asked(small_int8, *(a.replace("{here}", tmp_path.name) for a in arguments))
    assert done.code == code
    assert said in done.error
    assert here() == ["0.png", "1.png"]
    assert (tmp_path / "0.png").read_bytes() == before


def test_an_answer_without_latents_is_given_and_nothing_is_drawn(
    asked: Call, small_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _always(monkeypatch, opens=False)
    plain = asked(small_int8, "0.png", "what is here")
    done = asked(small_int8, "0.png", "what is here", "--look", "l.png")
    assert (done.code, done.out) == (1, plain.out)
    assert here() == ["0.png", "1.png"]
    assert done.error.startswith("--look: the model answered without latent steps")


@pytest.mark.parametrize(
    ("latent", "said"),
    [
        (LatentSpec(), "not tuned for latent steps"),
        (LatentSpec(steps=2, feedback="token"), "a fixed token in place"),
    ],
)
def test_a_model_without_latents_of_its_own_is_refused(latent: LatentSpec, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        look.refuse(Path("l.png"), ["p.png"], latent, None)
    look.refuse(Path("l.png"), ["p.png"], LatentSpec(steps=2), None)


# --------------------------------------------------------------------------------------------------
# the demo's page


@pytest.mark.parametrize("opens", [True, False])
def test_the_demos_page_shows_every_latent_step_of_every_example(
    small_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    _always(monkeypatch, opens)
    answers = {"ONNX int8": [{"answer": "red"}] * demo.EXAMPLES}
    examples = demo._examples(small_int8, answers)
    page.write_page({"systems": [{"name": "int8"}], "examples": examples}, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    shown = [html.count(f'alt="latent step {step}: nearest to') for step in (1, K, K + 1)]
    assert shown == [demo.EXAMPLES * opens, demo.EXAMPLES * opens, 0]


def test_the_page_has_the_ends_of_the_scale_of_all_its_examples(tmp_path: Path) -> None:
    views = [
        look.View(grey(56, 28), (1, 2), np.array([values]))
        for values in ([0.1, 0.2], [-0.37, 0.93])
    ]
    examples = [
        {"image": v.picture, "question": "q", "expected": "a", "answer": "a", "view": v}
        for v in views
    ]
    page.write_page({"systems": [{"name": "int8"}], "examples": examples}, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert [html.count(f">{end}<") for end in ("-0.37", "0.93", "0.10")] == [1, 1, 0]
