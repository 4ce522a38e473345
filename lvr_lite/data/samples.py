"""Samples: what they hold, and how the project's JSONL writes them. They are read from files in
`data.sample_files`. May import: the standard library and what stands above `data`.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from lvr_lite.data.boxes import Box
from lvr_lite.data.rows import JsonObject


@dataclass(frozen=True)
class Sample:
    """One question with its pictures.

    images: paths; empty where the picture is kept in memory.
    choices: all answers there are, or None.
    boxes: the regions of the first picture that the question is about, normalized xyxy.
    type: kind of question, for accuracy by type.
    pair: a name that two samples share which differ in a detail.
    """

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    choices: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] = ()
    type: str | None = None
    pair: str | None = None


def sample_json(sample: Sample, folder: Path) -> JsonObject:
    """A sample as an object of the project's JSONL. folder: the file's, which paths are relative
    to.
    """
    paths = [Path(os.path.relpath(p, folder)).as_posix() for p in sample.images]
    return {
        "id": sample.id,
        "image": paths[0] if len(paths) == 1 else paths,
        "question": sample.question,
        "answer": sample.answer,
        "choices": list(sample.choices) if sample.choices is not None else None,
        "boxes": [list(box) for box in sample.boxes],
        "type": sample.type,
        "pair": sample.pair,
    }


class LazySamples(Sequence[Sample]):
    """Samples each of which is read when it is asked for."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample of an index from 0 to the length - 1."""

    def place(self, index: int) -> str:
        """Where a sample stands, for errors: file and line, or else its id."""
        return f"sample {self[index].id}"

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.read(i) for i in range(*index.indices(len(self)))]
        return self.read(range(len(self))[index])
