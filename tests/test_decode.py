"""The decode loop on a small recurrent model in numpy that records what it was fed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lvr_lite.decode import Decoding, Options, Prompt, Result, decode
from lvr_lite.errors import UsageError
from lvr_lite.latent import LatentSpec
from lvr_lite.runtime.base import TokenIds

IMAGE, END, OTHER_END, START, LVR, CLOSE, A, B, C, D = range(10)
K, H = 3, 6


class Recurrent:
    """state = tanh(input + mixed state + position): every input and every position changes all that follows."""

    name, family, template, tokenizer, hidden_size = "fake", None, "", None, H
    tokens = TokenIds(image=IMAGE, end=(END, OTHER_END), lvr_start=START, lvr=LVR, lvr_end=CLOSE)

    def __init__(self, steps: int = K) -> None:
        rng = np.random.default_rng(107)  # weights with which the PROMPTS below enter latents at many different times
        self.latent = LatentSpec(steps=steps)
        self.image_spec: dict[str, Any] = {}
        self.table = rng.normal(size=(10, H)).astype(np.float32)
        self.mix = rng.normal(size=(H, H)).astype(np.float32)
        self.out = rng.normal(size=(H, 10)).astype(np.float32)
        self.capacity = 0
        self.fed: list[np.ndarray] = []  # what each step was given
        self.states: list[np.ndarray] = []  # what prefill and each step gave back
        self.headed: list[np.ndarray] = []  # what the head was given
        self.positions: list[np.ndarray] = []

    def encode(self, pixel_values: np.ndarray, grids: list[tuple[int, int]]) -> np.ndarray:
        raise NotImplementedError

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.table[ids]

    def start(self, batch: int, capacity: int) -> None:
        self.state, self.capacity = np.zeros((batch, H), np.float32), capacity

    def _next(self, state: np.ndarray, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        # One row at a time: a batched matmul may round differently, and equality is what is tested.
        rows = [np.tanh(x + s @ self.mix + np.float32(0.1) * p) for s, x, p in zip(state, embeds, positions, strict=True)]
        return np.stack(rows).astype(np.float32)

    def prefill(self, embeds: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        for row, length in enumerate(lengths):
            for i in range(length):
                self.state[row] = self._next(self.state[row, None], embeds[row, i, None], positions[0, row, i, None])[0]
        self.used = int(lengths.max())
        self.states.append(self.state.copy())
        return self.state.copy()

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.used += 1
        assert self.used <= self.capacity, "more steps than start() made room for"
        self.fed.append(embeds.copy())
        self.positions.append(positions.copy())
        self.state = self._next(self.state, embeds, positions)
        self.states.append(self.state.copy())
        return self.state.copy()

    def head(self, hidden: np.ndarray) -> np.ndarray:
        self.headed.append(hidden.copy())
        return np.stack([h @ self.out for h in hidden])


class Scripted(Recurrent):
    """Says these tokens, one a call of the head, whatever it is fed; a token that may not be chosen is the second best."""

    def __init__(self, *script: int, steps: int = K) -> None:
        super().__init__(steps)
        self.script = list(script)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        super().head(hidden)
        logits = np.zeros((1, 10), np.float32)
        logits[0, self.script.pop(0)], logits[0, D] = 9.0, 5.0
        return logits


def prompt(seed: int = 0, length: int = 4, features: int = 2) -> Prompt:
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.full(features, IMAGE), rng.integers(A, D + 1, length)])
    positions = np.tile(np.arange(len(ids)), (3, 1))
    return Prompt(ids, rng.normal(size=(features, H)).astype(np.float32), positions)


def row_events(decoding: Decoding) -> list[list[str]]:
    kinds: list[list[str]] = [[] for _ in decoding.rows]
    for event in decoding:
        kinds[event.row].append(event.kind)
    return kinds


@pytest.mark.parametrize("end", [END, OTHER_END])
def test_text_ends_at_any_end_token_which_is_not_part_of_it(end: int) -> None:
    (result,) = decode(Scripted(A, B, end, C), [prompt()])
    assert (result.tokens, result.reason) == ([A, B], "stop")


def test_text_ends_at_the_limit_without_a_further_step() -> None:
    runtime = Scripted(A, B, C, A, B)
    (result,) = decode(runtime, [prompt()], Options(max_tokens=3))
    assert (result.tokens, result.reason) == ([A, B, C], "length")
    assert len(runtime.fed) == 2  # the last token need not be fed


def test_markers_and_latents_do_not_count_towards_the_limit() -> None:
    (result,) = decode(Scripted(START, A, B, C), [prompt()], Options(max_tokens=2))
    assert (result.tokens, len(result.latents)) == ([A, B], K)


def test_lvr_start_leads_to_exactly_k_steps_fed_with_the_hidden_state_before_each() -> None:
    runtime = Scripted(A, START, B, END)
    (result,) = decode(runtime, [prompt()])
    fed = [row[0] for row in runtime.fed]
    assert np.array_equal(fed[0], runtime.table[A])
    assert np.array_equal(fed[1], runtime.table[START])
    for i in range(2, 2 + K):
        assert np.array_equal(fed[i], runtime.states[i][0])  # states[0] is of the prefill, so states[i] came just before fed[i]
    assert np.array_equal(fed[2 + K], runtime.table[CLOSE])
    assert np.array_equal(fed[3 + K], runtime.table[B])
    assert np.array_equal(np.stack(result.latents), np.stack(fed[2 : 2 + K]))
    assert result.tokens == [A, B]


def test_the_head_is_never_called_on_a_state_inside_the_latents() -> None:
    runtime = Scripted(A, START, B, END)
    decode(runtime, [prompt()])
    spoken = [0, 1, 3 + K, 4 + K]  # after the prefill, after A, after lvr_end, after B
    assert len(runtime.headed) == len(spoken)
    assert all(np.array_equal(h, runtime.states[i]) for h, i in zip(runtime.headed, spoken, strict=True))


def test_positions_go_on_one_by_one_through_text_and_latents() -> None:
    runtime, start = Scripted(A, START, B, END), prompt()
    decode(runtime, [start])
    first = int(start.positions.max()) + 1
    assert [int(p[0]) for p in runtime.positions] == list(range(first, first + len(runtime.positions)))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_number_of_latent_steps_can_be_chosen(steps: int) -> None:
    decoding = Decoding(Scripted(START, A, END), [prompt()], Options(steps=steps))
    assert row_events(decoding) == [["start", *["latent"] * steps, "end", "token", "done"]]


def test_steps_0_forbids_lvr_start() -> None:
    (result,) = decode(Scripted(START, A, END), [prompt()], Options(steps=0))
    assert (result.tokens, result.latents) == ([D, A], [])


def test_latents_come_once() -> None:
    (result,) = decode(Scripted(START, A, START, END), [prompt()])
    assert (result.tokens, len(result.latents)) == ([A, D], K)


@pytest.mark.parametrize("marker", [LVR, CLOSE, IMAGE])
def test_lvr_lvr_end_and_the_image_token_are_never_chosen(marker: int) -> None:
    (result,) = decode(Scripted(marker, END), [prompt()])
    assert result.tokens == [D]


def test_no_end_of_turn_is_chosen_before_min_tokens() -> None:
    (result,) = decode(Scripted(END, OTHER_END, END, A), [prompt()], Options(min_tokens=2))
    assert (result.tokens, result.reason) == ([D, D], "stop")


def test_picture_features_take_the_place_of_the_image_tokens() -> None:
    first, other = prompt(0), prompt(0)
    other = Prompt(other.ids, other.features + 1, other.positions)
    runtimes = Recurrent(), Recurrent()
    for runtime, p in zip(runtimes, (first, other), strict=True):
        decode(runtime, [p], Options(max_tokens=1))
    assert not np.allclose(runtimes[0].states[0], runtimes[1].states[0])


# ---- batches: prompts of several lengths, found so that the rows enter the latents at different times, or never

PROMPTS = [prompt(seed, length=3 + seed % 4, features=1 + seed % 3) for seed in range(10)]


def outcome(result: Result) -> tuple[list[int], str, list[bytes]]:
    return result.tokens, result.reason, [x.tobytes() for x in result.latents]


def test_rows_that_are_in_latents_at_different_times_give_what_each_gives_alone() -> None:
    decoding = Decoding(Recurrent(), PROMPTS, Options(max_tokens=12))
    kinds = row_events(decoding)
    starts = {k.index("start") if "start" in k else None for k in kinds}
    assert len(starts) >= 3, f"the prompts do not enter latents at different times: {starts}"
    for p, result in zip(PROMPTS, decoding.results, strict=True):
        assert outcome(result) == outcome(decode(Recurrent(), [p], Options(max_tokens=12))[0])


def test_rows_that_are_done_do_not_disturb_the_others() -> None:
    decoding = Decoding(Recurrent(), PROMPTS, Options(max_tokens=12))
    kinds = row_events(decoding)
    assert len({len(k) for k in kinds}) > 1
    assert all(k.count("done") == 1 and k[-1] == "done" for k in kinds)


def test_kept_hidden_states_are_one_for_each_state_the_row_used() -> None:
    (result,) = decode(Scripted(A, START, B, END), [prompt()], Options(keep_hidden=True))
    assert len(result.hidden) == 2 + 1 + K + 1 + 1  # A, start; then the states after start, the latents, lvr_end and B


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [r.tokens for r in decode(Recurrent(), PROMPTS, Options(max_tokens=12, temperature=1.5, seed=seed))]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_temperature_0_is_greedy_whatever_the_seed() -> None:
    outcomes = [[outcome(r) for r in decode(Recurrent(), PROMPTS, Options(max_tokens=12, seed=seed, top_p=0.5))] for seed in (0, 1)]
    assert outcomes[0] == outcomes[1] == [outcome(r) for r in decode(Recurrent(), PROMPTS, Options(max_tokens=12))]


def test_the_first_answer_token_is_timed_after_the_latents() -> None:
    (result,) = decode(Scripted(A, START, B, END), [prompt()])
    assert result.ttft is not None
    assert result.ttfa is not None
    assert result.ttft < result.ttfa
    (plain,) = decode(Scripted(A, END), [prompt()], Options(steps=0))
    assert plain.ttft == plain.ttfa


def test_a_model_without_latents_refuses_steps_and_answers_in_text() -> None:
    with pytest.raises(UsageError, match="not tuned for latent steps: use steps 0, not 2"):
        decode(Recurrent(steps=0), [prompt()], Options(steps=2))
    assert decode(Scripted(START, A, END, steps=0), [prompt()])[0].tokens == [D, A]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 33),
        ("steps", -1),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_options_refuse_a_senseless_value_by_name(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field} must .*{value}"):
        Options(**{field: value})  # type: ignore[arg-type]
