"""The decode loop on a small recurrent model in numpy that records what it was fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lvr_lite.errors import UsageError
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result, decode
from lvr_lite.generate.prefix import PrefixCache
from lvr_lite.model.spec import LatentSpec
from tests.fakes import (
    CLOSE,
    END,
    IMAGE,
    LVR,
    OTHER_END,
    START,
    A,
    B,
    C,
    D,
    Read,
    Recurrent,
    Scripted,
)

K = 3
H = 6
OPEN = LatentSpec(K)


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
    (result,) = decode(Scripted(A, B, end, C, spec=OPEN), [prompt()])
    assert (result.tokens, result.reason) == ([A, B], "stop")


def test_text_ends_at_the_limit_without_a_further_step() -> None:
    runtime = Scripted(A, B, C, A, B, spec=OPEN)
    (result,) = decode(runtime, [prompt()], Options(max_tokens=3))
    assert (result.tokens, result.reason) == ([A, B, C], "length")
    assert len(runtime.step_inputs) == 2  # the last token need not be fed


def test_markers_and_latents_do_not_count_towards_the_limit() -> None:
    (result,) = decode(Scripted(START, A, B, C, spec=OPEN), [prompt()], Options(max_tokens=2))
    assert (result.tokens, len(result.latents)) == ([A, B], K)


def test_lvr_start_leads_to_exactly_k_steps_fed_with_the_hidden_state_before_each() -> None:
    runtime = Scripted(A, START, B, END, spec=OPEN)
    (result,) = decode(runtime, [prompt()])
    fed = [row[0] for row in runtime.step_inputs]
    assert np.array_equal(fed[0], runtime.table[A])
    assert np.array_equal(fed[1], runtime.table[START])
    for i in range(2, 2 + K):
        assert np.array_equal(
            fed[i], runtime.states[i][0]
        )  # states[0] is of the prefill, so states[i] came just before fed[i]
    assert np.array_equal(fed[2 + K], runtime.table[CLOSE])
    assert np.array_equal(fed[3 + K], runtime.table[B])
    assert np.array_equal(np.stack(result.latents), np.stack(fed[2 : 2 + K]))
    assert result.tokens == [A, B]


def test_the_head_is_never_called_on_a_state_inside_the_latents() -> None:
    runtime = Scripted(A, START, B, END, spec=OPEN)
    decode(runtime, [prompt()])
    spoken = [0, 1, 3 + K, 4 + K]  # after the prefill, after A, after lvr_end, after B
    assert len(runtime.head_inputs) == len(spoken)
    assert all(
        np.array_equal(h, runtime.states[i])
        for h, i in zip(runtime.head_inputs, spoken, strict=True)
    )


def test_positions_go_on_one_by_one_through_text_and_latents() -> None:
    runtime, start = Scripted(A, START, B, END, spec=OPEN), prompt()
    decode(runtime, [start])
    first = int(start.positions.max()) + 1
    assert [int(p[0]) for p in runtime.positions] == list(
        range(first, first + len(runtime.positions))
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_number_of_latent_steps_can_be_chosen(steps: int) -> None:
    decoding = Decoding(Scripted(START, A, END, spec=OPEN), [prompt()], Options(steps=steps))
    assert row_events(decoding) == [["start", *["latent"] * steps, "end", "token", "done"]]


def test_steps_0_forbids_lvr_start() -> None:
    (result,) = decode(Scripted(START, A, END, spec=OPEN), [prompt()], Options(steps=0))
    assert (result.tokens, result.latents) == ([D, A], [])


@pytest.mark.parametrize("mode", ["open", "bottleneck"])
def test_look_always_makes_lvr_start_the_first_choice_and_nothing_else(mode: str) -> None:
    runtime = Scripted(A, B, C, START, END, spec=LatentSpec(K, mode=mode))
    (result,) = decode(runtime, [prompt()], Options(look="always"))
    # The head's A was not taken; a second <|lvr_start|> cannot be chosen.
    assert result.choices == [START, B, C, D, END]
    assert (result.tokens, len(result.latents)) == ([B, C, D], K)
    assert (result.looked, result.look_forced) == (True, True)


def test_look_never_forbids_lvr_start() -> None:
    (result,) = decode(Scripted(START, A, END, spec=OPEN), [prompt()], Options(look="never"))
    assert (result.tokens, result.looked, result.look_forced) == ([D, A], False, False)


def test_a_look_of_the_models_own_is_not_called_forced() -> None:
    (result,) = decode(Scripted(START, A, END, spec=OPEN), [prompt()])
    assert (result.looked, result.look_forced) == (True, False)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_look_is_forced_whatever_the_head_says(temperature: float) -> None:
    """Sampled and greedy, in a batch whose rows would go other ways; with top_p too, under which
    <|lvr_start|> may be out of reach."""
    prompts = [prompt(seed) for seed in range(6)]
    options = Options(temperature=temperature, top_p=0.5, look="always")
    results = decode(Recurrent(OPEN), prompts, options)
    assert [(r.choices[0], r.look_forced) for r in results] == [(START, True)] * 6
    free = decode(Recurrent(OPEN), prompts, Options())
    assert len({r.choices[0] == START for r in free}) == 2, "all rows look by themselves, or none"


def test_look_always_is_refused_where_the_model_cannot_look() -> None:
    with pytest.raises(UsageError, match="recurrent was not tuned for latent steps"):
        Decoding(Recurrent(LatentSpec()), [prompt()], Options(look="always"))


@pytest.mark.parametrize(("look", "steps"), [("always", 0), ("never", 2), ("sometimes", None)])
def test_a_look_that_contradicts_the_steps_is_refused(look: Any, steps: int | None) -> None:
    with pytest.raises(UsageError, match="look"):
        Options(look=look, steps=steps)


def test_latents_come_once() -> None:
    (result,) = decode(Scripted(START, A, START, END, spec=OPEN), [prompt()])
    assert (result.tokens, len(result.latents)) == ([A, D], K)


@pytest.mark.parametrize("marker", [LVR, CLOSE, IMAGE])
def test_lvr_lvr_end_and_the_image_token_are_never_chosen(marker: int) -> None:
    (result,) = decode(Scripted(marker, END, spec=OPEN), [prompt()])
    assert result.tokens == [D]


def test_no_end_of_turn_is_chosen_before_min_tokens() -> None:
    (result,) = decode(
        Scripted(END, OTHER_END, END, A, spec=OPEN), [prompt()], Options(min_tokens=2)
    )
    assert (result.tokens, result.reason) == ([D, D], "stop")


def test_picture_features_take_the_place_of_the_image_tokens() -> None:
    first, other = prompt(0), prompt(0)
    other = Prompt(other.ids, other.features + 1, other.positions)
    runtimes = Recurrent(OPEN), Recurrent(OPEN)
    for runtime, p in zip(runtimes, (first, other), strict=True):
        decode(runtime, [p], Options(max_tokens=1))
    assert not np.allclose(runtimes[0].states[0], runtimes[1].states[0])


# ---- batches: prompts of several lengths, found so that the rows enter the latents at different
# times, or never

PROMPTS = [prompt(seed, length=3 + seed % 4, features=1 + seed % 3) for seed in range(10)]


def outcome(result: Result) -> tuple[list[int], str, list[bytes]]:
    return result.tokens, result.reason, [x.tobytes() for x in result.latents]


def test_rows_that_are_in_latents_at_different_times_give_what_each_gives_alone() -> None:
    decoding = Decoding(Recurrent(OPEN), PROMPTS, Options(max_tokens=12))
    kinds = row_events(decoding)
    starts = {k.index("start") if "start" in k else None for k in kinds}
    assert len(starts) >= 3, f"the prompts do not enter latents at different times: {starts}"
    for p, result in zip(PROMPTS, decoding.results, strict=True):
        assert outcome(result) == outcome(decode(Recurrent(OPEN), [p], Options(max_tokens=12))[0])


def test_rows_that_are_done_do_not_disturb_the_others() -> None:
    decoding = Decoding(Recurrent(OPEN), PROMPTS, Options(max_tokens=12))
    kinds = row_events(decoding)
    assert len({len(k) for k in kinds}) > 1
    assert all(k.count("done") == 1 and k[-1] == "done" for k in kinds)


def test_kept_hidden_states_are_one_for_each_state_the_row_used() -> None:
    (result,) = decode(Scripted(A, START, B, END, spec=OPEN), [prompt()], Options(keep_hidden=True))
    assert (
        len(result.hidden) == 2 + 1 + K + 1 + 1
    )  # A, start; then the states after start, the latents, lvr_end and B


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [
            r.tokens
            for r in decode(
                Recurrent(OPEN), PROMPTS, Options(max_tokens=12, temperature=1.5, seed=seed)
            )
        ]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_temperature_0_is_greedy_whatever_the_seed() -> None:
    outcomes = [
        [
            outcome(r)
            for r in decode(Recurrent(OPEN), PROMPTS, Options(max_tokens=12, seed=seed, top_p=0.5))
        ]
        for seed in (0, 1)
    ]
    assert (
        outcomes[0]
        == outcomes[1]
        == [outcome(r) for r in decode(Recurrent(OPEN), PROMPTS, Options(max_tokens=12))]
    )


def test_the_first_answer_token_is_timed_after_the_latents() -> None:
    (result,) = decode(Scripted(A, START, B, END, spec=OPEN), [prompt()])
    assert result.ttft is not None
    assert result.ttfa is not None
    assert result.ttft < result.ttfa
    (plain,) = decode(Scripted(A, END, spec=OPEN), [prompt()], Options(steps=0))
    assert plain.ttft == plain.ttfa


def test_a_model_without_latents_refuses_steps_and_answers_in_text() -> None:
    with pytest.raises(UsageError, match="not tuned for latent steps: use steps 0, not 2"):
        decode(Recurrent(LatentSpec()), [prompt()], Options(steps=2))
    assert decode(Scripted(START, A, END, spec=LatentSpec()), [prompt()])[0].tokens == [D, A]


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


# ---- what is fed back


def latents_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng([9, seed]).normal(size=(count, H)).astype(np.float32)


def test_norm_matched_feeds_the_state_before_at_one_length() -> None:
    runtime = Scripted(START, B, END, spec=LatentSpec(K, "norm-matched", norm=2.5))
    (result,) = decode(runtime, [prompt()])
    for i in range(1, 1 + K):
        state, fed = runtime.states[i][0], runtime.step_inputs[i][0]
        assert np.linalg.norm(state) != pytest.approx(2.5, rel=0.1)
        np.testing.assert_allclose(fed, 2.5 * state / np.linalg.norm(state), rtol=1e-5)
    assert np.array_equal(np.stack(result.latents), np.concatenate(runtime.step_inputs[1 : 1 + K]))
    assert np.array_equal(runtime.step_inputs[1 + K][0], runtime.table[CLOSE])


def test_token_feedback_feeds_the_row_of_lvr_each_time() -> None:
    runtime = Scripted(START, B, END, spec=LatentSpec(K, "token"))
    (result,) = decode(runtime, [prompt()])
    assert [np.array_equal(fed[0], runtime.table[LVR]) for fed in runtime.step_inputs] == [
        False,
        *[True] * K,
        False,
        False,
    ]
    assert np.array_equal(np.stack(result.latents), np.tile(runtime.table[LVR], (K, 1)))


SPECS = {
    "identity": LatentSpec(K),
    "norm-matched": LatentSpec(K, "norm-matched", norm=2.5),
    "token": LatentSpec(K, "token"),
    "bottleneck": LatentSpec(K, mode="bottleneck"),
    "norm-matched bottleneck": LatentSpec(K, "norm-matched", "bottleneck", 2.5),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@EVERY_SPEC
def test_rows_at_different_places_give_what_each_gives_alone_however_they_are_fed(
    spec: LatentSpec,
) -> None:
    runtime = Recurrent(spec)
    decoding = Decoding(runtime, PICTURES, Options(max_tokens=12, keep_hidden=True))
    starts = {k.index("start") if "start" in k else None for k in row_events(decoding)}
    assert len(starts) >= 3, f"the prompts do not enter latents at different times: {starts}"
    if spec.mode == "bottleneck":
        handed = [read.rows for read in runtime.reads[1:]]
        assert len(handed) >= 3
        assert any(rows is not None and len(rows) > 1 for rows in handed), (
            "no rows are handed over together"
        )
    for p, result in zip(PICTURES, decoding.results, strict=True):
        (alone,) = decode(Recurrent(spec), [p], Options(max_tokens=12, keep_hidden=True))
        assert outcome(result) == outcome(alone)
        assert np.array_equal(np.stack(result.hidden), np.stack(alone.hidden))


# ---- prompts that begin alike


@EVERY_SPEC
def test_a_prompt_that_shares_a_prefix_is_decoded_as_if_it_were_read_whole(
    spec: LatentSpec,
) -> None:
    runtime = Recurrent(spec)
    options = Options(max_tokens=12, keep_hidden=True)
    first = PICTURES[4]
    shared = PrefixCache(int(np.flatnonzero(first.ids == IMAGE)[-1]) + 1)
    other = replace(first, ids=np.append(first.ids[:-1], A))
    assert not np.array_equal(first.ids, other.ids)
    for whole in (first, other, first):
        (result,) = decode(runtime, [replace(whole, prefix=shared)], options)
        (alone,) = decode(Recurrent(spec), [whole], options)
        assert outcome(result) == outcome(alone)
        assert np.array_equal(np.stack(result.hidden), np.stack(alone.hidden))
    rest = len(first.ids) - shared.length
    lengths = [int(read.lengths[0]) for read in runtime.reads if read.rows is None]
    assert lengths == [len(first.ids), rest, rest]


# ---- latents that are given


@pytest.mark.parametrize("count", [0, 1, K, 7])
def test_given_latents_are_fed_instead_of_its_own(count: int) -> None:
    runtime, given = Scripted(START, B, END, spec=OPEN), latents_of(0, count)
    decoding = Decoding(runtime, [prompt()], Options(), [given])
    assert row_events(decoding) == [["start", *["latent"] * count, "end", "token", "done"]]
    fed = [runtime.table[START], *given, runtime.table[CLOSE], runtime.table[B]]
    assert np.array_equal(np.concatenate(runtime.step_inputs), np.stack(fed))
    (result,) = decoding.results
    assert np.array_equal(np.array(result.latents).reshape(-1, H), given)
    first = int(prompt().positions.max()) + 1
    assert [int(p[0]) for p in runtime.positions] == list(range(first, first + len(fed)))


@EVERY_SPEC
def test_no_latents_given_changes_nothing(spec: LatentSpec) -> None:
    options = Options(max_tokens=12)
    plain, none_given = (
        decode(Recurrent(spec), PICTURES, options, given)
        for given in (None, [None] * len(PICTURES))
    )
    assert [outcome(r) for r in none_given] == [outcome(r) for r in plain]


@EVERY_SPEC
def test_a_rows_own_latents_given_back_change_nothing_and_others_do(spec: LatentSpec) -> None:
    options = Options(max_tokens=12, keep_hidden=True)
    plain = decode(Recurrent(spec), PICTURES, options)
    own = [np.stack(r.latents) if r.latents else None for r in plain]
    back = decode(Recurrent(spec), PICTURES, options, own)
    assert [outcome(r) for r in back] == [outcome(r) for r in plain]
    assert all(
        np.array_equal(np.stack(a.hidden), np.stack(b.hidden))
        for a, b in zip(back, plain, strict=True)
    )
    others = decode(Recurrent(spec), PICTURES, options, [None if z is None else z + 1 for z in own])
    for a, b, z in zip(others, plain, own, strict=True):
        assert ([h.tobytes() for h in a.hidden] == [h.tobytes() for h in b.hidden]) == (z is None)


@EVERY_SPEC
def test_rows_with_and_without_given_latents_give_what_each_gives_alone(spec: LatentSpec) -> None:
    given = [latents_of(i, i % 6) if i % 2 else None for i in range(len(PICTURES))]
    options = Options(max_tokens=12)
    together = decode(Recurrent(spec), PICTURES, options, given)
    assert {len(r.latents) for r in together} >= {0, 1, 5, K}
    for p, z, result in zip(PICTURES, given, together, strict=True):
        assert outcome(result) == outcome(decode(Recurrent(spec), [p], options, [z])[0])
        if z is None:
            assert outcome(result) == outcome(decode(Recurrent(spec), [p], options)[0])
        elif result.latents:
            assert np.array_equal(np.stack(result.latents), z)


def test_there_must_be_as_many_entries_as_prompts() -> None:
    with pytest.raises(ValueError, match="zip"):
        decode(Recurrent(OPEN), PROMPTS[:2], latents=[None])


# ---- the bottleneck: the prompt is read a second time, with the latents as its picture

BOTTLENECK = SPECS["bottleneck"]


def picture_prompt(seed: int, grids: Sequence[tuple[int, int]] = ((2, 3),)) -> Prompt:
    """Text, pictures with text between them, text: positions as a picture's are, apart on the three
    axes.
    """
    rng = np.random.default_rng([1, seed])
    ids: list[int] = []
    places: list[list[int]] = []
    for rows, columns in (*grids, (0, 0)):
        for token in rng.integers(A, D + 1, 1 + int(rng.integers(3))):
            ids.append(int(token))
            places.append([1 + max(map(max, places), default=-1)] * 3)
        first = 1 + max(map(max, places))
        ids += [IMAGE] * (rows * columns)
        places += [[first, first + r, first + c] for r in range(rows) for c in range(columns)]
    tokens = rng.normal(size=(ids.count(IMAGE), H)).astype(np.float32) + np.float32(0.5)
    return Prompt(np.array(ids), tokens, np.array(places).T)


PICTURES = [
    picture_prompt(seed, [(1 + seed % 3, 2 + seed % 2)] * (1 + (seed % 4 == 3)))
    for seed in range(12)
]


def nearest_token(latent: np.ndarray, tokens: np.ndarray) -> int:
    def cosine(token: np.ndarray) -> float:
        apart = token.astype(np.float64) - tokens.astype(np.float64).mean(0)
        return float(latent @ apart) / float(np.linalg.norm(apart))

    return max(range(len(tokens)), key=lambda i: cosine(tokens[i]))


def second_reading(
    p: Prompt, latents: np.ndarray, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (S, H) and positions (3, S) of the second reading, one by one: latents of one place
    are one, their mean.
    """
    seen = [i for i, token in enumerate(p.ids) if token == IMAGE]
    inputs, places = [], []
    for i, token in enumerate(p.ids):
        if token != IMAGE:
            inputs.append(table[token])
            places.append(p.positions[:, i])
        elif i == seen[0]:
            at: dict[int, list[np.ndarray]] = {}
            for z in latents:
                at.setdefault(seen[nearest_token(z, p.features)], []).append(z)
            for place, together in at.items():
                inputs.append(np.stack(together).mean(0))
                places.append(p.positions[:, place])
    if not seen:
        for i, z in enumerate(latents):
            inputs.append(z)
            places.append(np.full(3, p.positions.max() + 1 + i))
    return np.stack(inputs), np.stack(places, 1)


def then(p: Prompt, *words: int) -> Prompt:
    """A prompt with words of its answer after it, one position each."""
    following = p.positions.max() + 1 + np.tile(np.arange(len(words)), (3, 1))
    ids = np.append(p.ids, np.array(words, np.int64))
    return Prompt(ids, p.features, np.append(p.positions, following, 1))


def assert_read(read: Read, i: int, p: Prompt, latents: np.ndarray, table: np.ndarray) -> None:
    inputs, places = second_reading(p, latents, table)
    assert read.lengths[i] == len(inputs)
    np.testing.assert_allclose(
        read.embeds[i, : len(inputs)], inputs, rtol=0, atol=1e-6
    )  # means, by another sum
    assert np.array_equal(read.positions[:, i, : len(inputs)], places)


TWO_PICTURES = picture_prompt(5, [(2, 2), (3, 2)])
TEXT_ONLY = picture_prompt(6, [])
KINDS = pytest.mark.parametrize(
    "p",
    [picture_prompt(4), TWO_PICTURES, TEXT_ONLY],
    ids=["one picture", "two pictures", "no picture"],
)


def test_the_prompts_of_these_tests_are_what_they_should_be() -> None:
    assert [int((p.ids == IMAGE).sum()) for p in (picture_prompt(4), TWO_PICTURES, TEXT_ONLY)] == [
        6,
        10,
        0,
    ]
    assert (np.diff(np.flatnonzero(TWO_PICTURES.ids == IMAGE)) > 1).sum() == 1, (
        "no text between the pictures"
    )
    for p in (picture_prompt(4), TWO_PICTURES):
        near = [nearest_token(z, p.features) for z in latents_of(1, 7)]
        assert 3 <= len(set(near)) < 7, (
            "the latents given below are not in several places, of which one holds several"
        )
        assert near != sorted(near), "they are in reading order, so their own order is not tested"


@KINDS
def test_the_second_reading_is_the_prompt_with_the_latents_in_place_of_its_picture(
    p: Prompt,
) -> None:
    runtime = Scripted(A, START, B, END, spec=BOTTLENECK)
    (result,) = decode(runtime, [p])
    first, second = runtime.reads
    assert (first.rows, second.rows) == (None, [0])
    latents = [
        runtime.states[i][0] for i in range(2, 2 + K)
    ]  # after <|lvr_start|>, and after each latent but the last
    assert np.array_equal(np.stack(result.latents), np.stack(latents))
    assert_read(second, 0, then(p, A), np.stack(latents), runtime.table)
    assert result.tokens == [A, B]


@KINDS
def test_neither_the_last_latent_nor_a_closing_marker_is_fed_to_the_first_reading(
    p: Prompt,
) -> None:
    runtime = Scripted(A, START, B, END, spec=BOTTLENECK)
    (result,) = decode(runtime, [p])
    fed = [runtime.table[A], runtime.table[START], *result.latents[: K - 1], runtime.table[B]]
    assert np.array_equal(np.concatenate(runtime.step_inputs), np.stack(fed))


@KINDS
def test_positions_after_the_second_reading_follow_it(p: Prompt) -> None:
    runtime = Scripted(A, START, B, C, END, spec=BOTTLENECK)
    decode(runtime, [p])
    prompt_end, read_end = int(p.positions.max()) + 1, int(runtime.reads[1].positions.max()) + 1
    before = list(range(prompt_end, prompt_end + 1 + K))  # A, <|lvr_start|>, K - 1 latents
    assert [int(x[0]) for x in runtime.positions] == [*before, read_end, read_end + 1]
    # A is read again, and without a picture the latents come after it.
    assert read_end == prompt_end + 1 + (0 if len(p.features) else K)


def test_the_head_speaks_from_the_second_reading() -> None:
    runtime = Scripted(A, START, B, END, spec=BOTTLENECK)
    (result,) = decode(runtime, [picture_prompt(4)], Options(keep_hidden=True))
    states = [
        s[0] for s in runtime.states
    ]  # after prompt, A, <|lvr_start|>, K - 1 latents, the second reading, B
    assert len(states) == 2 + K + 2
    assert np.array_equal(states[2 + K], runtime.reads[1].state[0])
    assert np.array_equal(
        np.concatenate(runtime.head_inputs), np.stack([states[i] for i in (0, 1, 2 + K, 3 + K)])
    )
    assert np.array_equal(np.stack(result.hidden), np.stack(states))


def test_events_of_the_bottleneck_are_those_of_the_open_loop() -> None:
    decoding = Decoding(Scripted(A, START, B, END, spec=BOTTLENECK), [picture_prompt(4)], Options())
    assert row_events(decoding) == [["token", "start", *["latent"] * K, "end", "token", "done"]]
    assert decoding.clock.hand_over > 0
    assert len(decoding.clock.latent_step) == K - 1
    opened = Decoding(Scripted(A, START, B, END, spec=OPEN), [picture_prompt(4)], Options())
    row_events(opened)
    assert opened.clock.hand_over == 0


@KINDS
def test_what_was_said_before_the_latents_is_said_once_and_read_again(p: Prompt) -> None:
    runtime = Scripted(A, B, START, C, START, END, spec=BOTTLENECK)
    (result,) = decode(runtime, [p])
    assert result.tokens == [A, B, C, D]  # a second <|lvr_start|> cannot be chosen
    assert len(runtime.reads) == 2
    assert_read(runtime.reads[1], 0, then(p, A, B), np.stack(result.latents), runtime.table)


def test_without_latents_the_prompt_is_read_once() -> None:
    for runtime, options in (
        (Scripted(A, END, spec=BOTTLENECK), Options()),
        (Scripted(START, END, spec=BOTTLENECK), Options(steps=0)),
    ):
        (result,) = decode(runtime, [picture_prompt(4)], options)
        assert (len(runtime.reads), result.latents) == (1, [])


@KINDS
@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_second_reading_holds_the_latents_that_are_given(p: Prompt, count: int) -> None:
    runtime, given = Scripted(START, B, END, spec=BOTTLENECK), latents_of(1, count)
    decoding = Decoding(runtime, [p], Options(), [given])
    assert row_events(decoding) == [["start", *["latent"] * count, "end", "token", "done"]]
    assert_read(runtime.reads[1], 0, p, given, runtime.table)
    fed = [runtime.table[START], *given[:-1], runtime.table[B]]
    assert np.array_equal(np.concatenate(runtime.step_inputs), np.stack(fed))


@KINDS
def test_latents_of_zeros_do_not_crash(p: Prompt) -> None:
    runtime = Scripted(START, B, END, spec=BOTTLENECK)
    (result,) = decode(runtime, [p], Options(keep_hidden=True), [np.zeros((2, H), np.float32)])
    assert result.tokens == [B]
    assert np.isfinite(np.stack(result.hidden)).all()
    read = runtime.reads[1]
    at, fed = (int((p.ids == IMAGE).argmax()), 1) if len(p.features) else (len(p.ids), 2)
    assert np.array_equal(read.embeds[0, at : at + fed], np.zeros((fed, H)))
    assert read.lengths[0] == len(p.ids) - len(p.features) + fed
    if len(p.features):
        assert np.array_equal(read.positions[:, 0, at], p.positions[:, at])  # as good as any place


def test_nothing_but_the_latents_comes_from_the_picture() -> None:
    """Two pictures in which the same latents have the same places: all after the second reading is
    the same, and not in the open loop.
    """
    seen, given = picture_prompt(4), latents_of(2, K)
    other = replace(seen, features=-4 * seen.features.mean(0) + 8 * seen.features)
    assert [nearest_token(z, seen.features) for z in given] == [
        nearest_token(z, other.features) for z in given
    ]
    for spec, same in ((BOTTLENECK, True), (LatentSpec(K), False)):
        results = [
            decode(Scripted(START, B, C, END, spec=spec), [p], Options(keep_hidden=True), [given])[
                0
            ]
            for p in (seen, other)
        ]
        assert not np.array_equal(results[0].hidden[1], results[1].hidden[1]), (
            "the picture is not seen before the latents either"
        )
        assert [
            np.array_equal(a, b) for a, b in zip(*(r.hidden[-3:] for r in results), strict=True)
        ] == [same] * 3


def test_rows_handed_over_at_different_times_are_read_apart_and_leave_the_others_alone() -> None:
    runtime = Recurrent(BOTTLENECK)
    decoding = Decoding(runtime, PICTURES, Options(max_tokens=12))
    ended: list[list[int]] = []
    for event in decoding:  # events of one pass through the loop come together
        if event.kind == "end":
            if not ended or len(runtime.reads) - 1 > len(ended):
                ended.append([])
            ended[-1].append(event.row)
    assert [read.rows for read in runtime.reads[1:]] == ended
    assert len({len(rows) for rows in ended}) > 1
    before = 0
    for read, rows in zip(runtime.reads[1:], ended, strict=True):
        for i, row in enumerate(rows):
            result = decoding.results[row]
            words = result.choices[: result.choices.index(START)]
            before += len(words)
            asked = then(PICTURES[row], *words)
            assert_read(read, i, asked, np.stack(result.latents), runtime.table)
    assert before, "no row says anything before it looks"
    rows_in_latents = [row for rows in ended for row in rows]
    assert len(rows_in_latents) == len(set(rows_in_latents)) < len(PICTURES), (
        "a row twice, or none that never thinks"
    )
