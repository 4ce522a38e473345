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
_LEADING = re.compile(r"""\A(?:[,;:!?"'()\s]|\.(?!\d))+""")
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,6})?")


def normalized(answer: str) -> str:
    """What counts of an answer: the text in `<answer>` tags if there are any, lower case, without
    outer punctuation and spaces. Of an answer that is all punctuation, all counts.
    """
    text = answer
    tagged = _TAGGED.search(answer)
    if tagged:
        text = tagged.group(1)
    whole = re.sub(r"\s+", " ", text).strip().lower()
    bare = _LEADING.sub("", whole, count=1).rstrip(_AROUND + " ")
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
    if number is None:
        return False
    return number == number_of(expected)


def number_of(text: str) -> Decimal | None:
    """The number that the whole of a normalized text is; None where it is anything else."""
    if not _NUMBER.fullmatch(text):
        return None
    digits = text.replace(",", "")
    return Decimal(digits)


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
    count = details.total() + right.total()
    return 2 * shared / max(1, count)


def _details(text: str) -> Counter[tuple[str, str]]:
    details: Counter[tuple[str, str]] = Counter()
    for phrase in normalized(text).split(";"):
        words = phrase.split()
        details.update((words[0], word) for word in words)
    return details


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
    scale = 1 + z2 / n
    middle = (p + z2 / (2 * n)) / scale
    variance = p * (1 - p) / n + z2 / (4 * n * n)
    half = z / scale * math.sqrt(variance)
    low = max(0.0, middle - half)
    high = min(1.0, middle + half)
    return low, high


def mean_of_shares(shares: Sequence[tuple[float, int]]) -> tuple[float, float, float]:
    """The plain mean of shares `(right, n)` of several groups, and its 95 % interval.

    The distances of the groups' Wilson bounds are combined by squaring and adding (MOVER, Zou and
    Donner 2008). (0, 0, 1) without any group.
    """
    if not shares:
        return 0.0, 0.0, 1.0
    means = []
    below = []
    above = []
    for right, n in shares:
        mean = right / max(1, n)
        low, high = wilson(right, n)
        means.append(mean)
        below.append((mean - low) ** 2)
        above.append((high - mean) ** 2)
    count = len(shares)
    mean = sum(means) / count
    low = mean - math.sqrt(sum(below)) / count
    high = mean + math.sqrt(sum(above)) / count
    return mean, max(0.0, low), min(1.0, high)


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
    if not pairs:
        return None
    return sum(pairs) / len(pairs)


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


_LAST_TAGGED = re.compile(
    r"<answer>(.*?)(?:</answer>|(?=<answer>)|$)",
    re.DOTALL | re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{(?:\s*\\text\w*\{)?([^{}]*)\}")
_MARKUP = re.compile(r"</?\w+>|<\|\w+\|>|[*`$]")


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
    by_letter = dict(zip(letters, words, strict=True))
    alone = _letters_alone(text)
    # An option may itself be one letter; then it means that option.
    means_option = len(alone) == 1 and whole in words and whole.upper() not in letters
    if alone and not means_option:
        return _only(alone, letters)
    same = [letter for letter, option in by_letter.items() if _is_same(whole, option)]
    if same:
        return _only(same, letters)
    for letter, option in by_letter.items():
        led = re.match(
            rf"\W*{letter}\b[\s\W]*(?P<rest>\S.*)",
            text,
            re.DOTALL | re.IGNORECASE,
        )
        if led and _is_same(normalized(led["rest"]), option):
            return letter
    named = _conclusions(text) or _mentioned(text, letters)
    if named:
        return _only(named, letters)
    return _by_words(text, by_letter)


def _only(candidates: Sequence[str], letters: str) -> str | None:
    """The one candidate, if it is one and one of the letters."""
    if len(candidates) != 1:
        return None
    (letter,) = candidates
    if letter not in letters:
        return None
    return letter


def _answer_text(answer: str) -> str:
    """What an answer comes to: behind a chain of thought, within its last tags or box, without
    Markdown's emphasis.
    """
    text = answer.split("</think>")[-1]
    tagged = _LAST_TAGGED.findall(text)
    boxed = _BOXED.findall(text)
    if tagged:
        text = tagged[-1]
    elif boxed:
        text = boxed[-1]
    return _MARKUP.sub("", text[-END:]).strip()


def _letters_alone(text: str) -> list[str]:
    """The different letters that have a line to themselves."""
    letters: set[str] = set()
    for line in text.splitlines():
        match = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", line)
        if match:
            letters.add(match.group(1).upper())
    return list(letters)


def _conclusions(text: str) -> list[str]:
    """The letters that the last plain conclusion names: [] where there is no conclusion."""
    letters: list[str] = []
    for match in _CONCLUSION.finditer(text):
        mark = match["mark"]
        rest = text[match.end() : match.end() + AROUND]
        letter = mark.strip("()[] ")
        if mark == letter and _is_word(letter, rest):
            continue
        if _negated(text, match.start("mark")):
            continue
        letters = [letter.upper()]
        also = _ALSO.match(rest)
        if also:
            letters.append(also.group())
    return letters


def _negated(text: str, place: int) -> bool:
    """Whether a negation stands before a place."""
    return _NEGATION.search(text[max(0, place - AROUND) : place]) is not None


def _is_word(letter: str, rest: str) -> bool:
    """Whether a bare letter is the article, the pronoun, or the beginning of a word. rest: the text
    after it.
    """
    if letter in "aAI" and not re.match(_AFTER_A, rest):
        return True
    return letter.islower() and re.match(r"['’]|\s+\w", rest) is not None


def _mentioned(text: str, letters: str) -> list[str]:
    """Every letter that is named, once each: in brackets or beginning a line with its mark, in
    either case, or as a capital word.
    """
    mentioned: dict[str, None] = {}
    marks = r"[(\[]\s*([A-Za-z])\s*[)\]]|^[^\S\n]*([A-Za-z])\s*(?:[.):,]|[-–—])(?=\s|$)"
    capital = rf"(?<![\w'’.\-])([{letters}])(?![\w'’\-])"
    for match in re.finditer(rf"{marks}|{capital}", text, re.MULTILINE):
        bracketed, leading, word = match.groups()
        rest = text[match.end() : match.end() + AROUND]
        if word in ("A", "I") and not re.match(_AFTER_A, rest):
            continue
        if _negated(text, match.start()):
            continue
        letter = bracketed or leading or word
        mentioned[letter.upper()] = None
    return list(mentioned)


def _by_words(text: str, options: dict[str, str]) -> str | None:
    """The letter of the one option whose words are in the text, unless a negation stands before
    them. Of an option within another, the longer one counts.
    """
    line = re.sub(r"\s+", " ", text).lower()
    spans: dict[str, tuple[int, int]] = {}
    for letter, option in options.items():
        if not option.strip(_AROUND):
            continue
        # Neither the 5 of "0.5" nor that of "5.1" is the option 5.
        match = re.search(rf"(?<!\w)(?<![.,](?=\d)){re.escape(option)}(?!\w|[.,]\d)", line)
        if match:
            spans[letter] = match.span()
    outer = []
    for letter, span in spans.items():
        within_another = any(_contains(other, span) for other in spans.values())
        if not within_another:
            outer.append(letter)
    if len(outer) != 1:
        return None
    (letter,) = outer
    start, _ = spans[letter]
    if _negated(line, start):
        return None
    return letter


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    if outer == inner:
        return False
    outer_start, outer_end = outer
    start, end = inner
    return outer_start <= start and end <= outer_end


def lettered_options(text: str) -> list[str]:
    """The options that a question shows with their letters from A on, as "(A) red", "A. red" or "A)
    red", on lines or in one; [] where it shows fewer than two. Of several such lists the last
    counts.
    """
    lists: dict[int, list[str]] = {}
    for mark in _LISTS:
        marks = list(re.finditer(mark, text))[-MARKS:]
        for place, first in enumerate(marks):
            if first.group(1) not in "aA":
                continue
            options = _options_after(text, marks[place:])
            if len(options) > 1 and all(options):
                lists[first.start()] = options
    if not lists:
        return []
    last = max(lists)
    return lists[last]


def _options_after(text: str, marks: list[re.Match[str]]) -> list[str]:
    """The options from the first of these marks on, as far as letters follow each other."""
    run = marks[:1]
    for match in marks[1:]:
        following = ord(run[-1].group(1)) + 1
        if ord(match.group(1)) == following:
            run.append(match)
    ends = [match.start() for match in run[1:]]
    ends.append(len(text))
    options = []
    for match, end in zip(run, ends, strict=True):
        line = text[match.end() : end].split("\n")[0]
        options.append(line.strip(" ,;\t\r"))
    return options
