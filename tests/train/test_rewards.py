"""Rewards of stage 2: what each pays for, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lvr_lite.data.samples import Sample
from lvr_lite.errors import LvrError, UsageError
from lvr_lite.train.algebra import same_value
from lvr_lite.train.rewards import Answer, accuracy, format, latent_use, math_accuracy, read_rewards


def sample_of(answer: str, choices: tuple[str, ...] | None = None) -> Sample:
    return Sample("s-1", (), "?", answer, choices)


@pytest.mark.parametrize(
    ("text", "expected", "choices", "reward"),
    [
        ("Red.", "red", None, 1),
        ("blue", "red", None, 0),
        ("<answer> red </answer>", "red", None, 1),
        ("", "red", None, 0),
        ("12.0", "12", None, 1),
        ("about 12 cats", "12", None, 1),
        ("12 of 13", "12", None, 0),
        ("1,200", "1200", None, 1),
        ("11", "12", None, 0),
        ("5", ".5", None, 0),
        ("0.5", ".5", None, 1),
        ("", "!", None, 0),
        ("12 cats", "12 dogs", None, 0),
        ("b", "left", ("right", "left"), 1),
        ("(B)", "left", ("right", "left"), 1),
        ("B. left", "left", ("right", "left"), 1),
        ("a", "left", ("right", "left"), 0),
        ("B. right", "left", ("right", "left"), 0),
        ("a left", "right", ("right", "left"), 0),
    ],
)
def test_accuracy(text: str, expected: str, choices: tuple[str, ...] | None, reward: float) -> None:
    assert accuracy(sample_of(expected, choices), Answer(text)) == reward


@pytest.mark.parametrize(
    ("text", "expected", "reward"),
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
def test_math(text: str, expected: str, reward: float) -> None:
    assert math_accuracy(sample_of(expected), Answer(text)) == reward


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac12", "0.5"),
        (r"$\boxed{4}$", "4"),
        (r"so it is \boxed{\frac{3}{4}}.", "0.75"),
        ("<answer>2*2</answer>", "4"),
        ("x = 4", "4"),
        ("f(x) = 2x", "2*x"),
        ("2*3 = 6", "6"),
        ("x+y=2", "y+x=2"),
        ("y = 2x", "2x = y"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("sqrt(6)", "√2·√3"),
        ("sqrt(2/3)", "sqrt(6)/3"),
        ("1/(sqrt(2)-1)", "sqrt(2)+1"),
        ("sqrt(x)^2", "x"),
        ("8^(1/3)", "2"),
        ("50%", "0.5"),
        (r"50\%", "1/2"),
        (r"90^\circ", "90°"),
        ("90°", "90"),
        ("xy", "y*x"),
        ("x**2", "x²"),
        ("(x^2-1)/(x-1)", "x+1"),
        (r"\pi r^2", "r*r*pi"),
        (r"2\left(x+1\right)", "2x+2"),
        ("sin(x+1)", "sin(1+x)"),
        ("2^-1", "0.5"),
        ("1e3", "1,000"),
        ("2(3)", "6"),
        ("1/2 + 1/3", "5/6"),
    ],
)
def test_two_spellings_of_a_value_are_equal(one: str, other: str) -> None:
    assert same_value(one, other)
    assert same_value(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x+1", "x"),
        ("x = 4", "y = 4"),
        ("x^2 + y^2 = 1", "1"),
        ("0 = 0", "1 = 1"),
        ("-x^2", "(-x)^2"),
        ("sqrt(4)", "-2"),
        ("sqrt(2)+sqrt(3)", "sqrt(5)"),
        ("no", "on"),
        ("left red", "red left"),
        ("3 4", "12"),
        ("1/0", "1/0"),
        ("٣+0", "3"),
        ("(", "("),
    ],
)
def test_what_is_not_equal_or_no_expression_is_not(one: str, other: str) -> None:
    assert not same_value(one, other)
    assert not same_value(other, one)


# Each of them ran code, took minutes or ended the run where texts were evaluated.
@pytest.mark.parametrize(
    "attack",
    [
        "exec(chr(112)+chr(114))",
        "open(chr(120))",
        "9^9^9^9",
        "2^1000^1000",
        "factorial(99999999)",
        "1e999999999",
        "1" * 10**6,
        "(" * 10**5,
        "(" * 200 + "1" + ")" * 200,
        "-" * 399 + "1",
        "sqrt(" * 60 + "2" + ")" * 60,
        "sin(" * 20 + "x" + ")" * 20,
        "(x+y+z+a+b+c)^50",
        "(x+y)^99*(x+y)^99",
        "((x+1/3)^97*(y+1/7)^97)^9",
        "(sqrt(2)+sqrt(3)+sqrt(5)+sqrt(7))^900",
        "1/(x+" * 20 + "1" + ")" * 20,
        r"\boxed{" * 10**5,
        "<answer>" * 10**5,
        "1/(1-1)",
        r"\sqrt{\frac{1}{0}}",
    ],
)
def test_a_hostile_text_is_worth_nothing(attack: str) -> None:
    assert math_accuracy(sample_of("7"), Answer(attack)) == 0
    assert math_accuracy(sample_of(attack), Answer("7")) == 0
    assert not same_value(attack, "7")


def test_an_expression_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("builtins.exec", lambda *code: ran.append(code))
    monkeypatch.setattr("builtins.eval", lambda *code: ran.append(code))
    math_accuracy(sample_of("exec(chr(112))"), Answer("eval(chr(112)+chr(113))"))
    math_accuracy(sample_of("2x"), Answer("x+x"))
    assert ran == []


def test_numbers_beyond_floats_are_not_all_the_same() -> None:
    assert accuracy(sample_of("1e999"), Answer("1e400")) == 0
    assert accuracy(sample_of("1e999"), Answer("1e999")) == 1


def test_a_long_answer_to_a_choice_is_compared_in_one_pass() -> None:
    choices = ("a" * 20_000 + "b", "right")
    assert accuracy(sample_of(choices[0], choices), Answer("a " + "a" * 200_000)) == 0
    assert accuracy(sample_of(choices[0], choices), Answer("a. " + choices[0])) == 1


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
    (tmp_path / "my_rewards.py").write_text(
        "def short(sample, answer):\n    return -len(answer.text)\n"
        "def bad(sample, answer):\n    return 1 / 0\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    scoring = read_rewards("accuracy, format=0.5, my_rewards:short=0.01")
    assert scoring(sample_of("red"), Answer("red", latents=1)) == {
        "accuracy": 1,
        "format": 1,
        "my_rewards:short": -3,
        "reward": pytest.approx(1.47),
    }
    for text, message in (
        ("acuracy", r"acuracy is not known; choose of accuracy"),
        ("format=much", "weight of format must be a number"),
        ("", "is empty"),
        ("broken_rewards:f", "broken_rewards does not import .ModuleNotFoundError"),
        ("my_rewards:g", "my_rewards has no function g"),
        ("format,format=2", "format is there twice"),
        ("no_such_module_here:f", "does not import"),
    ):
        with pytest.raises(UsageError, match=message):
            read_rewards(text)
    with pytest.raises(
        LvrError, match=r"reward my_rewards:bad: raised ZeroDivisionError .* on sample s-1, 'red'"
    ):
        read_rewards("my_rewards:bad")(sample_of("red"), Answer("red"))
