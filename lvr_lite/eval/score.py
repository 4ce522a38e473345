"""Scoring of answers: pure functions. May import: the standard library."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence


def normalized(answer: str) -> str:
    """What counts of an answer: the text in `<answer>` tags if there are any, lower case, without outer punctuation and spaces."""
    tagged = re.search(r"<answer>(.*?)(?:</answer>|$)", answer, re.DOTALL | re.IGNORECASE)
    text = tagged.group(1) if tagged else answer
    return re.sub(r"\s+", " ", text).strip().strip(".,;:!?\"'()").strip().lower()


def is_correct(answer: str, expected: str) -> bool:
    return normalized(answer) == normalized(expected)


def caption(answer: str, expected: str) -> float:
    """F1 of the details that a caption tells, from 0 to 1.

    Phrases such as "star red plain A top left" stand between semicolons. A detail is a word of a phrase together with the phrase's first
    word, the thing that it is about; so a colour counts only on the right thing, a thing told twice counts once as right and twice as
    said, and the order of things does not count.
    """
    said, right = _details(answer), _details(expected)
    return 2 * (said & right).total() / max(1, said.total() + right.total())


def _details(text: str) -> Counter[tuple[str, str]]:
    phrases = [phrase.split() for phrase in normalized(text).split(";")]
    return Counter((words[0], word) for words in phrases for word in words)


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a share `right / n`; (0, 1) for n = 0 (Wilson 1927). Of the mean of n scores between 0 and 1 whose
    sum is `right` it is an interval as well, rather too wide than too narrow: at one mean no scores vary more than zeros and ones."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def pair_accuracy(outcomes: Iterable[tuple[str | None, bool]]) -> float | None:
    """Share of pairs in which both items are right, over whole pairs; None where there is none."""
    pairs: dict[str, list[bool]] = {}
    for pair, right in outcomes:
        if pair is not None:
            pairs.setdefault(pair, []).append(right)
    whole = [all(p) for p in pairs.values() if len(p) == 2]
    return sum(whole) / len(whole) if whole else None


def agreement(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """Share of answers whose token ids are the same in two runs over the same items."""
    return sum(list(x) == list(y) for x, y in zip(a, b, strict=True)) / max(1, len(a))
