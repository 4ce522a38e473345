"""`finetune --plan`: what fits on a card, what to lower where it does not, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lvr_lite.commands.train import TrainOptions, plan_finetune
from lvr_lite.config import Settings, load_settings
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.train.memory import CONTEXT, GIB, Tokens, Trace, trace_finetune
from lvr_lite.train.memory_plan import Choice, Estimate, Plan, largest_picture, lowered, shallow
from tests.command_line import Call

NO_CHECKPOINTING = "train.gradient_checkpointing=false"


def bytes_of(settings: Settings, visual: int) -> float:
    """A rule that is like a real one: what a setting costs here is its own size."""
    train = settings.train
    layers = 1 if train.gradient_checkpointing else 4
    optimizer = 0 if train.optimizer == "paged_adamw_8bit" else GIB / 4
    return 3 * GIB + optimizer + settings.lora.rank * GIB / 64 + visual * train.batch * layers * 2e6


class RuledPlan(Plan):
    """A plan of that rule, without traces."""

    def estimate(self, settings: Settings) -> Estimate:
        start = bytes_of(settings, 0)
        slope = bytes_of(settings, 1) - start
        return Estimate({"backward": np.array([slope, start])}, np.array([slope, 0.0]))


def asked(visual: int, *overrides: str) -> Choice:
    settings = load_settings(None, [*overrides])
    tokens = Tokens(visual, text=64, answer=16, latents=4)
    whole = Trace(tokens, {}, {"backward": int(bytes_of(settings, visual))}, {}, 0, 0)
    return Choice(RuledPlan(read_checkpoint("tiny"), 1, whole, {}), settings, visual)


@pytest.mark.parametrize("gib", [6.0, 8.0, 12.0])
def test_the_largest_picture_just_fits(gib: float) -> None:
    choice = asked(64)
    largest = largest_picture(choice, gib)
    assert replace(choice, visual=largest).fits(gib)
    assert not replace(choice, visual=largest + 1).fits(gib)


def test_no_picture_fits_where_the_weights_do_not() -> None:
    assert largest_picture(asked(64), 3) == 0


@pytest.mark.parametrize(
    ("visual", "overrides", "lowers"),
    [
        (512, [], []),
        (1024, [NO_CHECKPOINTING], ["train.gradient_checkpointing"]),
        (
            512,
            ["train.batch=8", "train.accumulation=2"],
            ["train.batch", "train.accumulation"],
        ),
        (4096, [], ["max_pixels"]),
    ],
)
def test_what_costs_least_is_lowered_first_and_then_it_fits(
    visual: int, overrides: list[str], lowers: list[str]
) -> None:
    choice = lowered(asked(visual, *overrides), 8)
    assert [override.partition("=")[0] for override in choice.overrides] == lowers
    assert choice.fits(8)
    assert load_settings(None, [*overrides, *choice.overrides]) == choice.settings


def test_where_nothing_is_enough_all_is_lowered() -> None:
    choice = lowered(asked(512, "train.optimizer=adamw_torch"), 2)
    assert not choice.fits(2)
    names = {override.partition("=")[0] for override in choice.overrides}
    assert names >= {"train.optimizer", "lora.rank"}


def test_few_layers_tell_what_all_of_them_take() -> None:
    checkpoint = shallow(read_checkpoint("tiny"), 8)
    settings = load_settings(
        None, ["latent.method=lvr-bottleneck", "max_pixels=100352", "data.eval_count=4"]
    )
    whole = trace_finetune(checkpoint, settings)
    estimate = Plan(checkpoint, 1, whole, {}).estimate(settings)
    visual = whole.tokens.visual
    assert estimate.tensors(visual) == pytest.approx(whole.tensors, rel=0.01)
    for phase, peak in estimate.phases.items():
        assert np.polyval(peak, visual) == pytest.approx(whole.phases[phase], rel=0.03)


def test_the_command_prints_and_writes_the_plan_and_touches_nothing(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"finetune --model {small_checkpoint} --data none.jsonl --out out --plan --vram 12"
    done = call(*line.split(), "--set", "data.eval_count=2", "--json", "plan.json")
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plan = json.loads(Path("plan.json").read_text())
    assert (plan["schema"], plan["version"]) == ("lvr-lite/plan", 1)
    assert plan["tensors"] == max(plan["peaks"].values()) + plan["workspace"]
    assert plan["peaks"][plan["phase"]] == max(plan["peaks"].values())
    assert plan["card"] > plan["tensors"] + CONTEXT
    (card,) = plan["cards"]
    assert (card["gib"], card["fits"], card["lower"]) == (12, True, [])
    assert card["room"] == 12 * GIB - plan["card"]
    assert [row["visual_tokens"] for row in plan["pictures"]] == [64, 256, 512, 1024, 2048]
    assert "the most" in done.out


def test_a_card_that_is_too_small_is_said_to_be() -> None:
    # All is at its lowest: each setting that could be lowered would be traced.
    lowest = ("train.batch=1", "lora.rank=4", "train.optimizer=paged_adamw_8bit")
    overrides = ("data.eval_count=2", "max_pixels=50176", *lowest)
    plan = plan_finetune("tiny", TrainOptions(overrides=overrides), vram=0.3)
    (card,) = plan["cards"]
    assert not card["fits"]
    assert card["room"] < 0
