"""Scoring of answers: pure functions. May import: the standard library."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

# An item: the group that it belongs to, if any, and whether its answer is right.
Outcome = tuple[str | None, bool]


# What may stand around an answer without being part of it. The point of ".5" is part of it.
_AROUND = ".,;:!?\"'()"
_LEADING = re.compile(r"""(?:[,;:!?"'()\s]|\.(?!\d))+""")
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,6})?")


def normalized(answer: str) -> str:
    """What counts of an answer: the text in `<answer>` tags if there are any, lower case, without
    outer punctuation and spaces. Of an answer that is all punctuation, all counts.
    """
    tagged = re.search(r"<answer>(.*?)(?:</answer>|$)", answer, re.DOTALL | re.IGNORECASE)
    text = tagged.group(1) if tagged else answer
    whole = re.sub(r"\s+", " ", text).strip().lower()
    leading = _LEADING.match(whole)
    bare = whole[leading.end() if leading else 0 :].rstrip(_AROUND + " ")
    return bare or whole


def is_correct(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one: the same words, or, where both are numbers, the same
    number ("0.5" for ".5"). An answer without any text is never right.
    """
    return _is_same(normalized(answer), normalized(expected))


def _is_same(text: str, expected: str) -> bool:
    """`is_correct` of texts that are normalized."""
    if text == expected:
        return bool(text)
    number = number_of(text)
    return number is not None and number == number_of(expected)


def number_of(text: str) -> Decimal | None:
    """The number that the whole of a normalized text is; None where it is anything else."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def caption(answer: str, expected: str) -> float:
    """F1 of the details in a caption, from 0 to 1.

    Phrases such as "star red plain A top left" stand between semicolons. A detail is a word of a
    phrase together with the phrase's first word, the object that it describes: a colour counts only
    with the right object. An object that is described twice has its details right once and counts
    twice in the length. The order of objects does not matter.
    """
    details = _details(answer)
    right = _details(expected)
    shared = (details & right).total()
    return 2 * shared / max(1, details.total() + right.total())


def _details(text: str) -> Counter[tuple[str, str]]:
    phrases = [phrase.split() for phrase in normalized(text).split(";")]
    return Counter((words[0], word) for words in phrases for word in words)


def wilson(
    right: float,
    n: int,
    z: float = 1.959964,
) -> tuple[float, float]:
    """95 % Wilson score interval of a share `right / n`; (0, 1) for n = 0 (Wilson 1927).

    It is also an interval of the mean of n scores between 0 and 1 whose sum is `right`, rather too
    wide than too narrow: of all scores with one mean, zeros and ones vary most.
    """
    if n == 0:
        return 0.0, 1.0
    p = right / n
    z2 = z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_shares(shares: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """The plain mean of shares `(right, n)` of several groups, and its 95 % interval.

    The distances of the groups' Wilson bounds are combined by squaring and adding (MOVER, Zou and
    Donner 2008). (0, 0, 1) without any group.
    """
    if not shares:
        return 0.0, 0.0, 1.0
    count = len(shares)
    means = [right / max(1, n) for right, n in shares]
    mean = sum(means) / count
    intervals = [wilson(right, n) for right, n in shares]
    pairs = list(zip(means, intervals, strict=True))
    below = math.sqrt(sum((own - low) ** 2 for own, (low, _) in pairs)) / count
    above = math.sqrt(sum((high - own) ** 2 for own, (_, high) in pairs)) / count
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def together(outcomes: Iterable[Outcome], size: int) -> list[bool]:
    """Of every group that has exactly `size` items, whether all of them are right."""
    groups: dict[str, list[bool]] = {}
    for group, right in outcomes:
        if group is not None:
            groups.setdefault(group, []).append(right)
    return [all(items) for items in groups.values() if len(items) == size]


def pair_accuracy(outcomes: Iterable[Outcome]) -> float | None:
    """Share of whole pairs in which both items are right; None where there is no pair."""
    pairs = together(outcomes, 2)
    return sum(pairs) / len(pairs) if pairs else None


# ----------------------------------------------------------------------------------------------
# multiple choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = r"(?:\(\s*{0}\s*\)|\[\s*{0}\s*\]|\b{0}\b)"
# what comes before a letter that is meant as the answer
_LEADS = (
    r"\b(?:answer|option|choice|response)\b"
    r"(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be|to\s+the\s+question\s+is))?\s*[:=]?\s*"
    r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*:?\s*)?"
    r"|\b(?:choose|pick|select|go\s+with)\s+(?:option\s+|choice\s+|letter\s+)?"
    r"|\b(?:therefore|thus|hence|so)\b,?\s*(?:it\s+is\s+|it's\s+|the\s+)?"
    r"|^[^\S\n]*(?:it\s+is|it's)\s+"
)
_CONCLUSION = re.compile(
    rf"(?:{_LEADS})(?P<mark>{_MARK.format('([A-Za-z])')})", re.IGNORECASE | re.MULTILINE
)
# a second letter beside the first
_ALSO = re.compile(
    r"\s*(?:,|/|&|\bor\b|\band\b)\s*(?:or\s+|and\s+)?(?:option\s+)?"
    rf"{_MARK.format('[A-Z]')}(?!\s+[a-z])"
)
# Characters of a text's end that a choice is looked for in, around a letter, and marks of options.
# No answer or question needs more, and what searches them takes the square of their number.
END = 20_000
AROUND = 200
MARKS = 200
# what never follows the article
_AFTER_A = (
    r"(?!\s+(?!(?:is|was|because|since|and|or|as\s+it|would|seems|shows|[B-Z])\b)\w)(?!['’\-])"
)
_NEGATION = re.compile(
    r"(?:\b(?:not|neither|nor|never|no|isn't|rather\s+than|instead\s+of)|n't|n’t)"
    r"\s+(?:(?!but\b)\w+\s+){0,2}$",
    re.IGNORECASE,
)
# the letters before the options of a question
_LISTS = (r"\(([A-Za-z])\)", r"(?<![\w(.])([A-Za-z])[.):](?=\s)")


def chosen_letter(answer: str, options: Sequence[str]) -> str | None:
    """Which of the options, lettered A, B, … in their order, an answer chooses; None where it
    chooses none, or more than one.

    Only the last `<answer>` or \\boxed{} is read, or else all of the text. A letter, in either
    case, may stand alone, in brackets, before its words, or in a sentence that says so. The words
    of one option may stand instead of it. Of several letters the one in a plain conclusion counts
    ("so the answer is B"), otherwise none. "A" before a word is the article, unless the words are
    option A's.
    """
    text = _answer_text(answer)
    whole = normalized(text)
    if not whole:
        return None
    letters = LETTERS[: len(options)]
    words = [normalized(option) for option in options]
    alone = _letters_alone(text)
    # An option may itself be one letter; then it means that option.
    means_option = len(alone) == 1 and whole in words and whole.upper() not in letters
    if alone and not means_option:
        return _only(alone, letters)
    same = [
        letter for letter, option in zip(letters, words, strict=True) if _is_same(whole, option)
    ]
    if same:
        return same[0] if len(same) == 1 else None
    for letter, option in zip(letters, words, strict=True):
        led = re.match(
            rf"\W*{letter}\b[\s\W]*(?P<rest>\S.*)",
            text,
            re.DOTALL | re.IGNORECASE,
        )
        if led and _is_same(normalized(led["rest"]), option):
            return letter
    concluded = _conclusions(text)
    if concluded:
        return _only(concluded, letters)
    mentioned = _mentioned(text, letters)
    if mentioned:
        return _only(mentioned, letters)
    return _by_words(text, dict(zip(letters, words, strict=True)))


def _only(candidates: Sequence[str], letters: str) -> str | None:
    """The one candidate, if it is one and one of the letters."""
    return candidates[0] if len(candidates) == 1 and candidates[0] in letters else None


def _answer_text(answer: str) -> str:
    """What an answer comes to: behind a chain of thought, within its last tags or box, without
    Markdown's emphasis.
    """
    text = answer.split("</think>")[-1]
    tags = r"<answer>(.*?)(?:</answer>|(?=<answer>)|$)"
    if tagged := re.findall(tags, text, re.DOTALL | re.IGNORECASE):
        text = tagged[-1]
    elif boxed := re.findall(r"\\boxed\{(?:\s*\\text\w*\{)?([^{}]*)\}", text):
        text = boxed[-1]
    return re.sub(r"</?\w+>|<\|\w+\|>|[*`$]", "", text[-END:]).strip()


def _letters_alone(text: str) -> list[str]:
    """The different letters that have a line to themselves."""
    lines = [re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", line) for line in text.splitlines()]
    return list({match.group(1).upper() for match in lines if match})


def _conclusions(text: str) -> list[str]:
    """The letters that the last plain conclusion names: [] where there is no conclusion."""
    letters: list[str] = []
    for match in _CONCLUSION.finditer(text):
        mark = match["mark"]
        rest = text[match.end() : match.end() + AROUND]
        letter = mark.strip("()[] ")
        bare = mark == letter
        article = bare and letter in "aAI" and not re.match(_AFTER_A, rest)
        part_of_word = bare and letter.islower() and re.match(r"['’]|\s+\w", rest)
        if article or part_of_word or _negated(text, match.start("mark")):
            continue
        also = _ALSO.match(rest)
        letters = [letter.upper(), also.group()] if also else [letter.upper()]
    return letters


def _negated(text: str, place: int) -> bool:
    """Whether a negation stands before a place."""
    return _NEGATION.search(text[max(0, place - AROUND) : place]) is not None


def _mentioned(text: str, letters: str) -> list[str]:
    """Every letter that is named, once each: in brackets or beginning a line with its mark, in
    either case, or as a capital word.
    """
    mentioned: dict[str, None] = {}
    marks = r"[(\[]\s*([A-Za-z])\s*[)\]]|^[^\S\n]*([A-Za-z])\s*(?:[.):,]|[-–—])(?=\s|$)"
    capital = rf"(?<![\w'’.\-])([{letters}])(?![\w'’\-])"
    for match in re.finditer(rf"{marks}|{capital}", text, re.MULTILINE):
        letter = next(group for group in match.groups() if group)
        rest = text[match.end() : match.end() + AROUND]
        article = match.group(3) in ("A", "I") and not re.match(_AFTER_A, rest)
        if not article and not _negated(text, match.start()):
            mentioned[letter.upper()] = None
    return list(mentioned)


def _by_words(text: str, options: dict[str, str]) -> str | None:
    """The letter of the one option whose words are in the text, unless a negation stands before
    them. Of an option within another, the longer one counts.
    """
    line = re.sub(r"\s+", " ", text).lower()
    spans: dict[str, tuple[int, int]] = {}
    for letter, option in options.items():
        # Neither the 5 of "0.5" nor that of "5.1" is the option 5.
        match = re.search(rf"(?<!\w)(?<![.,](?=\d)){re.escape(option)}(?!\w|[.,]\d)", line)
        if option.strip(_AROUND) and match:
            spans[letter] = match.span()
    outer = [
        letter
        for letter, span in spans.items()
        if not any(_contains(other, span) for other in spans.values())
    ]
    if len(outer) != 1 or _negated(line, spans[outer[0]][0]):
        return None
    return outer[0]


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]


def lettered_options(text: str) -> list[str]:
    """The options that a question shows with their letters from A on, as "(A) red", "A. red" or "A)
    red", on lines or in one; [] where it shows fewer than two. Of several such lists the last
    counts.
    """
    lists: dict[int, list[str]] = {}
    for mark in _LISTS:
        marks = list(re.finditer(mark, text))[-MARKS:]
        for start, first in enumerate(marks):
            run = [first]
            for match in marks[start + 1 :]:
                if ord(match.group(1)) == ord(run[-1].group(1)) + 1:
                    run.append(match)
            ends = [match.start() for match in run[1:]] + [len(text)]
            options = [
                text[match.end() : end].split("\n")[0].strip(" ,;\t\r")
                for match, end in zip(run, ends, strict=True)
            ]
            if first.group(1) in "aA" and len(options) > 1 and all(options):
                lists[first.start()] = options
    return lists[max(lists)] if lists else []
