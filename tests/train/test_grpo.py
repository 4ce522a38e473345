"""Stage 2: what is scored is what was drawn, rewards move the policy the right way, and one process
does what two do.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvr_lite.config import load_settings
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import open_source
from lvr_lite.errors import DataError, LvrError, UsageError
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import scene_samples
from lvr_lite.train import load as nf4
from lvr_lite.train.grpo import Donors, Repeated, Roller, advantages, divergence, grpo, objective
from lvr_lite.train.policy import Policy, batch_of, batches_of, readings
from lvr_lite.train.rewards import Answer, accuracy, format, latent_use, math_accuracy, read_rewards

STEPS = 3
SPECS = {
    "open": LatentSpec(STEPS), "open, token": LatentSpec(STEPS, "token"), "open, norm-matched": LatentSpec(STEPS, "norm-matched", norm=6.0),
    "bottleneck": LatentSpec(STEPS, mode="bottleneck"), "bottleneck, norm-matched": LatentSpec(STEPS, "norm-matched", "bottleneck", 6.0),
}  # fmt: skip
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
FEW = [
    "train.steps=2",
    "train.batch=2",
    "train.accumulation=1",
    "train.precision=fp32",
    "train.gradient_checkpointing=false",
]
FEW += [
    "data.count=8",
    "data.eval_count=2",
    "train.save_every=2",
    "train.eval_every=2",
    "train.log_every=1",
    "train.optimizer=sgd",
]
FEW += ["grpo.group=4", "grpo.max_tokens=3", "train.warmup=0"]


# ---------------------------------------------------------------------------------------------------
# drawn and replayed


def asked(runtime: Any) -> list[Prompt]:
    """Prompts of different lengths, one of them without a picture."""
    found = [
        ([p.resize((84, 140)) if i % 2 else p], s.question)
        for i, (s, p) in enumerate(scene_samples(6, 0, "test"))
    ]
    return [
        prepare_prompt(runtime, pictures, question)[0]
        for pictures, question in [*found, ([], "say something")]
    ]


@pytest.fixture(scope="module")
def hesitant(small_model: Any, small_checkpoint: Path) -> tuple[Any, Checkpoint]:
    """The small model, made to reason about every other time: its <|lvr_start|> row is a third as
    likely as all else at prompts' ends.
    """
    checkpoint = read_checkpoint(small_checkpoint)
    model = copy.deepcopy(small_model)
    runtime = TorchRuntime(model, replace(checkpoint, latent=LatentSpec(STEPS)))
    decoding = Decoding(runtime, asked(runtime), Options(max_tokens=1, keep_hidden=True))
    list(decoding)
    states = torch.from_numpy(np.stack([r.hidden[0] for r in decoding.results]))
    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        wanted = (states @ rows.float().T).logsumexp(1) - 1
        rows[checkpoint.processor.tokens.lvr_start] = torch.linalg.lstsq(
            states, wanted[:, None]
        ).solution[:, 0]
    return model, checkpoint


def policy_of(
    model: Any,
    checkpoint: Checkpoint,
    spec: LatentSpec,
    temperature: float,
    latents: str = "recorded",
) -> Policy:
    held = torch.nn.Module()
    held.get_base_model = lambda: model  # type: ignore[assignment]
    return Policy(held, checkpoint.processor.tokens, spec, temperature, latents)


def drawn(
    model: Any, checkpoint: Checkpoint, spec: LatentSpec, temperature: float
) -> list[tuple[Prompt, Result]]:
    runtime = TorchRuntime(model, replace(checkpoint, latent=spec))
    prompts = [prompt for prompt in asked(runtime) for _ in range(3)]
    decoding = Decoding(
        runtime, prompts, Options(max_tokens=5, temperature=temperature, seed=3, keep_scores=True)
    )
    list(decoding)
    return list(zip(prompts, decoding.results, strict=True))


@EVERY_SPEC
@pytest.mark.parametrize(
    ("temperature", "latents"), [(1.0, "recorded"), (0.7, "recorded"), (1.0, "recomputed")]
)
def test_a_replay_gives_the_log_probabilities_that_were_drawn(
    hesitant: tuple[Any, Checkpoint], spec: LatentSpec, temperature: float, latents: str
) -> None:
    model, checkpoint = hesitant
    found = drawn(model, checkpoint, spec, temperature)
    assert len({len(p.ids) for p, _ in found}) > 2, "the prompts are equally long"
    reasoned = [bool(r.latents) for _, r in found]
    assert 3 <= sum(reasoned) < len(found), f"latents in {sum(reasoned)} of {len(found)}"
    made = [readings(p, r, checkpoint.processor.tokens, spec.mode) for p, r in found]
    with torch.no_grad():
        again = policy_of(model, checkpoint, spec, temperature, latents)(batches_of(made)).numpy()
    # the choices of first readings, then those of second ones
    wanted = np.concatenate(
        [
            np.split(r.scores, [len(rows[0].chosen)])[i]
            for i in (0, 1)
            for rows, (_, r) in zip(made, found, strict=True)
        ]
    )
    assert [len(r.scores) for _, r in found] == [len(r.choices) for _, r in found]
    np.testing.assert_allclose(again, wanted, atol=1e-4, rtol=0)
    assert wanted.min() < -1, "nothing unlikely was drawn"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["open", "bottleneck, norm-matched"])
def test_the_gradient_goes_through_recomputed_latents(
    hesitant: tuple[Any, Checkpoint], name: str, checkpointing: bool
) -> None:
    model, checkpoint = copy.deepcopy(hesitant[0]), hesitant[1]
    found = [(p, r) for p, r in drawn(*hesitant, SPECS[name], 1.0) if r.latents and r.tokens]
    batches = batches_of(
        [readings(p, r, checkpoint.processor.tokens, SPECS[name].mode) for p, r in found]
    )
    spoken = torch.cat(
        [~batch["may_start"] for batch in batches]
    )  # what was chosen after the latents
    model.train().double()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = model.get_parameter(
        "model.language_model.layers.0.mlp.down_proj.weight"
    ).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weights.shape, generator=generator, dtype=torch.float64) * weights.std()
    slopes = {}
    for latents in ("recorded", "recomputed"):
        policy = policy_of(model, checkpoint, SPECS[name], 1.0, latents).train()
        (gradient,) = torch.autograd.grad(policy(batches)[spoken].sum(), weights)
        slopes[latents] = float((gradient * direction).sum().detach())
    sides = []
    for side in (1e-3, -1e-3):
        with torch.no_grad():
            weights += side * direction
            sides.append(float(policy(batches)[spoken].sum()))
            weights -= side * direction
    wanted = (sides[0] - sides[1]) / 2e-3
    assert slopes["recomputed"] == pytest.approx(wanted, rel=0.02)
    assert slopes["recorded"] != pytest.approx(wanted, rel=0.1)


def test_answers_to_one_question_read_it_once(
    hesitant: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint = hesitant
    runtime = TorchRuntime(model, replace(checkpoint, latent=SPECS["open"]))
    first, second = asked(runtime)[:2]
    read: list[int] = []
    run = TorchRuntime._run

    def counted(self: TorchRuntime, embeds: np.ndarray, *rest: Any) -> np.ndarray:
        read.append(len(embeds))
        return run(self, embeds, *rest)

    monkeypatch.setattr(TorchRuntime, "_run", counted)
    decoding = Decoding(runtime, [first] * 5 + [second], Options(max_tokens=2, temperature=1.0))
    list(decoding)
    assert read[0] == 2
    assert set(read[1:]) == {6}
    rows = [
        row
        for p, r in zip(decoding.prompts, decoding.results, strict=True)
        for row in readings(p, r, checkpoint.processor.tokens, "open")
    ]
    assert len({tuple(row.chosen) for row in rows[:5]}) > 1, "all answers are alike"
    twice, once = batch_of([*rows, *rows]), batch_of(rows)
    assert len(twice["ids"]) == len(once["ids"]) <= 6
    assert torch.equal(twice["row"], once["row"].repeat(2))


def test_a_row_draws_the_same_whatever_it_is_drawn_beside(hesitant: tuple[Any, Checkpoint]) -> None:
    model, checkpoint = hesitant
    runtime = TorchRuntime(model, replace(checkpoint, latent=SPECS["bottleneck"]))
    prompts = [prepare_prompt(runtime, [p], s.question)[0] for s, p in scene_samples(4, 0, "test")]

    def choices(which: list[int]) -> list[list[int]]:
        decoding = Decoding(
            runtime,
            [prompts[i] for i in which],
            Options(max_tokens=4, temperature=1.0),
            draws=which,
        )
        list(decoding)
        return [r.choices for r in decoding.results]

    assert choices([0, 1, 2, 3]) == choices([0, 1]) + choices([2, 3])


# ------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
# rewards


def sample_of(answer: str, choices: tuple[str, ...] | None = None) -> Sample:
    return Sample("s-1", (), "?", answer, choices)


@pytest.mark.parametrize(
    ("said", "right", "choices", "wanted"),
    [
        ("Red.", "red", None, 1), ("blue", "red", None, 0), ("<answer> red </answer>", "red", None, 1), ("", "red", None, 0),
        ("12.0", "12", None, 1), ("about 12 cats", "12", None, 1), ("12 of 13", "12", None, 0), ("1,200", "1200", None, 1),
        ("11", "12", None, 0),
        ("b", "left", ("right", "left"), 1), ("(B)", "left", ("right", "left"), 1), ("B. left", "left", ("right", "left"), 1),
        ("a", "left", ("right", "left"), 0), ("B. right", "left", ("right", "left"), 0), ("a left", "right", ("right", "left"), 0),
    ],
)  # fmt: skip
def test_accuracy(said: str, right: str, choices: tuple[str, ...] | None, wanted: float) -> None:
    assert accuracy(sample_of(right, choices), Answer(said)) == wanted


@pytest.mark.parametrize(
    ("said", "right", "wanted"),
    [
        ("2x + 2", "2*(x+1)", 1),
        ("y = x^2", "x*x", 1),
        ("1/2", "0.5", 1),
        ("x+1", "x", 0),
        ("__import__('os')", "x", 0),
        ("red", "blue", 0),
        ("(", "x", 0),
    ],
)
def test_math(said: str, right: str, wanted: float) -> None:
    assert math_accuracy(sample_of(right), Answer(said)) == wanted


def test_format_and_latent_use() -> None:
    good = Answer("red", latents=4, own="red", donor="blue")
    assert format(sample_of("red"), good) == 1
    for worse in (
        replace(good, latents=0),
        replace(good, before=1),
        replace(good, ended=False),
        replace(good, text=""),
    ):
        assert format(sample_of("red"), worse) == 0
    assert latent_use(sample_of("red"), good) == 1
    for worse in (replace(good, latents=0), replace(good, donor="red"), replace(good, donor=None)):
        assert latent_use(sample_of("red"), worse) == 0


def test_rewards_are_read_with_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_grpo.py").write_text(
        "def short(sample, answer):\n    return -len(answer.text)\ndef bad(sample, answer):\n    return 1 / 0\n"
    )
    (tmp_path / "broken_of_grpo.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scoring = read_rewards("accuracy, format=0.5, mine_of_grpo:short=0.01")
    assert scoring(sample_of("red"), Answer("red", latents=1)) == {
        "accuracy": 1, "format": 1, "mine_of_grpo:short": -3, "reward": pytest.approx(1.47),
    }  # fmt: skip
    for text, message in (
        ("acuracy", r"acuracy is not known; choose of accuracy"), ("format=much", "weight of format must be a number"), ("", "is empty"),
        ("broken_of_grpo:f", "broken_of_grpo does not import .ModuleNotFoundError"), ("mine_of_grpo:g", "mine_of_grpo has no function g"),
        ("format,format=2", "format is there twice"), ("no_such_module_here:f", "does not import"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            read_rewards(text)
    with pytest.raises(
        LvrError, match=r"reward mine_of_grpo:bad: raised ZeroDivisionError .* on sample s-1, 'red'"
    ):
        read_rewards("mine_of_grpo:bad")(sample_of("red"), Answer("red"))


# ------------------------------------------------------------------------------------------------------------
# whole runs


def reinforce(
    checkpoint: Path, out: Path, *overrides: str, data: str = "scenes", resume: bool = False
) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    settings = load_settings(None, [*FEW, *overrides])
    return grpo(read_checkpoint(checkpoint), data, out, settings, resume, say=said.append), said


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
        "def even(sample, answer):\n    return float(len(answer.text) % 2 == 0)\ndef same(sample, answer):\n    return 0.7\n"
    )
    return folder


def test_a_policy_moves_towards_what_is_paid_for(
    small_tuned: Path, tmp_path: Path, arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(arms))
    metrics, _ = reinforce(
        small_tuned, tmp_path / "out", "grpo.rewards=arms_of_grpo:even", "train.steps=10", "train.batch=4", "grpo.group=16",
        "grpo.max_tokens=1", "train.optimizer=adamw_torch", "train.lr=1e-2", "data.count=64", "grpo.rows=64",
    )  # fmt: skip
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
    metrics, said = reinforce(small_tuned, tmp_path / "whole", *common)
    assert "4 answers to each of 2 questions a step, 2 updates with them" in said[0]
    assert {"reward", "accuracy", "format", "latent-use", "flat", "latents"} <= metrics["history"][
        0
    ].keys()
    (tmp_path / "cut").mkdir()
    subprocess.run(["cp", "-r", tmp_path / "whole" / "checkpoint-2", tmp_path / "cut"], check=True)
    metrics, _ = reinforce(small_tuned, tmp_path / "cut", *common, resume=True)
    assert metrics["steps"] == 4
    assert moved(tmp_path / "whole", tmp_path / "cut") < 1e-6
    assert moved(tmp_path / "whole", small_tuned) > 1e-4
    nf4.load_trained(read_checkpoint(tmp_path / "cut"), torch.float32)


@pytest.mark.processes
def test_two_processes_learn_what_one_does_with_all_questions(
    small_tuned: Path, tmp_path: Path, arms: Path
) -> None:
    run = ["grpo", "--checkpoint", str(small_tuned), "--data", "scenes"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    settings = [
        *FEW,
        "train.lr=0.5",
        "train.steps=2",
        "grpo.max_tokens=2",
        "grpo.rewards=arms_of_grpo:even",
    ]
    environment = os.environ | {"PYTHONPATH": str(arms)}
    for how, batch in ((launch, 2), ([sys.executable], 4)):
        out = [
            "--out",
            str(tmp_path / f"by-{batch}"),
            *(f"--set={o}" for o in [*settings, f"train.batch={batch}"]),
        ]
        done = subprocess.run(
            [*how, "-m", "lvr_lite", *run, *out],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (
            json.loads((tmp_path / f"by-{batch}" / "metrics.json").read_text())["processes"]
            == 4 // batch
        )
    assert moved(tmp_path / "by-2", tmp_path / "by-4") < 1e-5
    assert moved(tmp_path / "by-2", small_tuned) > 1e-3


def test_a_donor_is_the_other_picture_of_which_the_same_is_asked(small_tuned: Path) -> None:
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
    checkpoint = read_checkpoint(small_tuned)
    runtime = TorchRuntime(nf4.load_trained(checkpoint, torch.float32), checkpoint)
    i = next(
        i
        for i, s in enumerate(examples.samples)
        if s.pair is not None and donors.donor_of(s) is not None
    )
    settings = load_settings(None, [*FEW, "grpo.rewards=latent-use"])
    rollouts = Roller(runtime, settings, read_rewards("latent-use"), donors)([examples[i]], 0)
    assert len(rollouts) == 4
    assert all(r.rewards["latent-use"] in (0, 1) for r in rollouts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.replay=skills"], "data.replay is for finetune"),
        (["grpo.updates=2", "train.save_every=3"], "train.save_every must be a multiple of grpo.updates"),
        (["train.batch=64"], "scenes: 8 samples for training, fewer than the 64 of a step"),
        (["grpo.rewards=nothing"], "grpo.rewards: nothing is not known"),
    ],
)  # fmt: skip
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
