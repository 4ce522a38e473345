"""The scenes: reproducible, held-out combinations, exact boxes, answers that follow from what is
drawn; and as a data set on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvr_lite.data.sample_files import read_samples
from lvr_lite.errors import DataError, OutputError, UsageError
from lvr_lite.model.checkpoint import processor_of
from lvr_lite.model.images import open_picture
from lvr_lite.toy import questions, scenes
from lvr_lite.toy.drawing import draw
from lvr_lite.toy.make import scene_samples, write_scenes
from lvr_lite.views.preview import preview

Item = tuple[str, scenes.Scene, questions.Question, "str | None"]


@pytest.fixture(scope="module")
def train() -> list[Item]:
    return list(questions.items(seed=5, split="train", count=640))


@pytest.fixture(scope="module")
def test() -> list[Item]:
    return list(questions.items(seed=5, split="test", count=640))


def combinations(items: list[Item]) -> set[tuple[str, str]]:
    return {(t.shape, t.colour) for _, scene, _, _ in items for t in scene.figures}


def test_the_same_seed_draws_the_same_bytes_in_every_version() -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(
            b"".join(repr(s).encode() + p.tobytes() for s, p in scene_samples(24, seed, "test"))
        ).hexdigest()

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_more_scenes_begin_with_the_same_scenes(train: list[Item]) -> None:
    assert list(itertools.islice(questions.items(5, "train", 10_000), 100)) == train[:100]


def test_train_and_test_share_no_scene(train: list[Item], test: list[Item]) -> None:
    assert not {repr(s) for _, s, _, _ in train} & {repr(s) for _, s, _, _ in test}


def test_train_never_shows_a_held_out_combination_not_even_in_odd_ones_and_twins(
    train: list[Item],
) -> None:
    assert {"odd", "odd-letter", "odd-pattern", "pair"} <= {q.type for _, _, q, _ in train}
    assert not combinations(train) & scenes.HELD_OUT
    assert len(combinations(train)) == 56  # and all others


def test_test_shows_every_held_out_combination(test: list[Item]) -> None:
    assert combinations(test) >= scenes.HELD_OUT


def test_question_types_are_balanced_and_ids_unique(train: list[Item]) -> None:
    assert Counter(q.type for _, _, q, _ in train) == dict.fromkeys(questions.QUESTION_TYPES, 80)
    assert len({name for name, *_ in train}) == 640


def test_every_answer_is_among_its_choices(train: list[Item], test: list[Item]) -> None:
    assert all(
        q.answer in q.choices and len(set(q.choices)) == len(q.choices)
        for _, _, q, _ in train + test
    )


def test_shapes_are_unique_within_a_scene(train: list[Item], test: list[Item]) -> None:
    assert all(len({t.shape for t in s.figures}) == len(s.figures) for _, s, _, _ in train + test)


# --------------------------------------------------------------------------------------------------
# answers and boxes


def answer_from_the_scene(scene: scenes.Scene, text: str) -> str:
    """The answer worked out again from the question's words, apart from the code that asks."""
    by_shape = {t.shape: t for t in scene.figures}
    if match := re.fullmatch(r"what (colour|pattern) is the (\w+)", text):
        return str(getattr(by_shape[match[2]], match[1]))
    if match := re.fullmatch(r"what shape is (\w+)", text):
        (thing,) = (t for t in scene.figures if t.colour == match[1])
        return thing.shape
    if match := re.fullmatch(r"what letter is on the (\w+)", text):
        return by_shape[match[1]].glyph
    if match := re.fullmatch(r"left or right of the (\w+) is the (\w+)", text):
        return (
            "left" if by_shape[match[2]].centre()[0] < by_shape[match[1]].centre()[0] else "right"
        )
    if match := re.fullmatch(r"above or below the (\w+) is the (\w+)", text):
        return (
            "above" if by_shape[match[2]].centre()[1] < by_shape[match[1]].centre()[1] else "below"
        )
    if match := re.fullmatch(r"how many are (\w+)", text):
        return scenes.NUMBERS[sum(match[1] in (t.colour, t.pattern) for t in scene.figures)]
    odd = odd_one_out(scene)
    about = {
        "which shape is": odd.shape,
        "what letter is on": odd.glyph,
        "what pattern is": odd.pattern,
    }
    return about[text.removesuffix(" the odd one out")]


def odd_one_out(scene: scenes.Scene) -> scenes.Figure:
    counts = Counter(t.colour for t in scene.figures)
    assert len(counts) == 2
    (thing,) = (t for t in scene.figures if counts[t.colour] == 1)
    return thing


def test_every_answer_follows_from_the_scene(train: list[Item], test: list[Item]) -> None:
    for name, scene, question, _ in train + test:
        assert answer_from_the_scene(scene, question.text) == question.answer, name


def test_the_boxes_are_of_the_things_that_the_question_names(train: list[Item]) -> None:
    for _, scene, question, _ in train:
        named = {t.shape for t in scene.figures if t.shape in question.text.split()}
        boxed = {t.shape for t in question.figures}
        assert named <= boxed
        if question.type == "count":
            assert not boxed, "there is no one place to look at"
        elif question.type.startswith("odd"):
            assert question.figures == (odd_one_out(scene),)
        elif question.type != "position":
            assert len(boxed) == 1


def test_a_thing_changes_pixels_inside_its_box_only_and_fills_it(train: list[Item]) -> None:
    for _, scene, _, _ in train[::12]:
        picture = np.asarray(draw(scene)).astype(int)
        for thing in scene.figures:
            without = np.asarray(
                draw(replace(scene, figures=tuple(t for t in scene.figures if t is not thing)))
            ).astype(int)
            rows, columns = np.nonzero(np.abs(picture - without).sum(-1) > 12)
            x0, y0, x1, y1 = np.array(scene.box(thing)) * ([scene.width, scene.height] * 2)
            assert min(columns) >= x0 - 0.01
            assert max(columns) + 1 <= x1 + 0.01
            assert min(rows) >= y0 - 0.01
            assert max(rows) + 1 <= y1 + 0.01
            slack = max(3, 0.26 * thing.size)  # diamonds and hearts leave a margin
            assert max(columns) + 1 - min(columns) >= thing.size - slack, thing
            assert max(rows) + 1 - min(rows) >= thing.size - slack, thing


def test_boxes_do_not_overlap(train: list[Item]) -> None:
    for _, scene, _, _ in train:
        for a, b in itertools.combinations(map(scene.box, scene.figures), 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_twins_differ_in_one_detail_of_the_thing_that_is_asked_about(
    train: list[Item], test: list[Item]
) -> None:
    pairs = [i for i in train + test if i[3] is not None]
    assert len(pairs) == 160
    for (_, one, first, pair), (_, two, second, same_pair) in zip(
        pairs[::2], pairs[1::2], strict=True
    ):
        assert pair == same_pair
        assert (first.text, one.clutter) == (second.text, two.clutter)
        assert first.answer != second.answer
        ((a, b),) = [(a, b) for a, b in zip(one.figures, two.figures, strict=True) if a != b]
        assert (
            sum(
                getattr(a, f) != getattr(b, f)
                for f in ("shape", "colour", "pattern", "glyph", "x", "y", "size")
            )
            == 1
        )
        assert first.figures == (a,)
        assert second.figures == (b,)


# --------------------------------------------------------------------------------------------------
# the data set


def test_written_scenes_are_read_back_with_their_pictures(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "data", count=25, seed=3, split="test")
    read = read_samples(path)
    for got, (sample, picture) in zip(read, scene_samples(25, 3, "test"), strict=True):
        assert replace(got, images=()) == sample
        assert np.array_equal(np.asarray(Image.open(got.images[0])), np.asarray(picture))
    assert len(list((tmp_path / "data" / "images").iterdir())) == 25


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }

    for name in ("a", "b"):
        write_scenes(tmp_path / name, 14, 0, "train")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_earlier_set_is_replaced_and_other_peoples_files_are_not(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", 20, 0, "train")
    write_scenes(tmp_path / "data", 4, 1, "train")
    assert len(read_samples(tmp_path / "data" / "train.jsonl")) == 4
    assert len(list((tmp_path / "data" / "images").iterdir())) == 4
    with pytest.raises(
        DataError, match=r"holds images/train-1-000000\.png, which is not of an earlier test set"
    ):
        write_scenes(tmp_path / "data", 4, 1, "test")
    (tmp_path / "data" / "images" / "cat.png").write_text("mine")
    with pytest.raises(DataError, match=r"holds images/cat\.png"):
        write_scenes(tmp_path / "data", 4, 1, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: exists"):
        write_scenes(tmp_path / "file", 4, 1, "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, "train"), "count must be 1"),
        ((1, -1, "train"), "seed must be 0 to 999999, not -1"),
        ((1, 1_000_000, "train"), "seed must be 0 to"),
        ((1, 0, "dev"), "train or test, not dev"),
    ],
)
def test_senseless_arguments_are_refused_and_write_nothing(
    arguments: tuple[int, int, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write_scenes(tmp_path / "data", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_preview_washes_out_all_tokens_but_those_that_the_boxes_select(tmp_path: Path) -> None:
    Image.new("RGB", (112, 112), (200, 0, 0)).save(tmp_path / "red.png")
    line = {
        "id": "a",
        "image": "red.png",
        "question": "q " * 200,
        "answer": "ja ✓",
        "boxes": [[0.02, 0.02, 0.24, 0.24]],
    }
    (tmp_path / "s.jsonl").write_text(json.dumps(line))
    samples = read_samples(tmp_path / "s.jsonl")
    preview(samples * 6, 5, tmp_path / "new" / "sheet.png", processor_of("tiny"))
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape[1] == 16 + 4 * 336  # four in a row, and a second row
    assert sheet[16 + 40, 16 + 40].tolist() == [200, 0, 0]
    assert sheet[16 + 120, 16 + 120, 1:].min() > 120


def test_a_preview_shows_pictures_at_the_size_that_the_model_sees(tmp_path: Path) -> None:
    Image.effect_noise((500, 400), 80).convert("RGB").save(tmp_path / "noise.png")
    (tmp_path / "s.jsonl").write_text(
        json.dumps(
            {
                "id": "a",
                "image": "noise.png",
                "question": "q",
                "answer": "a",
                "boxes": [[0, 0, 1, 1]],
            }
        )
    )
    samples = read_samples(tmp_path / "s.jsonl")
    processor = processor_of("tiny")
    rows, columns = processor.token_grid(processor.grid_of(400, 500))
    preview(samples, 1, tmp_path / "sheet.png", processor)
    with Image.open(tmp_path / "sheet.png") as opened:
        sheet = opened.copy()
    assert sheet.width == 16 + columns * 28 + 16
    top = 16 + (columns - rows) * 28 // 2
    shown = np.asarray(sheet.crop((16, top, 16 + columns * 28, top + rows * 28))).astype(int)
    frames, _ = processor.family.frames(open_picture(tmp_path / "noise.png"), processor.image)
    seen = np.asarray(frames[0]).astype(int)
    inside = np.abs(shown - seen).sum(-1)[
        2:26, 2:26
    ]  # of one token: its rim and the grid are drawn over it
    assert inside.max() == 0
    preview(samples, 1, tmp_path / "coarse.png", processor.with_max_pixels(28 * 28 * 12))
    with Image.open(tmp_path / "coarse.png") as coarse:
        assert coarse.width == 16 + 320 + 16  # small ones are enlarged


def test_a_preview_of_nothing_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "data", 2, 0, "train")
    with pytest.raises(DataError, match="no samples to show"):
        preview([], 3, tmp_path / "sheet.png", processor_of("tiny"))
    with pytest.raises(OutputError, match="cannot be written"):
        preview(read_samples(path), 3, tmp_path / "data", processor_of("tiny"))
