"""Every check of a data file, pictures included: what `lvr-lite data validate` reports. May import:
the standard library and the core.

Problems are what training would get wrong or stop at; notes are worth knowing and no mistake (a box
that is smaller than what a visual token must be covered by still selects one). Files that are given
together are kept apart, as training and test set are: a picture in two of them is a problem,
whatever its name or file format (the hash is of the upright pixels).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lvr_lite.data.boxes import COVERED, Box
from lvr_lite.data.rows import Problem
from lvr_lite.data.samples import Sample, placed_samples
from lvr_lite.errors import DataError
from lvr_lite.model.images import MAX_ASPECT, open_picture


@dataclass(frozen=True)
class Look:
    """A picture that was decoded whole. size: width and height, upright, in pixels; digest: of the
    pixels.
    """

    size: tuple[int, int]
    digest: str


def look_at(paths: Iterable[Path]) -> dict[Path, Look | str]:
    """Every picture decoded once, in threads: its look, or what is wrong with it."""
    waiting = iter(dict.fromkeys(paths))
    found: dict[Path, Look | str] = {}
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        warnings.simplefilter(
            "ignore"
        )  # here too: what the threads do to the filters inside `open_picture` is not told apart
        while group := list(islice(waiting, 256)):
            found.update(zip(group, threads.map(_look, group), strict=True))
    return found


def _look(path: Path) -> Look | str:
    try:
        picture = open_picture(path)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    return Look(
        picture.size, hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    )


def validate(
    files: Sequence[Path], family: Any, spec: dict[str, Any], test: Path | None = None
) -> Iterator[tuple[int, list[Problem]]]:
    """For each file, in turn: the number of samples without a problem, and all problems and notes
    in the order of the file.

    family and spec: of the model whose visual tokens boxes are measured by. test: another file none
    of whose pictures may be in these. Raises DataError where `test` itself is wrong.
    """
    read = [_File(path, family, spec) for path in files]
    sides = [(file.path, file.pictures()) for file in read]
    if test is not None:
        tested = _File(test, family, spec)
        if wrong := next((p for p in tested.problems if not p.note), None):
            raise DataError(f"{wrong} (`lvr-lite data validate {test}` lists all)")
        sides.append((test, tested.pictures()))
    for i, file in enumerate(read):
        for path, pictures in sides[i + 1 :]:
            file.keep_apart(path, pictures)
        problems = sorted(file.problems, key=lambda p: p.line or p.item or 0)
        bad = {(p.line, p.item) for p in problems if not p.note}
        yield sum((p.line, p.item) not in bad for p in file.placed), problems


class _File:
    """One file, its samples with their places, its pictures, and what was found."""

    def __init__(self, path: Path, family: Any, spec: dict[str, Any]) -> None:
        self.path, self.family, self.spec = path, family, spec
        self.placed, self.problems = placed_samples(path)
        self.looks = look_at(p for placed in self.placed for p in placed.sample.images)
        self.asked: dict[
            tuple[str, ...], tuple[str, str]
        ] = {}  # digests and question -> answer, and where
        for placed in self.placed:
            self.problems += [
                replace(p, line=placed.line, item=placed.item)
                for p in self._beyond(placed.sample, placed.place)
            ]

    def pictures(self) -> dict[str, str]:
        """Where each picture is first, by its digest."""
        found: dict[str, str] = {}
        for placed in self.placed:
            for path in placed.sample.images:
                if isinstance(look := self.looks[path], Look):
                    found.setdefault(look.digest, placed.place)
        return found

    def keep_apart(self, other: Path, pictures: dict[str, str]) -> None:
        for placed in self.placed:
            for path in placed.sample.images:
                look = self.looks[path]
                if isinstance(look, Look) and look.digest in pictures:
                    message = f"{path} is also in {other} ({pictures[look.digest]}); a picture may be in one of them only"
                    self.problems.append(
                        Problem(self.path, "image", message, placed.line, placed.item)
                    )

    def _beyond(self, sample: Sample, where: str) -> Iterator[Problem]:
        """What only shows in the pictures, and beside other questions about them."""
        looks = [self.looks[path] for path in sample.images]
        for path, look in zip(sample.images, looks, strict=True):
            if not isinstance(look, Look):
                yield Problem(self.path, "image", f"{path}: {look}")
            elif max(look.size) > MAX_ASPECT * min(look.size):
                size = f"{look.size[0]} x {look.size[1]} pixels"
                yield Problem(
                    self.path,
                    "image",
                    f"{path}: {size}, one side more than {MAX_ASPECT} times the other; crop it",
                )
            else:
                continue
            return
        whole = [look for look in looks if isinstance(look, Look)]
        yield from self._doubled(sample, where, whole)
        width, height = whole[0].size
        rows, columns = self.family.token_grid(
            self.family.grid_of(height, width, self.spec), self.spec
        )
        for i, box in enumerate(sample.boxes):
            if said := _box_note(box, rows, columns, sample.boxes[:i]):
                yield Problem(self.path, f"boxes[{i}]", said, note=True)

    def _doubled(self, sample: Sample, where: str, looks: list[Look]) -> Iterator[Problem]:
        key = (" ".join(sample.question.lower().split()), *(look.digest for look in looks))
        answer, first = self.asked.setdefault(key, (sample.answer, where))
        if first == where:
            return
        if answer.strip().lower() != sample.answer.strip().lower():
            said = f"{sample.answer!r}, and {first} answers {answer!r} to the same question about the same picture; keep the right one"
            yield Problem(self.path, "answer", said)
        else:
            yield Problem(
                self.path,
                "question",
                f"asked and answered in {first} about the same picture",
                note=True,
            )


def _box_note(box: Box, rows: int, columns: int, before: Sequence[Box]) -> str | None:
    x0, y0, x1, y1 = box
    tokens = (x1 - x0) * columns * (y1 - y0) * rows
    if tokens < COVERED:
        return f"covers {tokens:.2g} of a visual token ({columns} x {rows} of the picture): the latents see mostly what is around it"
    if tokens > 0.999 * rows * columns:
        return "is the whole picture: no place to look at"
    return "is there twice" if box in before else None
