"""The specification of the latent loop: what is refused, what is fed back, and which visual token a
latent is nearest to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lvr_lite.errors import BundleError, LvrError, UsageError
from lvr_lite.model.latents import columns_read_again, likeness, means, near
from lvr_lite.model.spec import LatentSpec, response

LIBRARIES: list[Any] = [
    pytest.param(np.asarray, id="numpy"),
    pytest.param(torch.from_numpy, id="torch"),
]
EITHER = pytest.mark.parametrize("array", LIBRARIES)
Array = Callable[[np.ndarray], Any]


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------------------------------
# the specification


def test_a_specification_is_read_back_as_it_was_written() -> None:
    for spec in (
        LatentSpec(),
        LatentSpec(3, "token"),
        LatentSpec(8, "norm-matched", "bottleneck", 60.5),
    ):
        assert LatentSpec.from_json(spec.to_json()) == spec


def test_a_manifest_from_before_there_was_a_norm_is_read() -> None:
    assert LatentSpec.from_json({"steps": 4, "feedback": "identity", "mode": "open"}) == LatentSpec(
        4, "identity", "open", 0.0
    )
    assert LatentSpec.from_json({"steps": 2}) == LatentSpec(2)


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        ({"steps": -1}, UsageError, "latent steps must be 0 or more, not -1"),
        (
            {"steps": 4, "feedback": "teleport"},
            BundleError,
            "latent feedback 'teleport' is not known here .*token",
        ),
        (
            {"steps": 4, "mode": "closed"},
            BundleError,
            "latent mode 'closed' is not known here .*bottleneck",
        ),
        ({"steps": 4, "feedback": "norm-matched"}, BundleError, "needs a norm above 0, not 0"),
        (
            {"steps": 4, "feedback": "norm-matched", "norm": -2.0},
            BundleError,
            "needs a norm above 0, not -2",
        ),
        (
            {"steps": 4, "feedback": "norm-matched", "norm": float("nan")},
            BundleError,
            "needs a norm above 0, not nan",
        ),
    ],
)
def test_a_specification_that_cannot_run_is_refused(
    data: dict[str, Any], kind: type[LvrError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        LatentSpec.from_json(data)
    assert "\n" not in str(caught.value)


def test_a_response_has_markers_around_the_latents_and_none_without_latents() -> None:
    assert response(2, " red", "<end>") == "<|lvr_start|><|lvr|><|lvr|><|lvr_end|> red<end>"
    assert response(0, " red", "<end>") == " red<end>"


# --------------------------------------------------------------------------------------------------
# feedback


@EITHER
def test_identity_feeds_the_very_state(array: Array) -> None:
    hidden = array(drawn(2, 5))
    assert LatentSpec(3).fed(hidden) is hidden


@EITHER
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1, 5), (0, 5)])
def test_norm_matched_feeds_each_states_direction_at_one_length(
    array: Array, shape: tuple[int, ...]
) -> None:
    hidden = array(drawn(*shape))
    fed = np.asarray(LatentSpec(3, "norm-matched", norm=7.5).fed(hidden))
    assert fed.shape == shape
    assert fed.dtype == np.float32
    for got, state in zip(fed.reshape(-1, 5), drawn(*shape).reshape(-1, 5), strict=True):
        assert np.linalg.norm(state) != pytest.approx(7.5, rel=0.1), "it had this length before"
        np.testing.assert_allclose(got, 7.5 * state / np.linalg.norm(state), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# likeness


@EITHER
def test_likeness_is_the_cosine_to_each_token_less_the_mean_token(array: Array) -> None:
    latents, tokens = (
        drawn(3, 6),
        drawn(5, 6)[::-1] + np.float32(4),
    )  # a large part that all tokens share
    found = np.asarray(likeness(array(latents.copy()), array(tokens.copy())))
    mean = sum(tokens.astype(np.float64)) / len(tokens)
    by_hand = [
        [float(z @ (t - mean) / np.sqrt((z @ z) * ((t - mean) @ (t - mean)))) for t in tokens]
        for z in latents.astype(np.float64)
    ]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    plain = (
        latents
        @ tokens.T
        / np.linalg.norm(latents, axis=1)[:, None]
        / np.linalg.norm(tokens, axis=1)
    )
    assert np.abs(found - plain).max() > 0.3, "the mean makes no difference, so nothing was tested"


@EITHER
def test_zeros_are_like_no_token_and_do_not_crash(array: Array) -> None:
    tokens = drawn(4, 6)
    found = np.asarray(likeness(array(np.zeros((2, 6), np.float32)), array(tokens)))
    np.testing.assert_array_equal(found, np.zeros((2, 4)))
    alone = np.asarray(
        likeness(array(drawn(2, 6)), array(tokens[:1]))
    )  # a single token is its own mean
    np.testing.assert_array_equal(alone, np.zeros((2, 1)))


@EITHER
@pytest.mark.parametrize(("spread", "told_apart"), [(1e-6, False), (1e-2, True)])
def test_tokens_that_differ_by_rounding_alone_are_like_nothing(
    array: Array, spread: float, told_apart: bool
) -> None:
    """All of a picture of one colour: which of them came nearest would hang on the machine."""
    tokens = drawn(1, 6) + np.float32(spread) * drawn(4, 6)
    found = np.asarray(likeness(array(drawn(3, 6)[::-1].copy()), array(tokens)))
    assert (np.abs(found).max(0) > 0.1).all() if told_apart else not found.any()


@EITHER
def test_no_latents_are_like_nothing(array: Array) -> None:
    assert tuple(likeness(array(np.zeros((0, 6), np.float32)), array(drawn(4, 6))).shape) == (0, 4)


@EITHER
def test_the_nearest_token_is_the_first_of_the_most_alike(array: Array) -> None:
    tokens = np.array([[1, 0], [0, 1], [0, 1], [-1, -2]], np.float32)
    found = near(array(np.array([[0, 2], [5, 0], [0, 0]], np.float32)), array(tokens))
    assert np.asarray(found).tolist() == [1, 0, 0]


@EITHER
def test_another_mean_can_be_taken_off(array: Array) -> None:
    latents = drawn(2, 6)
    tokens = drawn(5, 6)[::-1].copy()
    mean = np.float32(0.3) * drawn(1, 6)[0]
    apart = tokens - mean
    found = likeness(array(latents), array(tokens), array(mean))
    lengths = np.linalg.norm(latents, axis=1)[:, None] * np.linalg.norm(apart, axis=1)
    np.testing.assert_allclose(np.asarray(found), latents @ apart.T / lengths, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# the second reading


@EITHER
def test_latents_of_one_token_become_their_mean_and_the_first_stands_for_them(array: Array) -> None:
    latents = drawn(4, 6)
    weights, first = means(array(np.array([4, 1, 4, 0])))
    assert np.asarray(first).tolist() == [True, True, False, True]
    found = np.asarray(weights).astype(np.float32) @ latents
    both = latents[[0, 2]].mean(0)
    np.testing.assert_allclose(found, [both, latents[1], both, latents[3]], atol=1e-6)


def test_the_text_is_read_again_and_the_chosen_tokens_where_the_first_one_stood() -> None:
    is_image = np.array([0, 0, 1, 1, 1, 0, 1, 0], bool)
    found = columns_read_again(is_image, np.array([3, 0]))
    assert found.tolist() == [0, 1, 6, 2, 5, 7]
    assert columns_read_again(is_image, np.array([], int)).tolist() == [0, 1, 5, 7]
