"""--look: the cosines are right, the frame lies on the nearest token, panels share a scale, and a
call without latents is one line.
"""

from __future__ import annotations

import errno
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
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import scene_samples
from lvr_lite.views import look, page
from tests.command_line import Call

K = 3  # latent steps of the small bundles (conftest.py)
WHITE = (255, 255, 255)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


# -------------------------------------------------------------------------------------------------------------
# the numbers


def test_similarities_are_cosines_with_the_tokens_less_their_mean() -> None:
    # Their mean is (2, 0), so what is left is (±1, 0) and (0, ±3).
    features = np.array([[3, 0], [1, 0], [2, 3], [2, -3]], np.float32)
    latents = np.array([[5, 0], [3, 4]], np.float32)
    wanted = np.array([[1, -1, 0, 0], [0.6, -0.6, 0.8, -0.8]])
    np.testing.assert_allclose(look.similarities(latents, features), wanted, atol=1e-6)


def test_what_all_tokens_share_makes_none_of_them_nearer() -> None:
    rng = np.random.default_rng(0)
    latents, features = rng.normal(size=(3, 8)), rng.normal(size=(5, 8))
    shifted = look.similarities(latents, features + 20 * rng.normal(size=8))
    np.testing.assert_allclose(shifted, look.similarities(latents, features), atol=1e-9)


def test_tokens_that_differ_by_rounding_alone_are_near_to_nothing() -> None:
    rng = np.random.default_rng(0)
    features = (np.full((6, 8), 3.0) + 1e-6 * rng.normal(size=(6, 8))).astype(np.float32)
    assert not look.similarities(rng.normal(size=(2, 8)), features).any()
    assert not look.similarities(np.zeros((2, 8)), rng.normal(size=(6, 8))).any()


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


# -------------------------------------------------------------------------------------------------------------
# the drawing


def whites(image: Image.Image) -> tuple[int, int, int, int]:
    """First and last column, first and last row that hold a white pixel."""
    ys, xs = np.nonzero((np.asarray(image) == WHITE).all(-1))
    return int(xs.min()), int(xs.max()), int(ys.min()), int(ys.max())


@pytest.mark.parametrize("token", [0, 6, 7, 11])
def test_the_frame_lies_on_the_token_that_equals_the_latent(token: int) -> None:
    features = np.eye(12, 32, dtype=np.float32)
    view = look.View(grey(80, 60), (3, 4), look.similarities(features[[token]], features))
    row, column = divmod(token, 4)
    assert view.nearest(0)[:2] == (row, column)
    drawn = look.panel(view, 0, look.bounds([view]), side=80)  # cells of 20 x 20 pixels
    assert whites(drawn) == (20 * column, 20 * column + 19, 20 * row, 20 * row + 19)
    middle = drawn.getpixel((20 * column + 10, 20 * row + 10))
    assert middle == pytest.approx(blended(look.SCALE[-1]), abs=1), (
        "the nearest token has the top colour"
    )


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
    scale = look.bounds([first, second])
    assert scale == (-1.0, 1.0)
    sheet = look.heat_maps([first, second], "q", "a")
    side, gap, line = look._SIDE, look._GAP, look._LINE
    for row, view in enumerate([first, second]):
        y = gap + 2 * line + gap + row * (side + 4 + line + gap)
        for step in range(2):
            x = gap + (1 + step) * (side + gap)
            panel = sheet.crop((x, y, x + side, y + side))
            assert panel.tobytes() == look.panel(view, step, scale).tobytes(), (
                f"picture {row}, step {step}"
            )
    low = look.panel(first, 0, scale).getpixel((side // 4, side // 2))
    assert low == look.panel(first, 1, scale).getpixel((side // 4, side // 2))
    assert low != look.panel(
        first, 1, look.bounds([replace(first, similarities=first.similarities[1:])])
    ).getpixel((side // 4, side // 2))


def test_a_sheet_grows_with_what_it_has_to_say() -> None:
    view = look.View(grey(56, 28), (1, 2), np.zeros((9, 2)))
    plain = look.heat_maps([view], "q", "")
    assert look.heat_maps([view], "q", "a", expected="b").height == plain.height + look._LINE
    assert (
        look.heat_maps([view], "why " * 200, "a").height == plain.height + 2 * look._LINE
    )  # three lines at most
    assert plain.width == 5 * (look._SIDE + look._GAP) + look._GAP
    few = look.heat_maps([look.View(grey(56, 28), (1, 2), np.zeros((4, 2)))], "q", "")
    assert plain.height == few.height + look._SIDE // 2 + 4 + look._LINE + look._GAP, (
        "five panels in a line: steps 5 to 9 have a second one"
    )
    boxed = look.heat_maps([view, view], "q", "a", boxes=[(0, 0, 0.5, 1)])
    changed = np.argwhere(
        (np.asarray(boxed) != np.asarray(look.heat_maps([view, view], "q", "a"))).any(-1)
    )
    assert len(changed)
    assert changed[:, 1].max() < look._GAP + look._SIDE / 2 + 1, (
        "the box lies on the picture, not on the panels"
    )
    assert np.ptp(changed[:, 0]) < look._SIDE / 2, "the box lies on the first picture alone"


def test_a_full_disk_leaves_the_drawing_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    look.write_look(tmp_path / "l.png", grey(9, 9))
    before = (tmp_path / "l.png").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"l\.png: cannot be written \(No space left on device\)"):
        look.write_look(tmp_path / "l.png", grey(20, 20))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"l.png": before}


# -------------------------------------------------------------------------------------------------------------
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


# -------------------------------------------------------------------------------------------------------------
# the demo's page


def finished(out: Path, int8: Path) -> str:
    """The page of a demo that has just scored its models."""
    (out / "int8").symlink_to(int8)
    names = ("fp32", "ONNX int8")
    system = dict.fromkeys(("size_mb", "ttft_ms", "tpls_ms", "tpot_ms"))
    systems = [
        {"name": name, "accuracy": 0.5, "interval": [0.4, 0.6], "n": 12} | system for name in names
    ]
    results = {
        "systems": systems,
        "probe": {
            "verdict": "v",
            "n": 4,
            "interventions": {"none": {"n": 3, "accuracy": 0.5, "interval": [0.2, 0.8]}},
        },
        "minutes": {"all": 1.0},
    }
    answers = {name: [{"answer": "red"}] * demo.EXAMPLES for name in names}
    examples = demo._examples(int8, answers)
    page.write_page(results | {"examples": examples}, out / "report.html")
    return (out / "report.html").read_text()


def test_the_page_shows_every_latent_step_of_every_example_with_one_scale(
    small_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _always(monkeypatch, opens=True)
    html = finished(tmp_path, small_int8)
    told = re.findall(
        r'<li><img src="data:image/png;base64,[^"]{500,}"[^>]* alt="latent step (\d): nearest to the visual token in row',
        html,
    )
    assert told == [str(step + 1) for step in range(K)] * demo.EXAMPLES
    assert len(re.findall("linear-gradient", html)) == 1
    assert look.NOTE[1:] in html


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
