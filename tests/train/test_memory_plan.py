"""`finetune --plan`: what fits on a card, what to lower where it does not, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lvr_lite.bench.experiments.memory_model import config_of
from lvr_lite.commands.train import TrainOptions, plan_finetune
from lvr_lite.config import load_settings
from lvr_lite.model.spec import LatentSpec
from lvr_lite.train.memory import GIB, Shape, Tokens, need, shape_of, stage2, standing_bytes
from lvr_lite.train.memory_plan import largest_picture, lowered
from tests.command_line import Call

NO_CHECKPOINTING = "train.gradient_checkpointing=false"


@pytest.fixture(scope="module")
def shape() -> Shape:
    return shape_of(config_of("3b", None))


def needed(shape: Shape, visual: int, *overrides: str) -> int:
    return need(shape, load_settings(None, overrides), Tokens(visual)).card


@pytest.mark.parametrize(
    "more",
    [
        ["train.batch=2"],
        ["lora.rank=64"],
        ["lora.dropout=0.1"],
        ["train.optimizer=adamw_torch"],
        ["train.precision=fp32"],
        ["latent.method=lvr-free"],
        ["latent.method=lvr-free", "latent.steps=64"],
    ],
)
def test_more_of_anything_needs_more(shape: Shape, more: list[str]) -> None:
    less = more[:-1]
    assert needed(shape, 512, NO_CHECKPOINTING, *less) < needed(shape, 512, NO_CHECKPOINTING, *more)


def test_a_larger_picture_needs_more_and_checkpointing_less(shape: Shape) -> None:
    assert needed(shape, 512) < needed(shape, 512, NO_CHECKPOINTING)
    assert needed(shape, 512, NO_CHECKPOINTING) < needed(shape, 1024, NO_CHECKPOINTING)


@pytest.mark.parametrize("gib", [6.0, 8.0, 12.0])
def test_the_largest_picture_just_fits(shape: Shape, gib: float) -> None:
    largest = largest_picture(shape, load_settings(None), gib)
    assert needed(shape, largest) <= gib * GIB < needed(shape, largest + 1)


def test_no_picture_fits_where_the_weights_do_not(shape: Shape) -> None:
    assert largest_picture(shape, load_settings(None), 3) == 0


@pytest.mark.parametrize(
    ("gib", "visual", "overrides", "lowers"),
    [
        (24.0, 512, [], []),
        (8.0, 1024, [NO_CHECKPOINTING], ["train.gradient_checkpointing"]),
        (
            12.0,
            512,
            ["train.batch=64", "train.accumulation=1"],
            ["train.batch", "train.accumulation"],
        ),
        (8.0, 2048, [], ["max_pixels"]),
        (
            8.0,
            1024,
            [NO_CHECKPOINTING, "train.batch=16"],
            ["train.gradient_checkpointing", "train.batch", "train.accumulation"],
        ),
    ],
)
def test_what_costs_least_is_lowered_first_and_then_it_fits(
    shape: Shape, gib: float, visual: int, overrides: list[str], lowers: list[str]
) -> None:
    choice = lowered(shape, load_settings(None, overrides), visual, gib)
    assert [override.partition("=")[0] for override in choice.overrides] == lowers
    settings = load_settings(None, [*overrides, *choice.overrides])
    assert settings == choice.settings
    if settings.max_pixels is not None:
        visual = settings.max_pixels // shape.pixels_per_token
    assert need(shape, settings, Tokens(visual)).card <= gib * GIB


def test_in_stage_2_fewer_answers_are_drawn_at_once(shape: Shape) -> None:
    settings = load_settings(None, ["grpo.rows=256", "grpo.max_tokens=128", "grpo.beta=0.1"])
    counted = stage2(settings, LatentSpec(8, mode="bottleneck"))
    assert "policy at the start, fp32" in standing_bytes(shape, counted)
    choice = lowered(shape, counted, 512, 16)
    (override,) = choice.overrides
    name, _, rows = override.partition("=")
    assert name == "grpo.rows"
    assert 1 < int(rows) < 256
    assert choice.fits(shape, 16)


def test_the_number_of_samples_a_step_stays(shape: Shape) -> None:
    settings = load_settings(None, ["train.batch=32", "train.accumulation=2"])
    train = lowered(shape, settings, 256, 8).settings.train
    assert train.batch * train.accumulation == 64
    assert train.batch < 32


def test_where_nothing_is_enough_all_is_lowered(shape: Shape) -> None:
    choice = lowered(shape, load_settings(None, ["train.optimizer=adamw_torch"]), 512, 2)
    assert not choice.fits(shape, 2)
    names = {override.partition("=")[0] for override in choice.overrides}
    assert names >= {"train.optimizer", "lora.rank"}


def test_a_plan_knows_the_usual_cards_and_what_latents_cost() -> None:
    overrides = ("latent.method=lvr-free", "train.gradient_checkpointing=true", "max_pixels=100352")
    plan = plan_finetune("tiny", TrainOptions(overrides=overrides))
    assert [card["gib"] for card in plan["cards"]] == [8, 12, 16, 24]
    assert [row["visual_tokens"] for row in plan["pictures"]] == [64, 128, 256, 512, 1024, 2048]
    assert plan["tokens"]["visual"] == 128
    assert plan["notes"][1].startswith("time: lvr-free with gradient checkpointing")


def test_the_command_prints_and_writes_the_plan_and_touches_nothing(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"finetune --model {small_checkpoint} --data none.jsonl --out out --plan --vram 12"
    done = call(*line.split(), "--json", "plan.json")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plan = json.loads(Path("plan.json").read_text())
    assert (plan["schema"], plan["version"]) == ("lvr-lite/plan", 1)
    most = max(plan["phases"].values())
    assert plan["tensors"] == sum(plan["stays"].values()) + most + plan["workspace"]
    (card,) = plan["cards"]
    assert (card["gib"], card["fits"], card["lower"]) == (12, True, [])
    assert "the most" in done.out
