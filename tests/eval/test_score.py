"""Scoring: which answers count as the same, and how sure a share is."""

from __future__ import annotations

import pytest

from lvr_lite.eval.score import (
    caption,
    chosen_letter,
    is_correct,
    lettered_options,
    mean_of_shares,
    normalized,
    pair_accuracy,
    together,
    wilson,
)


@pytest.mark.parametrize(
    "answer",
    [
        "red",
        "Red",
        " red ",
        "RED.",
        "red!",
        '"red"',
        "'red'",
        "(red)",
        "<answer>red</answer>",
        "<answer> Red. </answer>",
        "red\n",
    ],
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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("0.5", ".5"), (".50.", "0.5"), ("5.0", "5"), ("1,200", "1200"), ("!", "!"), ("+3", "3")],
)
def test_numbers_are_compared_as_numbers_and_a_mark_may_be_the_answer(
    answer: str, expected: str
) -> None:
    assert is_correct(answer, expected)
    assert is_correct(expected, answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("5", ".5"), ("", "!"), ("?", "!"), ("", "()"), ("-5", "5"), ("1e999", "1e998"), ("5", "15")],
)
def test_nothing_that_counts_is_lost_where_outer_punctuation_is(answer: str, expected: str) -> None:
    assert not is_correct(answer, expected)
    assert not is_correct(expected, answer)


def test_a_number_within_another_is_not_the_option() -> None:
    assert chosen_letter("it is 0.5 metres", ["5", "7"]) is None
    assert chosen_letter("it is 0.5 metres", ["5", "0.5"]) == "B"
    assert chosen_letter("0.5", ["5", ".5"]) == "B"


EXPECTED = "star red plain A top left ; heart blue dotted 7 bottom right"  # twelve details


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (EXPECTED, 1.0),
        ("heart blue dotted 7 bottom right ; star red plain A top left.", 1.0),  # in another order
        ("STAR red plain a top left ;heart blue dotted 7 bottom right", 1.0),
        ("star red plain A top left ; heart blue striped 7 bottom right", 22 / 24),
        (
            "star blue dotted 7 bottom right ; heart red plain A top left",
            4 / 24,
        ),  # all the words, on the wrong things
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
def test_a_caption_counts_by_the_details_that_it_tells_of_the_right_things(
    answer: str, share: float
) -> None:
    assert caption(answer, EXPECTED) == pytest.approx(share)


def test_only_a_caption_with_every_detail_scores_exactly_one() -> None:
    assert caption(EXPECTED, EXPECTED) == 1
    assert caption(EXPECTED + " ; cross", EXPECTED) < 1


def test_the_interval_of_a_mean_of_scores_is_that_of_a_share_of_the_same_size() -> None:
    assert wilson(7.5, 10) == pytest.approx(wilson(75, 100, z=1.959964 * 10**0.5))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 2, 0.0945, 0.9055),
        (50, 100, 0.4038, 0.5962),
    ],
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


def test_groups_count_where_they_are_whole() -> None:
    outcomes = [
        ("a", True),
        ("b", True),
        ("a", True),
        (None, False),
        ("a", True),
        ("a", True),
        ("b", True),
        ("c", False),
    ]
    assert together(outcomes, 4) == [True]
    assert together([*outcomes, ("c", True), ("c", True), ("c", True)], 4) == [True, False]


def test_the_mean_of_shares_weighs_each_alike_whatever_its_size() -> None:
    mean, low, high = mean_of_shares([(1, 1), (0, 99)])
    assert mean == 0.5
    assert low < 0.5 < high
    assert mean_of_shares([(8, 10)]) == pytest.approx((0.8, *wilson(8, 10)))
    assert mean_of_shares([]) == (0.0, 0.0, 1.0)


def test_the_mean_of_several_shares_is_surer_than_each() -> None:
    _, low, high = mean_of_shares([(50, 100)] * 4)
    one_low, one_high = wilson(50, 100)
    assert high - low == pytest.approx((one_high - one_low) / 2)  # the root of four


# --------------------------------------------------------------------------------------------------
# multiple choice

OPTIONS = ("Open", "Closed", "A red car", "dark blue")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(
            (form, "B")
            for form in (
                "B",
                "b",
                "(B)",
                "(b)",
                "[B]",
                "B.",
                "B)",
                "B:",
                " B\n",
                "'B'",
                "**B**",
                "(B).",
                "b)",
            )
        ),
        *(
            (form, "B")
            for form in (
                "B) Closed",
                "B. Closed",
                "(B) Closed",
                "b. closed",
                "B: Closed",
                "B - Closed",
                "B Closed",
                "B, Closed.",
            )
        ),
        *(
            (form, "B")
            for form in (
                "Answer: B",
                "answer: b",
                "**Answer:** B",
                "Answer:\nB",
                "Final Answer: B",
                "Answer is B. Closed",
            )
        ),
        *(
            (form, "B")
            for form in (
                "The answer is B",
                "The answer is (B).",
                "The correct answer is option B.",
                'The answer is "B".',
            )
        ),
        *(
            (form, "B")
            for form in (
                "Option B",
                "It is B",
                "it is b.",
                "It's (b)",
                "I choose B",
                "I'd say B",
                "So, B",
                "B is correct",
            )
        ),
        *(
            (form, "B")
            for form in (
                "<answer>B</answer>",
                "<answer> (B) Closed </answer>",
                "<ANSWER>b",
                "A or B? <answer>B</answer>",
                "B</answer>",
            )
        ),
        *(
            (form, "B")
            for form in (
                "<answer>A</answer> no: <answer>B</answer>",
                "<think>A, then C</think>\nB",
                r"\boxed{B}",
                r"$\boxed{\text{B}}$",
            )
        ),
        *(
            (form, "B")
            for form in (
                "Closed",
                "closed.",
                "CLOSED",
                "The door is closed",
                "B\nIn A it would be seen.",
                "B because it is shut",
            )
        ),
        *(
            (form, "A")
            for form in (
                "A",
                "a",
                "(a)",
                "a.",
                "A Open",
                "A. Open",
                "A because it is open",
                "A is correct",
                "I think it is A",
                "A A",
            )
        ),
        *(
            (form, "C")
            for form in (
                "A red car",
                "a red car.",
                "Answer: A red car",
                "The answer is a red car",
                "C. A red car",
                "It shows a red car",
            )
        ),
    ],
)
def test_an_answer_chooses_a_letter_in_every_form(answer: str, letter: str) -> None:
    assert chosen_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(
            (form, None)
            for form in (
                "A, B",
                "A and B",
                "A/B",
                "A B",
                "AB",
                "A\nB",
                "Both A and B",
                "(A) Open (B) Closed",
                "A. Open\nB. Closed",
            )
        ),
        *(
            (form, None)
            for form in (
                "The answer is A or B",
                "The answer is A, B",
                "A, because B is shut",
                "open and closed",
            )
        ),
        ("A. Open B. Closed. So the answer is B.", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        ("Option A is wrong, option B is right", "B"),
        ("Therefore the answer is: (D) dark blue, not A.", "D"),
        ("not A but B", "B"),
    ],
)
def test_of_several_letters_the_one_in_a_plain_conclusion_counts(
    answer: str, letter: str | None
) -> None:
    assert chosen_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "  ",
        "\n",
        "<answer></answer>",
        "...",
        "E",
        "(E)",
        "Answer: E",
        "A blue car",
        "The answer is a dog",
        "it is a dog",
        "Not A",
        "The answer is not A",
        "The door is not closed",
        "It isn't open",
        "None of the above",
        "I do not know",
    ],
)
def test_what_names_no_option_chooses_none(answer: str) -> None:
    assert chosen_letter(answer, OPTIONS) is None


def test_a_before_a_word_is_the_article() -> None:
    assert chosen_letter("A red car", ("Open", "Closed")) is None
    assert chosen_letter("A red car", ("blue", "red car")) == "B"
    assert chosen_letter("A", ("blue", "red car")) == "A"


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("top left", ("left", "top left"), "B"),
        ("it is top left", ("left", "top left"), "B"),
        ("No, there is none", ("Yes", "No"), "B"),
        ("Yes and no", ("Yes", "No"), None),
        ("There are 3 dogs", ("2", "3", "13"), "B"),
        ("A. Vitamin C", ("Vitamin C", "Vitamin B", "Iron"), "A"),
        ("B", ("B", "A"), "B"),  # a letter is what was asked for
        ("red", ("red", "red"), None),
        ("the second image", ("the second image", "the third image"), "A"),
    ],
)
def test_words_of_an_option_stand_for_its_letter(
    answer: str, options: tuple[str, ...], letter: str | None
) -> None:
    assert chosen_letter(answer, options) == letter


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (
            "Which?\n(A) rubber\n(B) thick cotton\nAnswer with the option's letter",
            ["rubber", "thick cotton"],
        ),
        ("(a) Open (b) Closed", ["Open", "Closed"]),
        ("How far?\nA. 1.5 m\nB. 2 m\nC. 3 m", ["1.5 m", "2 m", "3 m"]),
        ("Which? A) one B) two", ["one", "two"]),
        ("Is (A) or (B) nearer?\nOptions:\nA. the left\nB. the right", ["the left", "the right"]),
        ("What is in picture A. Say it.", []),
        ("what colour is the star", []),
    ],
)
def test_options_are_read_off_a_question(question: str, options: list[str]) -> None:
    assert lettered_options(question) == options


@pytest.mark.parametrize(
    "piece",
    ["answer ", "A, ", "(A) or ", "not word ", "\n", "( ", "\\boxed{ ", "A. ", "<answer>"],
)
def test_a_long_hostile_answer_is_scored_in_one_pass(piece: str) -> None:
    # Each took minutes where the time grew with the square of the length.
    text = piece * 100_000 + " " * 100_000
    is_correct(text, "red")
    chosen_letter(text, ["one", "two", "three"])
    lettered_options(text)
