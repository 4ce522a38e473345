"""Choosing a token from logits."""

from __future__ import annotations

import numpy as np
import pytest

from lvr_lite.errors import NotFiniteError
from lvr_lite.generate.sampling import greedy, probabilities, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.2])).astype(np.float32)


def test_greedy_takes_the_likeliest_and_the_lowest_id_among_equals() -> None:
    assert greedy(LOGITS) == 1
    assert greedy(np.array([0.0, 2.0, 2.0])) == 1


def test_probabilities_at_temperature_1_are_the_softmax() -> None:
    assert np.allclose(probabilities(LOGITS, 1.0, 1.0), [0.1, 0.4, 0.3, 0.2], atol=1e-6)


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    cold, warm = probabilities(LOGITS, 0.1, 1.0), probabilities(LOGITS, 100.0, 1.0)
    assert cold[1] > 0.9
    assert np.allclose(warm, 0.25, atol=0.01)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.05, [1]),
        (0.39, [1]),
        (0.5, [1, 2]),
        (0.69, [1, 2]),
        (0.8, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    p = probabilities(LOGITS, 1.0, top_p)
    assert np.flatnonzero(p).tolist() == kept
    assert p.sum() == pytest.approx(1.0)


def test_forbidden_tokens_have_probability_zero_and_large_logits_do_not_overflow() -> None:
    p = probabilities(np.array([1e4, -np.inf, 1e4], np.float32), 0.5, 1.0)
    assert p.tolist() == [0.5, 0.0, 0.5]


def test_samples_follow_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    drawn = np.bincount([sample(LOGITS, 1.0, 1.0, rng) for _ in range(4000)], minlength=4) / 4000
    assert np.allclose(drawn, [0.1, 0.4, 0.3, 0.2], atol=0.03)


def test_temperature_0_is_greedy_and_draws_nothing_from_the_generator() -> None:
    rng = np.random.default_rng(0)
    assert sample(LOGITS, 0.0, 0.1, rng) == 1
    assert rng.random() == np.random.default_rng(0).random()


def test_the_logits_are_left_as_they_were() -> None:
    before = LOGITS.copy()
    probabilities(LOGITS, 0.7, 0.5)
    assert np.array_equal(before, LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_one_line(temperature: float) -> None:
    logits = np.array([1.0, np.nan, 0.5], np.float32)
    with pytest.raises(NotFiniteError, match=r"logits are not finite \(nan\).*take fp32"):
        sample(logits, temperature, 1.0, np.random.default_rng(0))


def test_logits_that_overflowed_cannot_be_drawn_from() -> None:
    logits = np.array([1.0, np.inf, np.inf], np.float32)
    with pytest.raises(NotFiniteError, match=r"not finite \(inf\)"):
        sample(logits, 1.0, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
def test_the_lowest_temperatures_take_the_most_likely(temperature: float) -> None:
    logits = np.array([3.0, -np.inf, 88.0, 87.0], np.float32)
    assert probabilities(logits, temperature, 0.9).tolist() == [0, 0, 1, 0]
