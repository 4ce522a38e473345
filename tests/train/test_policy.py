"""Stage 2: what is scored is what was drawn."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvr_lite.errors import NotFiniteError
from lvr_lite.generate import sampling
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result, Row, decode
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import Checkpoint, read_checkpoint
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import scene_samples
from lvr_lite.train.policy import Policy, batch_of, batches_of, readings

STEPS = 3
SPECS = {
    "open": LatentSpec(STEPS),
    "open, token": LatentSpec(STEPS, "token"),
    "open, norm-matched": LatentSpec(STEPS, "norm-matched", norm=6.0),
    "bottleneck": LatentSpec(STEPS, mode="bottleneck"),
    "bottleneck, norm-matched": LatentSpec(STEPS, "norm-matched", "bottleneck", 6.0),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


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


class Scored(Decoding):
    """Keeps the log-probability of every choice, by row."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.scores: list[list[float]] = [[] for _ in self.rows]

    def _let_choose(self, runtime: Any, hidden: np.ndarray, rows: list[Row]) -> list[int]:
        closed = [self._closed(row) for row in rows]
        tokens = super()._let_choose(runtime, hidden, rows)
        for row, token, logits, shut in zip(
            rows, tokens, runtime.head(hidden), closed, strict=True
        ):
            logits[shut] = -np.inf
            scaled = torch.from_numpy(logits).double() / self.options.temperature
            self.scores[row.number].append(float(scaled.log_softmax(-1)[token]))
        return tokens


def drawn(
    model: Any, checkpoint: Checkpoint, spec: LatentSpec, temperature: float
) -> list[tuple[Prompt, Result]]:
    return [(prompt, result) for prompt, result, _ in scored(model, checkpoint, spec, temperature)]


def scored(
    model: Any, checkpoint: Checkpoint, spec: LatentSpec, temperature: float
) -> list[tuple[Prompt, Result, list[float]]]:
    """Prompts, their answers, and how likely each choice was."""
    runtime = TorchRuntime(model, replace(checkpoint, latent=spec))
    prompts = [prompt for prompt in asked(runtime) for _ in range(3)]
    options = Options(max_tokens=5, temperature=temperature, seed=3)
    decoding = Scored(runtime, prompts, options)
    list(decoding)
    return list(zip(prompts, decoding.results, decoding.scores, strict=True))


@EVERY_SPEC
@pytest.mark.parametrize(
    ("temperature", "latents"), [(1.0, "recorded"), (0.7, "recorded"), (1.0, "recomputed")]
)
def test_a_replay_gives_the_log_probabilities_that_were_drawn(
    hesitant: tuple[Any, Checkpoint], spec: LatentSpec, temperature: float, latents: str
) -> None:
    model, checkpoint = hesitant
    answers = scored(model, checkpoint, spec, temperature)
    found = [(prompt, result) for prompt, result, _ in answers]
    scores = [own for *_, own in answers]
    assert len({len(p.ids) for p, _ in found}) > 2, "the prompts are equally long"
    reasoned = [bool(r.latents) for _, r in found]
    assert 3 <= sum(reasoned) < len(found), f"latents in {sum(reasoned)} of {len(found)}"
    start = checkpoint.processor.tokens.lvr_start
    words_first = [r for _, r in found if start in r.choices[1:]]
    assert words_first, "no answer says a word before it looks"
    made = [readings(p, r, checkpoint.processor.tokens, spec.mode) for p, r in found]
    with torch.no_grad():
        again = policy_of(model, checkpoint, spec, temperature, latents)(batches_of(made)).numpy()
    # the choices of first readings, then those of second ones
    wanted = np.concatenate(
        [
            np.split(own, [len(rows[0].chosen)])[i]
            for i in (0, 1)
            for rows, own in zip(made, scores, strict=True)
        ]
    )
    assert [len(own) for own in scores] == [len(r.choices) for _, r in found]
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


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.6), (1e-300, 1.0)]
)
def test_a_card_draws_what_numpy_draws(
    hesitant: tuple[Any, Checkpoint], temperature: float, top_p: float
) -> None:
    runtime = TorchRuntime(hesitant[0], replace(hesitant[1], latent=SPECS["open"]))
    states = np.random.default_rng(1).normal(size=(40, runtime.hidden_size)).astype(np.float32)
    best = runtime.head(states).argmax(-1)
    closed = [[0, int(id)] for id in best]
    at = [np.random.default_rng(row).random() for row in range(40)]
    chosen = runtime.choose(states, closed, at, temperature, top_p)
    for row, logits in enumerate(runtime.head(states)):
        logits[closed[row]] = -np.inf
        random = np.random.default_rng(row)
        assert chosen[row] == sampling.sample(logits, temperature, top_p, random)
    assert not set(chosen) & {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_not_drawn_from(
    hesitant: tuple[Any, Checkpoint], temperature: float
) -> None:
    runtime = TorchRuntime(*hesitant)
    states = np.full((1, runtime.hidden_size), np.nan, np.float32)
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        runtime.choose(states, [[]], [0.5], temperature, 1.0)


def test_the_keys_and_values_of_a_question_are_held_once(
    hesitant: tuple[Any, Checkpoint],
) -> None:
    runtime = TorchRuntime(hesitant[0], replace(hesitant[1], latent=SPECS["open"]))
    first, second = asked(runtime)[:2]
    options = Options(max_tokens=3, min_tokens=3)
    decoding = Decoding(runtime, [first, second, first, first], options)
    list(decoding)
    steps = len(decoding.clock.text_step) + len(decoding.clock.latent_step)
    longest = max(len(first.ids), len(second.ids))
    for layer in runtime._cache.layers:
        assert layer.shared[0].shape[:3:2] == (2, longest)
        assert layer.keys.shape[:3:2] == (4, steps)
    alone = [decode(runtime, [prompt], options)[0] for prompt in (first, second)]
    answers = [result.choices for result in decoding.results]
    assert answers == [alone[i].choices for i in (0, 1, 0, 0)]
