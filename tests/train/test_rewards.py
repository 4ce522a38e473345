"""Rewards of stage 2: what each pays for, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lvr_lite.data.samples import Sample
from lvr_lite.errors import LvrError, UsageError
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
