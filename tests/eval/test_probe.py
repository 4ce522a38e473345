"""The probe: its statistics by hand, its interventions one by one, and its verdict on models that
are built to use latents or not to.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lvr_lite.commands import model as models
from lvr_lite.data.samples import Sample
from lvr_lite.errors import UsageError
from lvr_lite.eval.interventions import (
    INTERVENTIONS,
    Feed,
    Subject,
    choose_donors,
    chosen,
    intervene,
    noise_like,
    other_orders,
)
from lvr_lite.eval.measures import Answer, Effect, Flips, flips, geometry, measure, retrieval
from lvr_lite.eval.probe import load_items, probe
from lvr_lite.eval.report import show_probe, write_probe_page
from lvr_lite.eval.score import wilson
from lvr_lite.eval.statistics import bootstrap_mean, mcnemar, mean_cosine, participation_ratio, unit
from lvr_lite.eval.verdict import COSTLY, FLIPPED, LIFTED, verdict
from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.generate.decode import Prompt
from lvr_lite.model.spec import LatentSpec
from lvr_lite.toy.make import write_scenes
from tests.command_line import Call
from tests.fakes import IS_TOKEN, Looks, tiles

# --------------------------------------------------------------------------------------------------
# statistics


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (1, 8, 2 * (1 + 9) / 512),
        (8, 1, 2 * (1 + 9) / 512),
        (2, 3, 1.0),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_on_discordant_pairs(
    lost: int, gained: int, p: float
) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_of_thousands_of_pairs_is_finite_and_near_the_normal_approximation() -> None:
    n, lost = 4000, 2080
    z = (lost - n / 2 - 0.5) / math.sqrt(n / 4)
    assert mcnemar(lost, n - lost) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_the_bootstrap_is_that_of_drawing_items_with_replacement() -> None:
    values = np.array([1] * 12 + [0] * 60 + [-1] * 28)
    rng = np.random.default_rng(1)
    naive = np.percentile(rng.choice(values, (20_000, 100)).mean(1), [2.5, 97.5])
    assert bootstrap_mean(values, 0, 20_000) == pytest.approx(tuple(naive), abs=0.01)
    parts = rng.random(9)
    assert bootstrap_mean(parts, 3) == bootstrap_mean(parts, 3) != bootstrap_mean(parts, 4)


def test_values_that_do_not_vary_have_an_interval_without_width() -> None:
    assert bootstrap_mean(np.full(7, -1), 0) == (-1.0, -1.0)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9)])
def test_the_participation_ratio_is_that_of_the_eigenvalues_of_the_covariance(
    shape: tuple[int, int],
) -> None:
    vectors = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 5, shape[1]) + 3
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.T))
    assert participation_ratio(vectors) == pytest.approx(
        eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    )


def test_the_participation_ratio_counts_directions_whatever_the_mean() -> None:
    cross = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], float)
    assert participation_ratio(cross + 5) == pytest.approx(2)
    assert participation_ratio(cross[:2]) == pytest.approx(1)
    assert participation_ratio(np.tile([[0.3, 0.7]], (5, 1))) is None


def test_the_mean_cosine_is_over_different_vectors_only() -> None:
    assert mean_cosine(np.array([[2.0, 0], [0, 3]])) == pytest.approx(0)
    assert mean_cosine(np.array([[2.0, 0], [5, 0], [-1, 0]])) == pytest.approx((1 - 1 - 1) / 3)
    assert mean_cosine(np.array([[1.0, 0]])) is None
    vectors = np.random.default_rng(2).normal(size=(6, 4))
    pairs = [
        unit(a) @ unit(b) for i, a in enumerate(vectors) for j, b in enumerate(vectors) if i != j
    ]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs))


def test_a_vector_of_zeros_has_no_direction() -> None:
    assert unit(np.array([[0.0, 0], [3, 4]])).tolist() == [[0, 0], [0.6, 0.8]]


# --------------------------------------------------------------------------------------------------
# interventions

H = 8


def subject(
    question: str = "what",
    answer: str = "red",
    picture: str = "p",
    boxes: list[list[int]] | None = None,
    tokens: int = 6,
) -> Subject:
    """A subject whose visual token t is t everywhere."""
    features = np.repeat(np.arange(tokens, dtype=np.float32)[:, None], H, 1)
    prompt = Prompt(np.zeros(1, np.int64), features, np.zeros((3, 1), np.int64))
    return Subject(
        Sample("x", (), question, answer), prompt, [np.array(b) for b in boxes or []], picture
    )


def random_latents(count: int = 5, steps: int = 3) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(count, steps, H)).astype(np.float32)


def fed(
    name: str,
    latents: np.ndarray,
    subjects: list[Subject] | None = None,
    spec: LatentSpec | None = None,
) -> list[Any]:
    found = subjects or [subject() for _ in latents]
    return intervene(
        name, found, latents, spec or LatentSpec(latents.shape[1]), np.random.default_rng(0)
    ).latents


def test_what_is_fed_in_place_of_the_latents() -> None:
    own = random_latents()
    assert [x.tolist() for x in fed("self", own)] == own.tolist()
    assert not np.any(fed("zero", own))
    assert np.shape(fed("zero", own)) == own.shape
    assert np.allclose(fed("mean", own), np.broadcast_to(own.mean(0), own.shape))
    for x, mine in zip(fed("first", own), own, strict=True):
        assert x.tolist() == [mine[0].tolist()] * 3
    assert [x.shape for x in fed("markers", own)] == [(0, H)] * 5


def test_noise_has_the_length_of_the_vector_in_its_place_and_no_part_of_its_direction() -> None:
    own = (random_latents(200, 2) * np.linspace(0.1, 30, 200)[:, None, None]).astype(np.float32)
    noise = np.array(fed("noise", own))
    assert noise.dtype == np.float32
    assert np.allclose(np.linalg.norm(noise, axis=-1), np.linalg.norm(own, axis=-1), rtol=1e-5)
    assert abs((unit(noise) * unit(own)).sum(-1).mean()) < 0.06
    assert not np.any(noise_like(np.zeros((2, H)), np.random.default_rng(0)))


def test_shuffled_orders_are_never_that_order_itself_and_all_others_come() -> None:
    orders = {tuple(o) for o in other_orders(500, 3, np.random.default_rng(0))}
    assert orders == set(permutations(range(3))) - {(0, 1, 2)}
    assert other_orders(20, 2, np.random.default_rng(0)).tolist() == [[1, 0]] * 20


def test_shuffling_moves_a_subjects_own_latents_and_one_latent_cannot_be_shuffled() -> None:
    own = random_latents()
    for x, mine in zip(fed("shuffle", own), own, strict=True):
        assert x.tolist() != mine.tolist()
        assert sorted(x.tolist()) == sorted(mine.tolist())
    assert fed("shuffle", own[:, :1]) == [None] * 5


def test_the_oracle_is_the_mean_over_each_steps_group_of_visual_tokens() -> None:
    subjects = [subject(boxes=[[4, 5], [1, 3]]), subject(), subject(boxes=[[2]])]
    two_boxes, without, one_token = fed("oracle", random_latents(3, 3), subjects)
    assert two_boxes[:, 0].tolist() == [4.5, 1, 3]
    assert without is None
    assert one_token[:, 0].tolist() == [2, 2, 2]
    assert fed("oracle", random_latents(1, 1), [subject(boxes=[[4, 5], [0]])])[0][
        :, 0
    ].tolist() == [3]  # fewer steps than boxes


def test_the_oracle_goes_through_the_models_feedback() -> None:
    subjects = [subject(boxes=[[1, 3]])]
    spec = LatentSpec(2, "norm-matched", norm=7.0)
    assert np.linalg.norm(
        fed("oracle", random_latents(1, 2), subjects, spec)[0], axis=-1
    ) == pytest.approx([7, 7])
    assert fed("oracle", random_latents(1, 2), subjects, LatentSpec(2, "token"))[0][
        :, 0
    ].tolist() == [1, 3]


DONATING = [
    subject("which colour", "red", "a"),
    subject("which colour", "Red.", "b"),  # the same answer in another form
    subject("which colour", "blue", "a"),  # the same picture
    subject("which colour", "green", "c"),
    subject("how many", "two", "d"),
    subject("how many", "two", "e"),
    subject("how many", "red", "f"),
]


def all_donors(same_question: bool) -> list[set[int]]:
    draws = [
        choose_donors(DONATING, same_question, np.random.default_rng(seed)) for seed in range(200)
    ]
    return [{int(d[i]) for d in draws} for i in range(len(DONATING))]


def test_a_donor_of_the_same_question_has_another_picture_and_another_answer() -> None:
    assert all_donors(True) == [{3}, {2, 3}, {1, 3}, {0, 1, 2}, {6}, {6}, {4, 5}]


def test_an_unrelated_donor_has_another_question_another_picture_and_another_answer() -> None:
    assert all_donors(False) == [
        {4, 5},
        {4, 5},
        {4, 5, 6},
        {4, 5, 6},
        {0, 1, 2, 3},
        {0, 1, 2, 3},
        {2, 3},
    ]


def test_who_has_no_donor_is_left_out_and_donated_latents_are_the_donors() -> None:
    subjects = [subject("a", "x", "1"), subject("b", "y", "2"), subject("b", "z", "3")]
    own = random_latents(3)
    feed = intervene("donor_same_question", subjects, own, LatentSpec(3), np.random.default_rng(0))
    assert feed.donors is not None
    assert feed.donors.tolist() == [-1, 2, 1]
    assert feed.latents[0] is None
    assert [np.array_equal(feed.latents[i], own[d]) for i, d in ((1, 2), (2, 1))] == [True, True]  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# measuring


def says(*texts: str, right: str = "") -> list[Answer]:
    """Answers, and which of them are right: a mark each, such as "+-+"."""
    return [
        Answer(t, [len(t)], mark == "+")
        for t, mark in zip(texts, right or "-" * len(texts), strict=True)
    ]


def test_an_intervention_is_compared_with_the_baseline_on_the_items_that_it_applies_to() -> None:
    subjects = [
        Subject(Sample("x", (), "q", "a", type=t), subject().prompt, [], "p")
        for t in ("one", "one", "two", "two", None)
    ]
    said = {
        "none": says("a", "a", "a", "a", "b", right="+++--"),
        "zero": says("a", "bb", "bb", "a", "a", right="+--++"),
    }
    found = measure(subjects, said, "zero", Feed([np.zeros((1, H))] * 4 + [None]), 0)
    assert found.n == 4
    assert found.accuracy == 0.5
    assert found.baseline_accuracy == 0.75
    assert found.difference == -0.25
    assert found.interval == wilson(2, 4)
    assert found.difference_interval == bootstrap_mean(np.array([0, -1, -1, 1]), 0)
    assert found.mcnemar_p == mcnemar(2, 1)
    assert (found.changed, found.changed_count) == (0.5, 2)
    assert found.by_type == {"one": {"n": 2, "accuracy": 0.5}, "two": {"n": 2, "accuracy": 0.5}}
    assert found.flips is None


def test_an_intervention_that_applies_to_nothing_says_so() -> None:
    found = measure(
        [subject()], {"none": says("a"), "oracle": says("a")}, "oracle", Feed([None]), 0
    )
    assert found.n == 0
    assert found.accuracy is None
    assert found.interval is None
    assert found.difference is None
    assert found.mcnemar_p is None


def test_flips_go_to_what_the_donor_itself_said_not_to_what_it_should_have_said() -> None:
    said = {
        "none": says("red", "blue", "green", "red"),
        "donor_unrelated": says("Blue.", "blue", "pink", "red"),
        "noise": says("blue", "red", "green", "red"),
    }
    # 0: red becomes blue, its donor's; 1: stays blue; 3: says red, its donor's, as before.
    donors = np.array([1, 2, -1, 0])
    found = flips(said, "donor_unrelated", donors)
    assert found.pairs == 3
    assert found.flips_to_donor == pytest.approx(2 / 3)
    assert found.lift == pytest.approx(1 / 3)
    assert found.flips_by_noise == pytest.approx(2 / 3)
    assert found.flips_interval == wilson(2, 3)
    under_one_question = flips(
        said | {"donor_same_question": said["donor_unrelated"]}, "donor_same_question", donors
    )
    assert under_one_question.pairs == 2
    assert under_one_question.flips_to_donor == 0.5
    assert under_one_question.lift == 0.5


def test_without_pairs_there_are_no_flips() -> None:
    found = flips(
        {"none": says("a"), "donor_unrelated": says("a")}, "donor_unrelated", np.array([-1])
    )
    assert found.pairs == 0
    assert found.flips_to_donor is None
    assert found.lift is None
    assert found.flips_by_noise is None


# --------------------------------------------------------------------------------------------------
# retrieval


def scattered(
    count: int, steps: int, tokens: int = 20
) -> tuple[np.ndarray, list[np.ndarray], list[list[np.ndarray]]]:
    """Random latents and visual tokens, with boxes of 2 + 3 of the tokens."""
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(tokens, 32)) for _ in range(count)]
    boxes = [
        [picked[:2], picked[2:]] for picked in (rng.permutation(tokens)[:5] for _ in range(count))
    ]
    return rng.normal(size=(count, steps, 32)), features, boxes


def test_latents_that_mean_nothing_hit_the_boxes_as_often_as_their_area() -> None:
    found = retrieval(*scattered(1500, 2), 0)
    assert found.n == 1500
    assert found.chance == 5 / 20
    assert found.own_box_chance == pytest.approx((2 + 3) / 2 / 20)
    assert found.r_at_1 == pytest.approx(0.25, abs=0.025)
    assert found.own_box == pytest.approx(0.125, abs=0.02)
    assert found.r_at_1 is not None
    assert found.interval is not None
    assert found.interval[0] < 0.25 < found.interval[1]
    assert found.ratio == pytest.approx(found.r_at_1 / 0.25)


def test_overlapping_boxes_count_their_tokens_once() -> None:
    latents, features, _ = scattered(4, 2)
    assert (
        retrieval(latents, features, [[np.array([0, 1]), np.array([1, 2])]] * 4, 0).chance == 3 / 20
    )


def test_a_latent_hits_what_it_points_at_once_what_all_share_is_taken_off() -> None:
    _, features, boxes = scattered(40, 2)
    pointing = np.array([[f[b[0][0]], f[b[1][0]]] for f, b in zip(features, boxes, strict=True)])
    for shared in (0, 100):  # added to every latent and, the other way round, to every token
        found = retrieval(pointing + shared, [f - shared for f in features], boxes, 0)
        assert (found.r_at_1, found.own_box) == (1.0, 1.0)
    elsewhere = retrieval(pointing[:, ::-1], features, boxes, 0)
    # In the boxes, but in the other one.
    assert (elsewhere.r_at_1, elsewhere.own_box) == (1.0, 0.0)
    half = retrieval(np.stack([pointing[:, 0], -pointing[:, 1]], 1), features, boxes, 0)
    first, second = half.by_step
    assert half.r_at_1 is not None
    assert first.r_at_1 == 1.0 > half.r_at_1 > second.r_at_1


def test_items_without_boxes_are_left_out_of_retrieval_but_not_of_the_mean() -> None:
    latents, features, boxes = scattered(30, 2)
    found = retrieval(latents, features, [*boxes[:10], *[[]] * 20], 0)
    alone = retrieval(latents[:10], features[:10], boxes[:10], 0)
    assert found.n == alone.n == 10
    assert found.r_at_1 != alone.r_at_1


@pytest.mark.parametrize("why", ["no boxes", "latents alike"])
def test_retrieval_is_not_defined_without_boxes_or_for_latents_that_are_all_alike(why: str) -> None:
    latents, features, boxes = scattered(10, 2)
    if why == "no boxes":
        found = retrieval(latents, features, [[] for _ in boxes], 0)
    else:
        found = retrieval(
            np.broadcast_to(latents[:1], latents.shape).astype(np.float32), features, boxes, 0
        )
    assert found.n == 0
    assert found.r_at_1 is None
    assert found.chance is None
    assert found.ratio is None
    assert found.by_step == ()


def test_a_step_that_is_alike_for_all_points_at_nothing() -> None:
    latents, features, _ = scattered(10, 2)
    latents[:, 1] = latents[0, 1]
    found = retrieval(latents, features, [[np.arange(20)]] * 10, 0)
    assert [step.r_at_1 for step in found.by_step] == [1.0, 0.0]


def test_geometry_is_told_by_step_and_of_all_steps_together() -> None:
    latents = np.zeros((4, 2, 3))
    latents[:, 0] = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]
    latents[:, 1] = [[0, 0, 1], [0, 0, 3], [0, 0, 1], [0, 0, 3]]
    found = geometry(latents)
    assert found.participation_ratio_by_step == pytest.approx([2, 1])
    assert found.participation_ratio == pytest.approx(1.5)
    assert found.participation_ratio_all == participation_ratio(latents.reshape(8, 3))
    assert found.similarity == pytest.approx(
        (-1 / 3 + 1) / 2
    )  # of the first step two of six pairs are opposite; of the second all agree
    assert found.similarity_centred == pytest.approx(-1 / 3)


# --------------------------------------------------------------------------------------------------
# verdict


def judged(
    cost: float,
    interval: tuple[float, float],
    flipped: float | None,
    lift: float | None,
    sham: int = 0,
    **spec: Any,
) -> str:
    """The verdict where noise costs so much; intervals are of the cost."""
    bounds = (-interval[1], -interval[0])
    pairs = 0 if flipped is None else 40
    effects = {
        "noise": effect(n=50, difference=-cost, difference_interval=bounds),
        "donor_same_question": effect(flips=Flips(flipped, pairs, None, lift, 0.25)),
        "self": effect(changed_count=sham),
    }
    return verdict(effects, 5.25, LatentSpec(4, **spec))


def effect(**fields: Any) -> Effect:
    everything: dict[str, Any] = dict.fromkeys(Effect.__dataclass_fields__)
    return Effect(**everything | fields)


CLEAR, UNCLEAR = (0.01, 0.5), (0.0, 0.5)


@pytest.mark.parametrize(
    ("cost", "interval", "flipped", "lift", "told"),
    [
        (COSTLY, CLEAR, FLIPPED, FLIPPED, "the latents carry the answer"),
        (COSTLY - 0.001, CLEAR, 1.0, 1.0, "the latents matter in part"),
        (0.9, CLEAR, FLIPPED - 0.001, 0.3, "the latents matter in part"),
        (0.9, UNCLEAR, 1.0, LIFTED, "the latents matter in part"),
        (0.9, UNCLEAR, 1.0, LIFTED - 0.001, "the latents are ignored"),
        (0.01, CLEAR, 0.0, 0.0, "the latents matter in part"),
        (
            -0.3,
            (-0.4, -0.2),
            0.0,
            0.0,
            "the latents are ignored",
        ),  # noise that helps is no use of latents
        (0.0, UNCLEAR, None, None, "the latents are ignored"),
        (0.9, CLEAR, None, None, "the latents matter in part"),
    ],
)
def test_the_verdict_keeps_to_its_criteria(
    cost: float, interval: tuple[float, float], flipped: float | None, lift: float | None, told: str
) -> None:
    assert judged(cost, interval, flipped, lift).startswith(
        f"{told}: noise costs {100 * cost + 0:.1f} points"
    )


def test_the_verdict_tells_its_numbers() -> None:
    assert judged(0.312, (0.28, 0.341), 0.621, 0.6) == (
        "the latents carry the answer: noise costs 31.2 points (28.0 to 34.1, n = 50), "
        "the same-question donor's answer comes in 62.1 % of 40 pairs (lift 60.0 points; "
        "under noise 25.0 %), R@1 is 5.2 times chance"
    )
    assert "no item has a same-question donor" in judged(0.3, CLEAR, None, None)


def test_a_sham_that_changed_an_answer_makes_the_probe_unsound() -> None:
    told = judged(0.9, CLEAR, 1.0, 1.0, sham=3)
    assert told.startswith("the probe itself is unsound: noise costs 90.0 points")
    assert told.endswith("; the sham changed 3 answers")


def test_the_same_token_for_all_carries_nothing_whatever_noise_costs() -> None:
    assert judged(0.9, CLEAR, 1.0, 1.0, feedback="token").startswith(
        "the latents carry nothing by construction"
    )


def test_in_a_bottleneck_flips_come_nearly_by_construction_and_lift_proves_nothing() -> None:
    assert judged(0.9, UNCLEAR, 1.0, 1.0, mode="bottleneck").startswith("the latents are ignored")
    told = judged(0.9, CLEAR, 1.0, 1.0, mode="bottleneck")
    assert told.startswith("the latents carry the answer")
    assert "(lift 100.0 points; under noise 25.0 %), nearly by construction," in told


@pytest.mark.parametrize("missing", ["noise", "donor_same_question"])
def test_without_what_it_takes_there_is_no_verdict(missing: str) -> None:
    effects = {
        "noise": effect(n=5, difference=-0.9, difference_interval=(-1, -0.8)),
        "donor_same_question": effect(flips=Flips(1.0, 5, None, 1.0, None)),
    }
    del effects[missing]
    assert verdict(effects, None, LatentSpec(4)).startswith("not judged")


def test_some_interventions_can_be_chosen_and_the_baseline_comes_with_them() -> None:
    assert chosen(None) == list(INTERVENTIONS)
    assert chosen("self, noise") == ["none", "noise", "self"]
    with pytest.raises(
        UsageError, match=r"--only noise,nose: 'nose' is no intervention \(known: none, zero, noise"
    ):
        chosen("noise,nose")


# ---------------------------------------------------------------------------------- models that
# look, built to be understood


@pytest.fixture(scope="module")
def carrying() -> dict[str, Any]:
    return probe(Looks("latents"), tiles()) | {"data": "tiles"}


@pytest.fixture(scope="module")
def ignoring() -> dict[str, Any]:
    return probe(Looks("picture"), tiles()) | {"data": "tiles"}


def test_latents_that_alone_bring_the_answer_carry_it(carrying: dict[str, Any]) -> None:
    assert carrying["verdict"].startswith("the latents carry the answer: noise costs ")
    one = carrying["interventions"]
    assert (
        carrying["baseline"]["accuracy"]
        == one["none"]["accuracy"]
        == one["oracle"]["accuracy"]
        == one["first"]["accuracy"]
        == 1.0
    )
    assert max(one[name]["accuracy"] for name in ("zero", "noise", "mean", "markers")) < 0.4
    assert (
        one["k0"]["accuracy"]
        == one["donor_unrelated"]["accuracy"]
        == one["donor_same_question"]["accuracy"]
        == 0.0
    )
    assert (
        one["donor_same_question"]["flips_to_donor"]
        == one["donor_unrelated"]["flips_to_donor"]
        == 1.0
    )
    assert one["donor_same_question"]["flips_by_noise"] < 0.4
    assert (
        0.2 < one["shuffle"]["accuracy"] < 0.9
    )  # the colour lies in the first latent, which half of the other orders move
    assert one["noise"]["difference_interval"][1] < -0.4
    assert one["noise"]["mcnemar_p"] < 1e-6


def test_latents_that_the_answer_does_not_hang_on_are_ignored(ignoring: dict[str, Any]) -> None:
    assert ignoring["verdict"].startswith(
        "the latents are ignored: noise costs 0.0 points (0.0 to 0.0, n = 48), "
    )
    for name, one in ignoring["interventions"].items():
        assert one["changed_count"] == (48 if name == "k0" else 0), name
    assert ignoring["interventions"]["donor_same_question"]["flips_to_donor"] == 0.0
    assert ignoring["retrieval"]["ratio"] > 5  # pointing at the right place proves nothing


def test_every_intervention_runs_and_the_sham_changes_no_token(carrying: dict[str, Any]) -> None:
    assert tuple(carrying["interventions"]) == INTERVENTIONS
    sham = carrying["interventions"]["self"]
    assert sham["n"] == 48
    assert sham["changed"] == 0.0
    assert sham["changed_count"] == 0
    assert sham["difference"] == 0.0


def test_a_runtime_that_does_not_give_the_same_answer_twice_is_called_unsound() -> None:
    class Forgetful(Looks):
        def start(self, batch: int, capacity: int) -> None:
            super().start(batch, capacity)
            self.uses = "latents" if len(self.batches) % 2 else "picture"

        def name_of(self, colour: np.ndarray) -> list[int]:
            return super().name_of(-colour if self.uses == "picture" else colour)

    found = probe(Forgetful("latents"), tiles(16), ["noise", "donor_same_question", "self"])
    assert found["verdict"].startswith("the probe itself is unsound: ")
    assert found["verdict"].endswith("; the sham changed 16 answers")


def test_retrieval_finds_the_one_latent_that_points_at_the_box(carrying: dict[str, Any]) -> None:
    found = carrying["retrieval"]
    assert [step["r_at_1"] for step in found["by_step"]] == [1.0, 0.0, 0.0]
    assert found["r_at_1"] == found["own_box"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["chance"] == found["own_box_chance"] == 1 / 25
    assert (found["n"], found["ratio"]) == (48, pytest.approx(25 / 3, abs=1e-2))


def test_the_result_has_the_fields_that_the_design_promises(carrying: dict[str, Any]) -> None:
    told = json.loads(json.dumps(carrying, allow_nan=False))
    assert told["schema"] == "lvr-lite/probe"
    assert told["version"] == 1
    assert told["n"] == 48
    assert told["opened"] == 48
    assert told["model"] == "looks"
    assert set(told["baseline"]) == {"accuracy", "interval"}
    assert all(
        {"accuracy", "interval", "flips_to_donor", "by_type", "n"} <= set(one)
        for one in told["interventions"].values()
    )
    assert [
        name for name, one in told["interventions"].items() if one["flips_to_donor"] is not None
    ] == ["donor_unrelated", "donor_same_question"]
    assert told["latent"] == {"steps": 3, "feedback": "identity", "mode": "open", "norm": 0.0}
    assert told["seeds"] == {"interventions": 0, "bootstrap": 0}
    assert told["criteria"]["noise_costs"] == COSTLY
    assert told["interventions"]["zero"]["by_type"]["type 1"]["n"] == 24


def test_every_number_can_be_counted_again_from_the_answers(carrying: dict[str, Any]) -> None:
    items = {item["id"]: item for item in carrying["items"]}
    samples = {sample.id: sample for sample, _ in tiles()}
    for name, one in carrying["interventions"].items():
        right = [
            item["answers"][name] == item["expected"]
            for item in items.values()
            if name in item["answers"]
        ]
        assert (len(right), sum(right) / len(right)) == (
            one["n"],
            pytest.approx(one["accuracy"], abs=1e-3),
        ), name
    for item in items.values():
        for kind in ("donor_unrelated", "donor_same_question"):
            donor = samples[item["donors"][kind]]
            assert (donor.question == samples[item["id"]].question) == (
                kind == "donor_same_question"
            )
            assert donor.answer != item["expected"]
            assert item["answers"][kind] == items[donor.id]["answers"]["none"]


def test_items_whose_answer_opened_no_loop_are_not_part_of_the_interventions() -> None:
    found = probe(Looks("latents", silent="which one"), tiles(20))
    assert (found["n"], found["opened"], found["baseline"]["accuracy"]) == (20, 10, 1.0)
    assert {
        one["n"] for name, one in found["interventions"].items() if name != "donor_unrelated"
    } == {10}
    assert found["interventions"]["donor_unrelated"]["n"] == 0  # only one question is left
    assert found["interventions"]["k0"]["accuracy"] == 0.0
    assert found["interventions"]["self"]["changed_count"] == 0
    assert {item["id"] for item in found["items"]} == {f"s{i}" for i in range(0, 20, 2)}


def test_a_row_has_the_same_companions_under_every_intervention() -> None:
    runtime = Looks("latents", silent="which one")
    seen: list[tuple[int, int]] = []
    probe(
        runtime,
        tiles(20),
        ["none", "self", "oracle", "donor_same_question"],
        batch=8,
        progress=lambda *x: seen.append(x),
    )
    assert runtime.batches == [8, 8, 4] * 4
    assert (seen[0], seen[-1]) == ((8, 80), (80, 80))


def test_the_seed_names_the_noise_and_leaving_out_others_does_not_change_it(
    carrying: dict[str, Any],
) -> None:
    def noisy(seed: int) -> list[str]:
        return [
            item["answers"]["noise"]
            for item in probe(Looks("latents"), tiles(), ["noise"], seed)["items"]
        ]

    assert noisy(0) == [item["answers"]["noise"] for item in carrying["items"]]
    assert noisy(0) != noisy(1)


def test_norm_matched_latents_are_probed_at_their_norm() -> None:
    class Recording(Looks):
        def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
            lengths.extend(float(np.linalg.norm(row)) for row in embeds if row[0] < IS_TOKEN)
            return super().step(embeds, positions)

    lengths: list[float] = []
    found = probe(
        Recording("latents", LatentSpec(3, "norm-matched", norm=2.5)),
        tiles(12),
        ["noise", "oracle", "donor_same_question", "self"],
    )
    assert len(lengths) == 12 * 3 * 5
    assert lengths == pytest.approx([2.5] * len(lengths), rel=1e-5)
    assert found["interventions"]["self"]["changed_count"] == 0


def test_the_same_token_in_every_latent_step_is_known_to_carry_nothing() -> None:
    found = probe(Looks("picture", LatentSpec(3, "token")), tiles(24))
    assert found["verdict"].startswith(
        "the latents carry nothing by construction, the same token is fed whatever the picture: "
    )
    assert tuple(found["interventions"]) == INTERVENTIONS
    assert found["retrieval"]["r_at_1"] is None
    assert found["geometry"]["participation_ratio"] is None


def test_a_model_without_latents_is_refused_and_so_is_one_that_never_uses_them() -> None:
    with pytest.raises(UsageError, match="looks: has no latent steps"):
        probe(Looks("picture", LatentSpec()), tiles(2))
    with pytest.raises(UsageError, match="looks: opened the latent loop in none of 4 answers"):
        probe(
            Looks("latents", silent="colour"),
            ((s, p) for s, p in tiles(8) if "colour" in s.question),
        )
    with pytest.raises(UsageError, match="no items to probe"):
        probe(Looks("latents"), iter(()))


# --------------------------------------------------------------------------------------------------
# table and page


def test_the_table_tells_every_intervention_the_donors_retrieval_and_the_verdict(
    carrying: dict[str, Any],
) -> None:
    out = io.StringIO()
    show_probe(carrying, Console(file=out, width=140))
    text = out.getvalue()
    assert re.search(
        r"^none +48 +100\.0 \[92\.6, 100\.0\] +0\.0 \[0\.0, 0\.0\]", text, re.MULTILINE
    )
    donors = r"^donor_same_question +48 +0\.0 \[0\.0, 7\.4\] +-100\.0 \[-100\.0, -100\.0\]"
    assert re.search(donors + r" +< 0\.001 +100\.0 %", text, re.MULTILINE)
    assert "donor_unrelated: the donor's answer in 100.0 % of 48 pairs" in text
    assert "against 4.0 % by area, 8.33 times" in text
    assert text.rstrip().endswith(carrying["verdict"])
    assert "nearly by construction" not in text
    show_probe(
        carrying | {"latent": carrying["latent"] | {"mode": "bottleneck"}},
        Console(file=out, width=140),
    )
    assert "the same-question donor's answer comes nearly by construction" in out.getvalue()


def test_the_page_holds_a_bar_for_each_intervention_and_nothing_from_elsewhere(
    carrying: dict[str, Any], tmp_path: Path
) -> None:
    write_probe_page(carrying, tmp_path / "probe.html")
    html = (tmp_path / "probe.html").read_text()
    assert carrying["verdict"][1:].replace("'", "&#39;") in html
    assert all(f">{name}</td>" in html for name in INTERVENTIONS)
    assert not re.search(r"https?://", html)
    assert "nearly by construction" not in html
    write_probe_page(
        carrying | {"latent": carrying["latent"] | {"mode": "bottleneck"}}, tmp_path / "probe.html"
    )
    assert "nearly by construction" in (tmp_path / "probe.html").read_text()


def test_the_page_of_a_few_interventions_without_boxes_or_types_is_whole(tmp_path: Path) -> None:
    bare = ((Sample(s.id, (), "what colour is it", s.answer), p) for s, p in tiles(8))
    write_probe_page(
        probe(Looks("latents"), bare, ["oracle", "donor_unrelated"]) | {"data": "<b>"},
        tmp_path / "probe.html",
    )
    html = (tmp_path / "probe.html").read_text()
    assert "Nothing to retrieve" in html
    assert "&lt;b&gt;" in html
    assert "Whose answer comes" not in html
    assert "type of question" not in html


# --------------------------------------------------------------------------------------------------
# the command line


class AlwaysLatents(StartsWithLatents):
    """A runtime whose first choice is <|lvr_start|>, so that a model with random weights goes
    through its latents.
    """

    def __init__(self, runtime: Any, spec: LatentSpec) -> None:
        super().__init__(runtime, spec.steps)
        self.latent = spec


@pytest.fixture
def through_latents(monkeypatch: pytest.MonkeyPatch) -> Callable[[LatentSpec], None]:
    """Every model that a command opens goes through latents of this kind."""
    opened = models.open_runtime

    def force(spec: LatentSpec) -> None:
        monkeypatch.setattr(
            models, "open_runtime", lambda *a, **k: AlwaysLatents(opened(*a, **k), spec)
        )

    return force


@pytest.mark.parametrize(
    ("model", "mode"), [("small_int8", "open"), ("small_checkpoint", "bottleneck")]
)
def test_a_model_is_probed_through_the_command_line(
    model: str,
    mode: str,
    request: pytest.FixtureRequest,
    through_latents: Callable[[LatentSpec], None],
    call: Call,
    tmp_path: Path,
) -> None:
    through_latents(LatentSpec(3, mode=mode))
    out = tmp_path / "probe.json"
    page = tmp_path / "probe.html"
    limits = ("--limit", 6, "--batch", 4)
    done = call("probe", request.getfixturevalue(model), *limits, "--json", out, "--html", page)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    told = json.loads(out.read_text())
    assert (told["schema"], told["n"], told["opened"]) == ("lvr-lite/probe", 6, 6)
    assert (told["data"], told["seeds"]["scenes"]) == ("scenes", 0)
    assert told["interventions"]["self"]["changed_count"] == 0
    assert (
        told["interventions"]["zero"]["changed_count"]
        + told["interventions"]["noise"]["changed_count"]
        > 0
    )
    assert told["verdict"] in done.out.replace("\n", " ")
    assert page.stat().st_size > 5000


def test_a_file_of_samples_is_probed(
    small_int8: Path, tmp_path: Path, through_latents: Callable[[LatentSpec], None], call: Call
) -> None:
    through_latents(LatentSpec(2))
    path = write_scenes(tmp_path / "scenes", 4, 1, "test")
    out = tmp_path / "probe.json"
    options = ("--data", path, "--limit", 3, "--only", "noise,k0", "--json", out)
    assert call("probe", small_int8, *options).code == 0
    told = json.loads(out.read_text())
    assert (told["n"], told["data"]) == (3, str(path))
    assert list(told["interventions"]) == ["none", "noise", "k0"]
    assert told["verdict"].startswith("not judged")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--data", "nosuch", "--data nosuch: neither scenes nor a file of samples"),
        ("--only", "nose", "--only nose: 'nose' is no intervention"),
        ("--limit", "0", "--limit must be 1 or more, not 0"),
    ],
)
def test_a_wrong_call_is_one_line(
    option: str, value: str, words: str, small_int8: Path, call: Call
) -> None:
    done = call("probe", small_int8, option, value)
    assert done.code == 2
    assert done.error.startswith(words)


def test_a_base_model_without_latents_is_one_line(small_checkpoint: Path, call: Call) -> None:
    done = call("probe", small_checkpoint, "--limit", 2)
    assert done.code == 2
    assert done.error == (
        f"{small_checkpoint.name}: has no latent steps, so there is nothing to probe; "
        "give a model tuned with latents"
    )


def test_the_scenes_are_those_of_the_seed() -> None:
    first, again, other = (
        [s.question for s, _ in load_items("scenes", 5, seed)] for seed in (0, 0, 1)
    )
    assert first == again != other
