"""Scoring: which answers count as the same, and how sure a share is."""

from __future__ import annotations

import pytest

from lvr_lite.eval.score import agreement, caption, is_correct, normalized, pair_accuracy, wilson


@pytest.mark.parametrize(
    "answer",
    ["red", "Red", " red ", "RED.", "red!", '"red"', "'red'", "(red)", "<answer>red</answer>", "<answer> Red. </answer>", "red\n"],
)
def test_forms_of_one_answer_are_the_same(answer: str) -> None:
    assert is_correct(answer, "red")
    assert is_correct("red", answer)


@pytest.mark.parametrize("answer", ["", "dark red", "redd", "blue", "red blue", "not red", "r ed"])
def test_other_answers_are_not(answer: str) -> None:
    assert not is_correct(answer, "red")


def test_the_text_in_tags_counts_and_not_what_leads_to_it() -> None:
    assert normalized("the star, so <answer>blue</answer> it is") == "blue"
    assert normalized("<ANSWER>blue") == "blue"  # cut at the limit of tokens
    assert normalized("<answer>\n top\n left </answer>") == "top left"


def test_spaces_within_an_answer_count_once_and_are_not_lost() -> None:
    assert normalized("top   left\n") == "top left"
    assert not is_correct("topleft", "top left")


@pytest.mark.parametrize("answer", ["3.5", "x-1", "a, b"])
def test_punctuation_within_an_answer_stays(answer: str) -> None:
    assert normalized(answer) == answer


EXPECTED = "star red plain A top left ; heart blue dotted 7 bottom right"  # twelve details


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (EXPECTED, 1.0),
        ("heart blue dotted 7 bottom right ; star red plain A top left.", 1.0),  # in another order
        ("STAR red plain a top left ;heart blue dotted 7 bottom right", 1.0),
        ("star red plain A top left ; heart blue striped 7 bottom right", 22 / 24),
        ("star blue dotted 7 bottom right ; heart red plain A top left", 4 / 24),  # all the words, on the wrong things
        ("star red plain A top left", 12 / 18),  # one thing left out
        (f"{EXPECTED} ; cross red plain A top left", 24 / 30),  # one invented
        (f"{EXPECTED} ; star red plain A top left", 24 / 30),  # one told twice
        ("star red plain A top left ; heart", 14 / 19),  # cut
        ("star", 2 / 13),
        ("red plain A top left", 0.0),
        ("", 0.0),
        (";;", 0.0),
    ],
)
def test_a_caption_counts_by_the_details_that_it_tells_of_the_right_things(answer: str, share: float) -> None:
    assert caption(answer, EXPECTED) == pytest.approx(share)


def test_only_a_caption_with_every_detail_scores_exactly_one() -> None:
    assert caption(EXPECTED, EXPECTED) == 1
    assert caption(EXPECTED + " ; cross", EXPECTED) < 1


def test_the_interval_of_a_mean_of_scores_is_that_of_a_share_of_the_same_size() -> None:
    assert wilson(7.5, 10) == pytest.approx(wilson(75, 100, z=1.959964 * 10**0.5))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055), (50, 100, 0.4038, 0.5962)],
)
def test_the_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_without_questions_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_more_questions_make_the_interval_narrower() -> None:
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def test_a_pair_is_right_when_both_items_are() -> None:
    outcomes = [("a", True), ("b", True), (None, False), ("a", True), ("b", False)]
    assert pair_accuracy(outcomes) == 0.5


def test_half_a_pair_does_not_count() -> None:
    assert pair_accuracy([("a", True), ("b", True), ("b", True)]) == 1.0
    assert pair_accuracy([("a", False), ("b", True), ("b", True)]) == 1.0


@pytest.mark.parametrize("outcomes", [[], [(None, True)], [("a", True)]])
def test_without_a_whole_pair_there_is_no_share(outcomes: list[tuple[str | None, bool]]) -> None:
    assert pair_accuracy(outcomes) is None


def test_agreement_is_the_share_of_equal_answers() -> None:
    assert agreement([[1, 2], [3], []], [[1, 2], [4], []]) == pytest.approx(2 / 3)
    assert agreement([], []) == 0.0
    with pytest.raises(ValueError, match="zip"):
        agreement([[1]], [])
