"""Rewards of stage 2: plain functions of a sample and an answer, chosen by name or by
module:function.

May import: all that stands above `train`.

A reward is a finite number, the larger the better. What counts is how it differs among the answers
to one question.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from lvr_lite.data.samples import Sample
from lvr_lite.errors import LvrError, NotFiniteError, UsageError
from lvr_lite.eval import score
from lvr_lite.train.algebra import same_value

# Relative, of numbers.
TOLERANCE = 1e-3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Answer:
    """One rollout, as rewards see it.

    text: without markers and end of turn.
    latents: how many latent steps it has.
    before: how many text tokens come before them.
    ended: whether the model ended it, and not the limit of tokens.
    donor: the greedy answer with latents from another picture, about which the same question has
        another right answer. None where there is no such picture, or no reward asks for it.
    own: the greedy answer with its own latents; None where `donor` is.
    """

    text: str
    latents: int = 0
    before: int = 0
    ended: bool = True
    donor: str | None = None
    own: str | None = None


Reward = Callable[[Sample, Answer], float]


def accuracy(sample: Sample, answer: Answer) -> float:
    """1 for the right answer, else 0: what `eval` counts as right, the letter of the right choice,
    or, where the right answer is a number, the one number of a text ("about 12 cats") within
    TOLERANCE of it.
    """
    text = score.normalized(answer.text)
    expected = score.normalized(sample.answer)
    if score.is_correct(answer.text, sample.answer) or _names_choice(text, expected, sample):
        return 1.0
    number = _number(text)
    expected_number = score.number_of(expected)
    if number is None or expected_number is None:
        return 0.0
    right = float(expected_number)
    # Beyond what a float holds, all numbers would be the same.
    close = math.isclose(number, right, rel_tol=TOLERANCE, abs_tol=1e-9)
    return float(close and math.isfinite(right))


def _names_choice(text: str, expected: str, sample: Sample) -> bool:
    """Whether a text is the letter of the right choice, alone or with the choice after it."""
    choices = sample.choices or ()
    if sample.answer not in choices or len(choices) > len(LETTERS):
        return False
    letter = LETTERS[choices.index(sample.answer)]
    bare = text.strip("()")
    marked = re.match(rf"{letter}\b", bare) is not None
    return bare == letter or (marked and bare[1:].endswith(expected))


def math_accuracy(sample: Sample, answer: Answer) -> float:
    """As `accuracy`, and 1 as well for an expression that equals the right one: 2*(x+1) is 2x+2,
    1/2 is 0.5. Nothing of either is evaluated as code (see `lvr_lite.train.algebra`).
    """
    return accuracy(sample, answer) or float(same_value(answer.text, sample.answer))


def format(sample: Sample, answer: Answer) -> float:  # noqa: ARG001
    """1 for an answer that begins with latents, goes on with text, and that the model ended."""
    return float(answer.latents > 0 and answer.before == 0 and bool(answer.text) and answer.ended)


def latent_use(sample: Sample, answer: Answer) -> float:  # noqa: ARG001
    """1 for an answer with latents that those of the donor in their place would have changed."""
    return float(answer.latents > 0 and answer.donor is not None and answer.donor != answer.own)


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "math": math_accuracy,
    "format": format,
    "latent-use": latent_use,
}


@dataclass(frozen=True)
class Scoring:
    """What a run pays for: (name, function, weight) of each reward."""

    parts: tuple[tuple[str, Reward, float], ...]

    @property
    def needs_donor(self) -> bool:
        """Whether a reward looks at the answer with a donor's latents."""
        return any(reward is latent_use for _, reward, _ in self.parts)

    def __call__(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """What each reward gives, unweighted, and "reward", their weighted sum.

        Raises LvrError naming sample and reward where one raises or gives no finite number.
        """
        values: dict[str, float] = {}
        total = 0.0
        for name, reward, weight in self.parts:
            values[name] = _value_of(name, reward, sample, answer)
            total += weight * values[name]
        return values | {"reward": total}


def _value_of(name: str, reward: Reward, sample: Sample, answer: Answer) -> float:
    where = f"on sample {sample.id}, {answer.text!r}"
    try:
        value = float(reward(sample, answer))
    # Whatever a user's function raises, the run must stop and say where.
    except Exception as error:
        raise LvrError(f"reward {name}: raised {type(error).__name__} ({error}) {where}") from error
    if not math.isfinite(value):
        raise NotFiniteError(f"reward {name}: gave {value} {where}; it must be a finite number")
    return value


def read_rewards(text: str) -> Scoring:
    """Scoring of "accuracy=1,format=0.2,my_rewards:brevity=0.1"; a weight is 1 where none is
    written.

    Raises UsageError for a name that is not known, a module that does not import, or a weight that
    is no number.
    """
    parts: dict[str, tuple[str, Reward, float]] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight_text = part.partition("=")
        weight = _weight(name, weight_text)
        reward = REWARDS[name] if name in REWARDS else _imported(name)
        if name in parts:
            raise UsageError(f"grpo.rewards: {name} is there twice; give it one weight")
        parts[name] = (name, reward, weight)
    if not parts:
        raise UsageError(
            f"grpo.rewards is empty: name some of {', '.join(REWARDS)}, or module:function"
        )
    return Scoring(tuple(parts.values()))


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text) if text else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UsageError(f"grpo.rewards: the weight of {name} must be a number, not {text!r}")
    return weight


def _imported(name: str) -> Reward:
    module, colon, function = name.partition(":")
    if not colon:
        raise UsageError(
            f"grpo.rewards: {name} is not known; choose of {', '.join(REWARDS)}, "
            "or name module:function"
        )
    try:
        reward = getattr(importlib.import_module(module), function, None)
    # A user's module may raise anything while it is imported.
    except Exception as error:
        raise UsageError(
            f"grpo.rewards: {module} does not import ({type(error).__name__}: {error}); "
            "it must be on PYTHONPATH"
        ) from error
    if not callable(reward):
        raise UsageError(f"grpo.rewards: {module} has no function {function}")
    checked: Reward = reward
    return checked


def _number(text: str) -> float | None:
    """The one number of a text, as in "12 cats"; None where there is none or several."""
    numbers: list[str] = NUMBER.findall(text)
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None
