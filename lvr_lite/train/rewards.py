"""Rewards of stage 2: plain functions of a sample and an answer, chosen by name or by
module:function. May import: the core.

A reward is a finite number, the larger the better; what counts is how it differs among the answers
to one question.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lvr_lite.data.samples import Sample
from lvr_lite.errors import LvrError, UsageError
from lvr_lite.eval import score

TOLERANCE = 1e-3  # relative, of numbers
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Answer:
    """One rollout. text: what was said. latents: steps of reasoning. before: text tokens ahead of
    them. ended: by itself, and not at the limit. donor: what is said with the latents of another
    picture of which the same is asked, and another answer is right; None where there is none, or no
    reward looks at it. own: what is said with its own latents, likewise without drawing by lot.
    """

    text: str
    latents: int = 0
    before: int = 0
    ended: bool = True
    donor: str | None = None
    own: str | None = None


Reward = Callable[[Sample, Answer], float]


def accuracy(sample: Sample, answer: Answer) -> float:
    """1 for the right answer, else 0: its words, the letter of the right choice, or a number within
    TOLERANCE of it.
    """
    said, right = score.normalized(answer.text), score.normalized(sample.answer)
    if said == right:
        return 1.0
    if sample.choices and len(sample.choices) <= 26:
        letter = (
            "abcdefghijklmnopqrstuvwxyz"[sample.choices.index(sample.answer)]
            if sample.answer in sample.choices
            else None
        )
        if letter is not None and re.fullmatch(
            rf"(?:{letter}\b.*{re.escape(right)}|{letter})", said.strip("()")
        ):
            return 1.0
    a, b = _number(said), _number(right)
    return float(
        a is not None and b is not None and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-9)
    )


def math_accuracy(sample: Sample, answer: Answer) -> float:
    """As `accuracy`, and 1 as well for an expression that equals the right one, by sympy: 2*(x+1)
    is 2x+2, 1/2 is 0.5.
    """
    return accuracy(sample, answer) or float(_same_expression(answer.text, sample.answer))


def format(sample: Sample, answer: Answer) -> float:
    """1 for an answer that was reasoned in latents before a word was said, then said, and ended by
    itself.
    """
    return float(answer.latents > 0 and answer.before == 0 and bool(answer.text) and answer.ended)


def latent_use(sample: Sample, answer: Answer) -> float:
    """1 where an answer was reasoned in latents, and those of the donor in their place would have
    changed what is said.
    """
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
        return any(reward is latent_use for _, reward, _ in self.parts)

    def __call__(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """What each reward gives, unweighted, and "reward", their weighted sum. Raises LvrError
        naming sample and reward where one raises or gives no finite number.
        """
        found = {}
        for name, reward, _ in self.parts:
            try:
                value = float(reward(sample, answer))
            except (
                Exception
            ) as error:  # whatever a user's function raises, the run must stop and say where
                raise LvrError(
                    f"reward {name}: raised {type(error).__name__} ({error}) on sample {sample.id}, {answer.text!r}"
                ) from error
            if not math.isfinite(value):
                raise LvrError(
                    f"reward {name}: gave {value} on sample {sample.id}, {answer.text!r}; it must be a finite number"
                )
            found[name] = value
        return found | {"reward": sum(weight * found[name] for name, _, weight in self.parts)}


def read_rewards(text: str) -> Scoring:
    """Scoring of "accuracy=1,format=0.2,my_rewards:brevity=0.1"; a weight is 1 where none is given.

    Raises UsageError for a name that is not known, a module that does not import, or a weight that
    is no number.
    """
    parts = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, weight = part.partition("=")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(f"grpo.rewards: the weight of {name} must be a number, not {weight!r}")
        parts.append((name, REWARDS[name] if name in REWARDS else _imported(name), value))
    if not parts:
        raise UsageError(
            f"grpo.rewards is empty: name some of {', '.join(REWARDS)}, or module:function"
        )
    names = [name for name, _, _ in parts]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"grpo.rewards: {doubled} is there twice; give it one weight")
    return Scoring(tuple(parts))


def _imported(name: str) -> Reward:
    module, colon, function = name.partition(":")
    if not colon:
        raise UsageError(
            f"grpo.rewards: {name} is not known; choose of {', '.join(REWARDS)}, or name module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UsageError(
            f"grpo.rewards: {module} does not import ({type(error).__name__}: {error}); it must be on PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"grpo.rewards: {module} has no function {function}")
    reward: Reward = found
    return reward


def _number(text: str) -> float | None:
    """The one number of a text, as in "12 cats"; None where there is none or several."""
    found: Sequence[str] = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def _same_expression(a: str, b: str) -> bool:
    from tokenize import TokenError

    from sympy import SympifyError, simplify
    from sympy.parsing.sympy_parser import (
        implicit_multiplication_application,
        parse_expr,
        standard_transformations,
    )

    def read(text: str):  # type: ignore[no-untyped-def]
        text = re.sub(r"</?answer>", "", text).strip(" .$")
        if (
            not re.fullmatch(r"[\w\s.+\-*/^()=]{1,200}", text) or "__" in text
        ):  # parse_expr evaluates what it is given
            return None
        text = text.rpartition("=")[2].replace("^", "**")
        return parse_expr(
            text, transformations=(*standard_transformations, implicit_multiplication_application)
        )

    try:
        left, right = read(a), read(b)
        return left is not None and right is not None and simplify(left - right) == 0
    except (
        SympifyError,
        TokenError,
        SyntaxError,
        TypeError,
        ValueError,
        AttributeError,
        NameError,
        ArithmeticError,
    ):  # it is no expression
        return False
