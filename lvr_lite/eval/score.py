"""Scoring of answers: pure functions. May import: the standard library."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence


def normalized(answer: str) -> str:
    """What counts of an answer: the text in `<answer>` tags if there are any, lower case, without
    outer punctuation and spaces.
    """
    tagged = re.search(r"<answer>(.*?)(?:</answer>|$)", answer, re.DOTALL | re.IGNORECASE)
    text = tagged.group(1) if tagged else answer
    return re.sub(r"\s+", " ", text).strip().strip(".,;:!?\"'()").strip().lower()


def is_correct(answer: str, expected: str) -> bool:
    return normalized(answer) == normalized(expected)


def caption(answer: str, expected: str) -> float:
    """F1 of the details that a caption tells, from 0 to 1.

    Phrases such as "star red plain A top left" stand between semicolons. A detail is a word of a
    phrase together with the phrase's first word, the thing that it is about; so a colour counts
    only on the right thing, a thing told twice counts once as right and twice as said, and the
    order of things does not count.
    """
    said, right = _details(answer), _details(expected)
    return 2 * (said & right).total() / max(1, said.total() + right.total())


def _details(text: str) -> Counter[tuple[str, str]]:
    phrases = [phrase.split() for phrase in normalized(text).split(";")]
    return Counter((words[0], word) for words in phrases for word in words)


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % Wilson score interval of a share `right / n`; (0, 1) for n = 0 (Wilson 1927). Of the
    mean of n scores between 0 and 1 whose sum is `right` it is an interval as well, rather too wide
    than too narrow: at one mean no scores vary more than zeros and ones.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_shares(shares: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """The plain mean of shares `(right, n)` of several groups, and its 95 % interval: their Wilson
    intervals put together by squaring and adding (MOVER, Zou and Donner 2008). (0, 0, 1) without
    any.
    """
    if not shares:
        return 0.0, 0.0, 1.0
    means = [right / max(1, n) for right, n in shares]
    mean = sum(means) / len(means)
    intervals = [wilson(right, n) for right, n in shares]
    below = math.sqrt(
        sum((m - low) ** 2 for m, (low, _) in zip(means, intervals, strict=True))
    ) / len(means)
    above = math.sqrt(
        sum((high - m) ** 2 for m, (_, high) in zip(means, intervals, strict=True))
    ) / len(means)
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def together(outcomes: Iterable[tuple[str | None, bool]], size: int) -> list[bool]:
    """Of every whole group of `size` items, whether all of it is right; an item is (its group,
    whether it is right).
    """
    groups: dict[str, list[bool]] = {}
    for group, right in outcomes:
        if group is not None:
            groups.setdefault(group, []).append(right)
    return [all(g) for g in groups.values() if len(g) == size]


def pair_accuracy(outcomes: Iterable[tuple[str | None, bool]]) -> float | None:
    """Share of pairs in which both items are right, over whole pairs; None where there is none."""
    whole = together(outcomes, 2)
    return sum(whole) / len(whole) if whole else None


def agreement(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """Share of answers whose token ids are the same in two runs over the same items."""
    return sum(list(x) == list(y) for x, y in zip(a, b, strict=True)) / max(1, len(a))


# -------------------------------------------------------------------------------------------------------
# multiple choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = r"(?:\(\s*{0}\s*\)|\[\s*{0}\s*\]|\b{0}\b)"
_LEADS = (  # what comes before a letter that is meant as the answer
    r"\b(?:answer|option|choice|response)\b(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be|to\s+the\s+question\s+is))?\s*[:=]?\s*"
    r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*:?\s*)?"
    r"|\b(?:choose|pick|select|go\s+with)\s+(?:option\s+|choice\s+|letter\s+)?"
    r"|\b(?:therefore|thus|hence|so)\b,?\s*(?:it\s+is\s+|it's\s+|the\s+)?"
    r"|^\s*(?:it\s+is|it's)\s+"
)
_CONCLUSION = re.compile(
    rf"(?:{_LEADS})(?P<mark>{_MARK.format('([A-Za-z])')})", re.IGNORECASE | re.MULTILINE
)
_ALSO = re.compile(
    rf"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:or\s+|and\s+)?(?:option\s+)?{_MARK.format('[A-Z]')}(?!\s+[a-z])"
)
# what never follows the article
_AFTER_A = (
    r"(?!\s+(?!(?:is|was|because|since|and|or|as\s+it|would|seems|shows|[B-Z])\b)\w)(?!['’\-])"
)
_NEGATION = re.compile(
    r"(?:\b(?:not|neither|nor|never|no|isn't|rather\s+than|instead\s+of)|n't|n’t)\s+(?:(?!but\b)\w+\s+){0,2}$",
    re.IGNORECASE,
)


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """Which of the options, lettered A, B, … in their order, an answer chooses; None where it
    chooses none, or more than one.

    Read is the last `<answer>` or \\boxed{}, or else all of the text. A letter may stand alone, in
    brackets, before its words, or in a sentence that says so, in either case of letters; instead of
    it, the words of one option may stand. Of several letters the one in a plain conclusion counts
    ("so the answer is B"), otherwise none. "A" before a word is the article, unless the words are
    option A's.
    """
    text = _answer_text(answer)
    letters = LETTERS[: len(options)]
    words = [normalized(option) for option in options]
    if not normalized(text):
        return None
    alone = {
        m.group(1).upper()
        for line in text.splitlines()
        if (m := re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", line))
    }
    if alone and not (
        len(alone) == 1 and normalized(text) in words and normalized(text).upper() not in letters
    ):
        (letter, *others) = alone
        return letter if not others and letter in letters else None
    if normalized(text) in words:
        return (
            letters[words.index(normalized(text))] if words.count(normalized(text)) == 1 else None
        )
    for letter, option in zip(letters, words, strict=True):
        led = re.match(rf"\W*{letter}\b[\s\W]*(?P<rest>\S.*)", text, re.DOTALL | re.IGNORECASE)
        if led and normalized(led["rest"]) == option:
            return letter
    if (concluded := _concluded(text)) is not None:
        return concluded if concluded in [*letters] else None
    mentioned = _mentioned(text, letters)
    if mentioned:
        (letter, *others) = mentioned
        return letter if not others and letter in letters else None
    return _by_words(text, dict(zip(letters, words, strict=True)))


def _answer_text(answer: str) -> str:
    """What an answer comes to: behind a chain of thought, within its last tags or box, without
    Markdown's emphasis.
    """
    text = answer.split("</think>")[-1]
    if tagged := re.findall(
        r"<answer>(.*?)(?:</answer>|(?=<answer>)|$)", text, re.DOTALL | re.IGNORECASE
    ):
        text = tagged[-1]
    elif boxed := re.findall(r"\\boxed\{\s*(?:\\text\w*\{)?([^{}]*)\}", text):
        text = boxed[-1]
    return re.sub(r"</?\w+>|<\|\w+\|>|[*`$]", "", text).strip()


def _concluded(text: str) -> str | None:
    """The letter of the last plain conclusion; "" where that names more than one, None where there
    is no conclusion.
    """
    found = None
    for match in _CONCLUSION.finditer(text):
        mark, rest = match["mark"], text[match.end() :]
        letter = mark.strip("()[] ")
        article = mark == letter and letter in "aAI" and not re.match(_AFTER_A, rest)
        if (
            article
            or (mark == letter and letter.islower() and re.match(r"['’]|\s+\w", rest))
            or _NEGATION.search(text[: match.start("mark")])
        ):
            continue
        found = "" if _ALSO.match(rest) else letter.upper()
    return found


def _mentioned(text: str, letters: str) -> list[str]:
    """Every letter that is named, once each: bracketed or beginning a line with its mark in either
    case, or as a capital word.
    """
    found: dict[str, None] = {}
    marks = r"[(\[]\s*([A-Za-z])\s*[)\]]|^\s*([A-Za-z])\s*(?:[.):,]|[-–—])(?=\s|$)"
    capital = rf"(?<![\w'’.\-])([{letters}])(?![\w'’\-])"
    for match in re.finditer(rf"{marks}|{capital}", text, re.MULTILINE):
        letter = next(group for group in match.groups() if group)
        article = match.group(3) in ("A", "I") and not re.match(_AFTER_A, text[match.end() :])
        if not article and not _NEGATION.search(text[: match.start()]):
            found[letter.upper()] = None
    return list(found)


def _by_words(text: str, options: dict[str, str]) -> str | None:
    """The one option whose words are in the text, unless a negation stands before them; of an
    option within another, the longer one.
    """
    said = re.sub(r"\s+", " ", text).lower()
    found: dict[str, tuple[int, int]] = {}
    for letter, option in options.items():
        if option and (match := re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)):
            found[letter] = match.span()
    outer = [
        x
        for x, (a, b) in found.items()
        if not any(c <= a and b <= d and (c, d) != (a, b) for c, d in found.values())
    ]
    if len(outer) != 1 or _NEGATION.search(said[: found[outer[0]][0]]):
        return None
    return outer[0]


def lettered_options(text: str) -> list[str]:
    """The options that a question shows with their letters from A on, as "(A) red", "A. red" or "A)
    red", on lines or in one; [] where it shows fewer than two. Of several such lists the last
    counts.
    """
    lists: dict[int, list[str]] = {}
    for mark in (r"\(([A-Za-z])\)", r"(?<![\w(.])([A-Za-z])[.):](?=\s)"):
        marks = list(re.finditer(mark, text))
        for start, first in enumerate(marks):
            run = [first]
            for match in marks[start + 1 :]:
                if ord(match.group(1)) == ord(run[-1].group(1)) + 1:
                    run.append(match)
            ends = [m.start() for m in run[1:]] + [len(text)]
            options = [
                text[m.end() : end].split("\n")[0].strip(" ,;\t\r")
                for m, end in zip(run, ends, strict=True)
            ]
            if first.group(1) in "aA" and len(options) > 1 and all(options):
                lists[first.start()] = options
    return lists[max(lists)] if lists else []
