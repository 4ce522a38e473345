"""Every check of a data file, pictures included: what `lvr-lite data validate` reports. May import:
Pillow and what stands above `data`.

Problems are what training would get wrong or stop at. Notes are worth knowing and no mistake: a box
that covers less than a visual token needs, for example, still selects one. Files that are given
together must be as separate as a training and a test set: a picture in two of them is a problem,
whatever its name or file format (the hash is of the upright pixels).
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lvr_lite.data.boxes import COVERED, Box
from lvr_lite.data.rows import Problem
from lvr_lite.data.sample_files import PlacedSample, placed_samples
from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Source
from lvr_lite.errors import DataError
from lvr_lite.model.images import MAX_ASPECT, open_picture
from lvr_lite.model.processor import Processor

# pictures that are decoded together, and in how many threads at most
GROUP = 256
THREADS = 8


@dataclass(frozen=True)
class PictureFacts:
    """A picture that could be decoded. size: width and height, upright, in pixels. digest: of the
    pixels.
    """

    size: tuple[int, int]
    digest: str


def inspect_pictures(paths: Iterable[Path]) -> dict[Path, PictureFacts | str]:
    """Every picture decoded once, in threads: its facts, or what is wrong with it."""
    waiting = iter(dict.fromkeys(paths))
    facts: dict[Path, PictureFacts | str] = {}
    workers = min(THREADS, os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as threads:
        # Here too: filters are one for all threads, so those inside `open_picture` overlap.
        warnings.simplefilter("ignore")
        while group := list(islice(waiting, GROUP)):
            facts.update(zip(group, threads.map(_facts, group), strict=True))
    return facts


def _facts(path: Path) -> PictureFacts | str:
    try:
        picture = open_picture(path)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    content = repr(picture.size).encode() + picture.tobytes()
    return PictureFacts(picture.size, hashlib.sha256(content).hexdigest())


def validate(
    files: Sequence[Path], processor: Processor, test: Path | None = None
) -> Iterator[tuple[int, list[Problem]]]:
    """For each file, in turn: the number of samples without a problem, and all problems and notes
    in the order of the file.

    processor: of the model whose visual tokens boxes are measured by.
    test: another file none of whose pictures may be in these.

    Raises DataError where `test` itself is wrong.
    """
    checked = [_CheckedFile(path, processor) for path in files]
    separate = list(checked)
    if test is not None:
        test_file = _CheckedFile(test, processor)
        if first := next((p for p in test_file.problems if not p.note), None):
            raise DataError(f"{first} (`lvr-lite data validate {test}` lists all)")
        separate.append(test_file)
    for i, file in enumerate(checked):
        for other in separate[i + 1 :]:
            file.report_pictures_of(other)
        problems = sorted(file.problems, key=lambda p: p.line or p.item or 0)
        bad = {(p.line, p.item) for p in problems if not p.note}
        yield sum((placed.line, placed.item) not in bad for placed in file.placed), problems


_LOOKS_LIKE_CONTROL = re.compile(r"</?[^<>\s]+>|\[[A-Z][A-Z0-9_]*\]")


def special_tokens(processor: Processor) -> tuple[str, ...]:
    """The tokens that no text of a sample may hold: the model's control tokens, and the other added
    ones that look like it, of which training would learn another meaning.
    """
    added = processor.tokenizer.get_added_tokens_decoder().values()
    alike = (token.content for token in added if _LOOKS_LIKE_CONTROL.fullmatch(token.content))
    return tuple(dict.fromkeys((*processor.special_tokens, *alike)))


class SpecialTokens:
    """Finds a model's control tokens in the texts of samples."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Of two tokens that begin alike, the longer one is named.
        longest_first = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def in_sample(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """The fields in which a token stands, and the first token in each."""
        for field, text in (("question", sample.question), ("answer", sample.answer)):
            if match := self._pattern.search(text):
                yield field, match.group()


def check_samples(source: Source, tokens: Iterable[str]) -> None:
    """Raises DataError, naming file, line and field, for a sample whose question or answer holds
    one of the tokens.
    """
    special = SpecialTokens(tokens)
    for index, sample in enumerate(source.samples):
        for field, token in special.in_sample(sample):
            raise DataError(f"{source.place(index)}: {field}: {_control_token(token)}")


def _control_token(token: str) -> str:
    return f"contains {token}, which the model reads as a control token; leave it out"


class _CheckedFile:
    """One file: its samples with their places, its pictures, and the problems of both."""

    def __init__(self, path: Path, processor: Processor) -> None:
        self.path = path
        self.processor = processor
        self._tokens = SpecialTokens(special_tokens(processor))
        self.placed, self.problems = placed_samples(path)
        self.facts = inspect_pictures(p for placed in self.placed for p in placed.sample.images)
        # of each picture the place where the file shows it first, by digest
        self.first_places: dict[str, str] = {}
        # of each question about the same pictures the first answer, and where it is
        self._answers: dict[tuple[str, ...], tuple[str, str]] = {}
        for placed in self.placed:
            for problem in self._problems_of(placed):
                self.problems.append(replace(problem, line=placed.line, item=placed.item))
            for path in placed.sample.images:
                if isinstance(fact := self.facts[path], PictureFacts):
                    self.first_places.setdefault(fact.digest, placed.place)

    def report_pictures_of(self, other: _CheckedFile) -> None:
        """A problem for each sample that shows a picture of another file."""
        for placed in self.placed:
            for path in placed.sample.images:
                fact = self.facts[path]
                if isinstance(fact, str) or fact.digest not in other.first_places:
                    continue
                problem = Problem(
                    self.path,
                    "image",
                    f"{path} is also in {other.path} ({other.first_places[fact.digest]}); a "
                    "picture may be in one of them only",
                    placed.line,
                    placed.item,
                )
                self.problems.append(problem)

    def _problems_of(self, placed: PlacedSample) -> Iterator[Problem]:
        """What only shows in the pictures, and beside other questions about them."""
        sample = placed.sample
        for field, token in self._tokens.in_sample(sample):
            yield Problem(self.path, field, _control_token(token))
        facts: list[PictureFacts] = []
        for path in sample.images:
            fact = self.facts[path]
            if isinstance(fact, str):
                yield Problem(self.path, "image", f"{path}: {fact}")
                return
            if max(fact.size) > MAX_ASPECT * min(fact.size):
                yield Problem(
                    self.path,
                    "image",
                    f"{path}: {fact.size[0]} x {fact.size[1]} pixels, one side more than "
                    f"{MAX_ASPECT} times the other; crop it",
                )
                return
            facts.append(fact)
        yield from self._repetitions(sample, placed.place, facts)
        width, height = facts[0].size
        grid = self.processor.grid_of(height, width)
        rows, columns = self.processor.token_grid(grid)
        for i, box in enumerate(sample.boxes):
            if note := _box_note(box, rows, columns, sample.boxes[:i]):
                yield Problem(self.path, f"boxes[{i}]", note, note=True)

    def _repetitions(
        self, sample: Sample, place: str, facts: list[PictureFacts]
    ) -> Iterator[Problem]:
        """The same question about the same pictures, asked before."""
        key = (" ".join(sample.question.lower().split()), *(fact.digest for fact in facts))
        answer, first = self._answers.setdefault(key, (sample.answer, place))
        if first == place:
            return
        if answer.strip().lower() != sample.answer.strip().lower():
            yield Problem(
                self.path,
                "answer",
                f"{sample.answer!r}, and {first} answers {answer!r} to the same question about "
                "the same picture; keep the right one",
            )
        else:
            yield Problem(
                self.path,
                "question",
                f"asked and answered in {first} about the same picture",
                note=True,
            )


def _box_note(
    box: Box,
    rows: int,
    columns: int,
    before: Sequence[Box],
) -> str | None:
    """What is worth knowing of a box on a grid of visual tokens. before: the sample's boxes up to
    it.
    """
    x0, y0, x1, y1 = box
    tokens = (x1 - x0) * columns * (y1 - y0) * rows
    if tokens < COVERED:
        return (
            f"covers {tokens:.2g} of a visual token ({columns} x {rows} of the picture): the "
            "latents see mostly what is around it"
        )
    if tokens > 0.999 * rows * columns:
        return "is the whole picture: no place to look at"
    return "is there twice" if box in before else None
