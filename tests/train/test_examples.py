"""Which samples a run trains on, replays and holds out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lvr_lite.config import Settings, load_settings
from lvr_lite.errors import DataError, UsageError
from lvr_lite.model.images import open_picture
from lvr_lite.toy.make import scene_samples, skill_samples
from lvr_lite.train.examples import load_examples


def settings(*overrides: str) -> Settings:
    return load_settings(None, ["data.count=16", "data.eval_count=2", *overrides])


def test_no_picture_is_both_trained_on_and_held_out(scenes_file: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in scenes_file.read_text().splitlines()]
    doubled = [
        line
        | {
            "id": f"{line['id']}-{k}",
            "image": str(scenes_file.parent / line["image"]),
            "pair": None,
        }
        for line in lines
        for k in "xy"
    ]
    (tmp_path / "doubled.jsonl").write_text("\n".join(map(json.dumps, doubled)))
    train, held_out = load_examples(str(tmp_path / "doubled.jsonl"), settings())
    assert len(train) + len(held_out) == len(doubled)
    assert not {s.images for s in train.samples} & {s.images for s in held_out.samples}


def test_a_named_file_is_held_out_whole(scenes_file: Path) -> None:
    train, held_out = load_examples(
        str(scenes_file), settings(f"data.eval_file={scenes_file}", "data.eval_count=3")
    )
    assert (len(train), len(held_out)) == (12, 3)


def test_scenes_that_are_held_out_are_not_those_that_eval_scores() -> None:
    _, held_out = load_examples("scenes", settings("data.eval_count=20"))
    scored = {picture.tobytes() for _, picture in scene_samples(60, 0, "test")}
    assert not {pictures[0].tobytes() for _, pictures in held_out.items()} & scored


def test_samples_without_any_box_are_refused(scenes_file: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) | {"boxes": []} for line in scenes_file.read_text().splitlines()]
    for line in lines:
        line["image"] = str(scenes_file.parent / line["image"])
    (tmp_path / "blind.jsonl").write_text("\n".join(map(json.dumps, lines)))
    blind = str(tmp_path / "blind.jsonl")
    with pytest.raises(
        DataError,
        match=r"blind\.jsonl: no sample has boxes.* set latent\.samples=all and latent\.loss=none$",
    ):
        load_examples(blind, settings("latent.method=lvr-free"))
    for method in ("dummy", "lvr"):
        with pytest.raises(DataError, match=r"set latent\.samples=all$"):
            load_examples(blind, settings(f"latent.method={method}"))
    for overrides in (
        ["latent.method=sft"],
        ["latent.method=lvr-free", "latent.loss=none", "latent.samples=all"],
    ):
        assert len(load_examples(blind, settings(*overrides))[0]) == 11


def test_replayed_samples_are_a_share_of_all_and_have_their_own_pictures(
    scenes_file: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (56, 56), (1, 2, 3)).save(tmp_path / "known.png")
    known = [
        {"id": f"known-{i}", "image": "known.png", "question": "q", "answer": "a"} for i in range(2)
    ]
    (tmp_path / "known.jsonl").write_text("\n".join(map(json.dumps, known)))
    replay = [
        f"data.eval_file={scenes_file}",
        f"data.replay={tmp_path / 'known.jsonl'}",
        "data.replay_share=0.25",
    ]
    train, held_out = load_examples(str(scenes_file), settings(*replay))
    # A quarter of 16, two of them twice.
    assert [s.id for s in train.samples[12:]] == ["known-0", "known-1"] * 2
    assert [train[i][0] for i in range(16)] == train.samples[:]
    assert {train[i][1][0].getpixel((0, 0)) for i in range(12, 16)} == {(1, 2, 3)}
    assert train[3][1][0].tobytes() == open_picture(train.samples[3].images[0]).tobytes()
    assert not [s for s in held_out.samples if s.id.startswith("known")]


def test_a_replayed_sample_never_shows_a_held_out_picture(scenes_file: Path) -> None:
    """Replaying the training file itself, from which the last pictures are held out."""
    train, held_out = load_examples(
        str(scenes_file), settings(f"data.replay={scenes_file}", "data.replay_share=0.6")
    )
    held = {s.images for s in held_out.samples}
    # 11 and 16 more.
    assert len(train) == 27
    assert held
    assert not held & {s.images for s in train.samples}
    with pytest.raises(DataError, match="all of its pictures are held out"):
        load_examples(
            str(scenes_file),
            settings(
                f"data.eval_file={scenes_file}", f"data.replay={scenes_file}", "data.eval_count=12"
            ),
        )
    with pytest.raises(
        UsageError, match=r"data\.replay=skils: neither skills nor a file of samples"
    ):
        load_examples("scenes", settings("data.replay=skils"))


def test_replayed_skills_are_of_other_scenes_than_those_that_eval_asks() -> None:
    train, held_out = load_examples(
        "scenes", settings("data.count=40", "data.replay=skills", "data.replay_share=0.5")
    )
    replayed = [train[i] for i in range(40, 80)]
    assert Counter(s.type for s, _ in replayed) == {"caption": 20, "short": 20}
    assert not any(s.boxes for s, _ in replayed)
    asked = {picture.tobytes() for _, picture in skill_samples(60, settings().data.seed)}
    assert not {pictures[0].tobytes() for _, pictures in replayed} & asked
    assert len(held_out) == settings().data.eval_count


def test_one_picture_is_too_few_to_hold_one_out(scenes_file: Path, tmp_path: Path) -> None:
    line = json.loads(scenes_file.read_text().splitlines()[0])
    line["image"] = str(scenes_file.parent / line["image"])
    (tmp_path / "one.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="all samples share one picture"):
        load_examples(str(tmp_path / "one.jsonl"), settings())
