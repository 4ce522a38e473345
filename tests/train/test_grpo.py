"""Stage 2: rewards move the policy the right way, and one process does what two do."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvr_lite.config import load_settings
from lvr_lite.data.sources import FileSource, open_source
from lvr_lite.errors import DataError, NotFiniteError, StoppedError, UsageError
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.toy.make import scene_samples
from lvr_lite.train import load as nf4
from lvr_lite.train.grpo import (
    Donors,
    GrpoTrainer,
    Repeated,
    Roller,
    advantages,
    divergence,
    grpo,
    objective,
)
from lvr_lite.train.rewards import read_rewards
from tests.command_line import two_processes
from tests.fakes import Looks, tiles
from tests.short_run import SHORT_RUN

FEW = [
    *SHORT_RUN,
    "data.count=8",
    "train.optimizer=sgd",
    "grpo.group=4",
    "grpo.max_tokens=3",
    "train.warmup=0",
]


# --------------------------------------------------------------------------------------------------
# the objective


def test_advantages_are_standard_deviations_above_the_mean_of_a_group() -> None:
    assert advantages([0, 1, 1, 2]) == pytest.approx([-(2**0.5), 0, 0, 2**0.5])
    assert advantages([0.3] * 5) == [0.0] * 5


def test_the_objective_stops_paying_beyond_the_clip() -> None:
    old = torch.zeros(6, dtype=torch.float64)
    new = torch.tensor([0.0, 1.5, 0.5, 0.0, 1.5, 0.5], dtype=torch.float64).clamp(
        min=1e-9
    ).log() * torch.tensor([0, 1, 1, 0, 1, 1])
    new = new.requires_grad_()
    gain = objective(new, old, torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64), 0.2)
    assert gain.tolist() == pytest.approx([1, 1.2, 0.5, -1, -1.5, -0.8])
    gain.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([1, 0, 0.5, -1, -1.5, 0])


def test_blocks_come_so_often_as_there_are_updates() -> None:
    sampler = Repeated(11, 4, 3, 0)
    order = list(sampler)
    assert len(order) == len(sampler) == 24
    assert order[:4] == order[4:8] == order[8:12] != order[12:16] == order[16:20]
    assert len(set(order)) == 8
    sampler.set_epoch(1)
    assert list(sampler) != order


# --------------------------------------------------------------------------------------------------
# whole runs


def reinforce(
    checkpoint: Path, out: Path, *overrides: str, data: str = "scenes", resume: bool = False
) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    settings = load_settings(None, [*FEW, *overrides])
    return grpo(read_checkpoint(checkpoint), data, out, settings, resume, say=lines.append), lines


def moved(before: Path, after: Path) -> float:
    a, b = (load_file(str(folder / "adapter_model.safetensors")) for folder in (before, after))
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module of rewards: for answers whose text has an even number of letters, and the same for
    all.
    """
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "arms_of_grpo.py").write_text(
        "def even(sample, answer):\n    return float(len(answer.text) % 2 == 0)\n"
        "def same(sample, answer):\n    return 0.7\n"
    )
    return folder


def test_a_policy_moves_towards_what_is_paid_for(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    metrics, _ = reinforce(
        small_tuned,
        tmp_path / "out",
        "grpo.rewards=arms_of_grpo:even",
        "train.steps=10",
        "train.batch=4",
        "grpo.group=16",
        "grpo.max_tokens=1",
        "train.optimizer=adamw_torch",
        "train.lr=1e-2",
        "data.count=64",
        "grpo.rows=64",
    )
    paid = [entry["reward"] for entry in metrics["history"] if "reward" in entry]
    assert len(paid) == 10
    assert np.mean(paid[-3:]) > np.mean(paid[:3]) + 0.2, paid


def test_equal_rewards_teach_nothing(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    metrics, _ = reinforce(
        small_tuned, tmp_path / "out", "grpo.rewards=arms_of_grpo:same", "train.lr=1e-2"
    )
    assert moved(small_tuned, tmp_path / "out") == 0
    assert [entry["flat"] for entry in metrics["history"] if "flat" in entry] == [1.0, 1.0]


def test_the_divergence_pulls_back_to_the_start() -> None:
    now = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    start = torch.tensor([-1.0, -1.0, -2.0])
    apart = divergence(now, start)
    assert apart[0] == 0
    assert (apart[1:] > 0).all()
    apart.sum().backward()
    assert now.grad is not None
    assert torch.equal(now.grad.sign(), (now - start).sign()), "descending leads away"


def test_the_start_is_what_the_run_began_with(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    common = ["grpo.rewards=arms_of_grpo:even", "train.steps=4", "train.lr=0.1", "grpo.updates=2"]
    far = []
    for beta in (0, 1):
        metrics, _ = reinforce(small_tuned, tmp_path / f"{beta}", *common, f"grpo.beta={beta}")
        kl = [entry["kl"] for entry in metrics["history"] if "kl" in entry]
        assert (kl[0] == pytest.approx(0, abs=1e-6) and max(kl) > 0) if beta else not kl
        far.append(moved(small_tuned, tmp_path / f"{beta}"))
    assert 0 < far[1] != far[0] > 0


@pytest.mark.parametrize("latents", ["recorded", "recomputed"])
def test_gradient_checkpointing_learns_the_same(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch, latents: str
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    common = ("grpo.rewards=arms_of_grpo:even", "train.lr=0.1", f"grpo.latents={latents}")
    for on in ("true", "false"):
        reinforce(small_tuned, tmp_path / on, *common, f"train.gradient_checkpointing={on}")
    assert moved(tmp_path / "true", tmp_path / "false") < 1e-6
    assert moved(tmp_path / "true", small_tuned) > 1e-4


def test_pictures_stay_as_large_as_they_were_tuned_on(
    small_tuned: Path, tmp_path: Path, copied: Any
) -> None:
    tuned = copied(small_tuned)
    config = json.loads((tuned / "lvr_config.json").read_text())
    (tuned / "lvr_config.json").write_text(json.dumps(config | {"image": {"max_pixels": 6272}}))
    for overrides, wanted in (([], 6272), (["max_pixels=3136"], 3136)):
        reinforce(tuned, tmp_path / f"{wanted}", "train.steps=1", *overrides)
        assert read_checkpoint(tmp_path / f"{wanted}").processor.image.max_pixels == wanted


def test_a_run_goes_on_where_it_was_stopped(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    common = [
        "train.steps=4",
        "train.lr=0.5",
        "grpo.updates=2",
        "grpo.rewards=accuracy=1,format=0.2,latent-use=0.1,arms_of_grpo:even",
    ]
    common += ["data.count=64"]
    metrics, lines = reinforce(small_tuned, tmp_path / "whole", *common)
    assert "4 answers to each of 2 questions a step, 2 updates with them" in lines[0]
    assert {"reward", "accuracy", "format", "latent-use", "flat", "latents"} <= metrics["history"][
        0
    ].keys()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    with pytest.raises(UsageError, match=r"\(grpo\.group: 8, and 4 then\); go on with"):
        reinforce(small_tuned, tmp_path / "cut", *common, "grpo.group=8", resume=True)
    # The run's own result is tuned further, and is another start.
    with pytest.raises(UsageError, match="was begun from another checkpoint"):
        reinforce(tmp_path / "whole", tmp_path / "cut", *common, resume=True)
    metrics, _ = reinforce(small_tuned, tmp_path / "cut", *common, resume=True)
    assert metrics["steps"] == 4
    assert moved(tmp_path / "whole", tmp_path / "cut") < 1e-6
    assert moved(tmp_path / "whole", small_tuned) > 1e-4
    nf4.load_trained(read_checkpoint(tmp_path / "cut"), torch.float32)


@pytest.mark.processes
def test_two_processes_learn_what_one_does_with_all_questions(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        "train.lr=0.5",
        "train.steps=2",
        "grpo.max_tokens=2",
        "grpo.rewards=arms_of_grpo:even",
    ]
    run = ("grpo", "--checkpoint", small_tuned, "--data", "scenes", "--out", tmp_path / "by-2")
    overrides = [f"--set={o}" for o in (*FEW, *settings, "train.batch=2")]
    two_processes(*run, *overrides, path=arms)
    monkeypatch.syspath_prepend(str(arms))
    reinforce(small_tuned, tmp_path / "by-4", *settings, "train.batch=4")
    for batch, processes in ((2, 2), (4, 1)):
        metrics = json.loads((tmp_path / f"by-{batch}" / "metrics.json").read_text())
        assert metrics["processes"] == processes
    assert moved(tmp_path / "by-2", tmp_path / "by-4") < 1e-5
    assert moved(tmp_path / "by-2", small_tuned) > 1e-3


def test_a_donor_is_the_other_picture_of_which_the_same_is_asked() -> None:
    examples = open_source("scenes", "train", 0, 200)
    donors = Donors(examples)
    found = [(s, donors.donor_of(s)) for s in examples.samples if s.pair is not None]
    assert found
    for sample, item in found:
        if item is not None:
            assert (item[0].question, item[0].pair) == (sample.question, sample.pair)
            assert item[0].answer != sample.answer
    with pytest.raises(DataError, match="latent-use needs pairs"):
        Donors(open_source("scenes", "train", 0, 1))


@pytest.mark.parametrize(("uses", "reward"), [("latents", 1), ("picture", 0)])
def test_latents_are_paid_for_where_the_donors_would_change_the_answer(
    tmp_path: Path, uses: str, reward: int
) -> None:
    samples = []
    for sample, (picture,) in tiles(4):
        picture.save(tmp_path / f"{sample.id}.png")
        images = (tmp_path / f"{sample.id}.png",)
        samples.append(replace(sample, images=images, pair=sample.question))
    source = FileSource(samples)
    settings = load_settings(None, [*FEW, "grpo.temperature=0.01"])
    roller = Roller(Looks(uses), settings, read_rewards("latent-use"), Donors(source))
    rollouts = roller([source[0], source[3]], 0)
    assert [rollout.rewards["latent-use"] for rollout in rollouts] == [reward] * 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.replay=skills"], "data.replay is for finetune"),
        (
            ["grpo.updates=2", "train.save_every=3"],
            "train.save_every must be a multiple of grpo.updates",
        ),
        (["train.batch=64"], "scenes: 8 samples for training, fewer than the 64 of a step"),
        (["grpo.rewards=nothing"], "grpo.rewards: nothing is not known"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    small_tuned: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        reinforce(small_tuned, tmp_path / "out", *overrides)


def test_a_base_model_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not tuned with latents"):
        reinforce(small_checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_need_no_boxes(small_tuned: Path, tmp_path: Path) -> None:
    lines = []
    for sample, picture in scene_samples(6, 0, "train"):
        picture.save(tmp_path / f"{sample.id}.png")
        lines.append(
            {
                "id": sample.id,
                "image": f"{sample.id}.png",
                "question": sample.question,
                "answer": sample.answer,
            }
        )
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metrics, _ = reinforce(
        small_tuned, tmp_path / "out", "train.steps=1", data=str(tmp_path / "plain.jsonl")
    )
    assert metrics["steps"] == 1


# --------------------------------------------------------------------------------------------------
# numbers that are not finite, and signals


def test_a_step_whose_rewards_are_not_finite_is_skipped_and_named(
    small_tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "early_nan.py").write_text(
        "calls = 0\n"
        "def reward(sample, answer):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return float('nan') if calls == 1 else calls % 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    metrics, _ = reinforce(small_tuned, tmp_path / "out", "grpo.rewards=early_nan:reward")
    (skipped,) = metrics["skipped"]
    assert (skipped["step"], len(skipped["samples"])) == (1, 2)
    said = capsys.readouterr().out
    assert "step 1: reward early_nan:reward: gave nan on sample" in said
    assert "step 1: skipped, its loss is not finite" in said
    assert [h["step"] for h in metrics["history"] if "reward" in h] == [2]


def test_a_step_whose_answers_are_drawn_from_nan_is_skipped(
    small_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(logits: torch.Tensor, *others: Any) -> list[int]:
        calls.append(1)
        if len(calls) == 1:
            logits[:] = torch.nan
        return draw(logits, *others)

    calls: list[int] = []
    draw = TorchRuntime.drawn
    monkeypatch.setattr(TorchRuntime, "drawn", staticmethod(broken))
    metrics, _ = reinforce(small_tuned, tmp_path / "out", "train.steps=2")
    assert [entry["step"] for entry in metrics["skipped"]] == [1]


def test_rewards_beyond_all_numbers_have_no_advantage() -> None:
    with pytest.raises(NotFiniteError, match="the spread of the rewards is"):
        advantages([1e308, -1e308, 1e308])


def test_a_run_stops_where_it_draws_new_answers(
    small_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = GrpoTrainer.training_step

    def signalled(self: GrpoTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, *arguments, **options)

    monkeypatch.setattr(GrpoTrainer, "training_step", signalled)
    updates = ("grpo.updates=2", "train.steps=4", "train.save_every=4")
    with pytest.raises(StoppedError, match="step 2: SIGTERM"):
        reinforce(small_tuned, tmp_path / "out", *updates)
    metrics, _ = reinforce(small_tuned, tmp_path / "out", *updates, resume=True)
    assert metrics["steps"] == 4
