"""A model's answers in a JSONL file that a later run goes on from. May import: the standard library
and what stands above `eval`.

One process at a time writes such a file. A line is in the file before the next question is asked,
and on the disk a second later.

The first line says under which settings the answers were given:

    {"schema": "lvr-lite/answers", "version": 1, "model": hash, "suite", "data", "seed",
     "max_tokens"}

Each other line is an answer:

    {"id", "steps", "type", "answer", "expected", "correct", "score", "tokens",
     "images": [paths], "question"}
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from lvr_lite.data.rows import JsonObject
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, OutputError, UsageError
from lvr_lite.files import locked, saving, sync, write_atomically

HEAD: JsonObject = {"schema": "lvr-lite/answers", "version": 1}

# An answer as the `eval` JSON has it: id, type, answer, expected, correct, score, tokens.
Answer = dict[str, Any]
_ANSWER_FIELDS = ("id", "type", "answer", "expected", "correct", "score", "tokens")
# fields that the file has and the `eval` JSON has not
_OWN_FIELDS = ("steps", "images", "question")
# Seconds of answers that a loss of power may take; a kill takes none that was added. A disk needs
# some 5 ms to keep a line, which would be felt between the answers of a small model.
SYNCED_EVERY = 1.0


class Journal:
    """Answers by sample and number of latent steps. Only a journal that `open` made has a file."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: FileIO | None = None
        self._synced = 0.0
        self._answers: dict[tuple[str, int], Answer] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, settings: Mapping[str, object]) -> Iterator[Journal]:
        """The answers of a file, to which new ones are added until the block ends. A new file
        begins with `settings`.

        What a stopped run left half-written at its end is cut off. Raises UsageError where the file
        is about other settings, DataError where it is no file of answers, OutputError where it
        cannot be written or another process writes it.
        """
        if path.exists() and not path.is_file():
            raise DataError(f"--answers {path}: is no file; name another")
        with locked(path, "--answers file"):
            journal = cls()
            journal._path = path
            with saving(path, "--answers file"):
                journal._begin(json.dumps({**HEAD, **settings}), settings)
                journal._file = path.open("ab", buffering=0)
            try:
                yield journal
            finally:
                journal._file.close()
                journal._file = None
                sync(path)

    def _begin(self, head: str, settings: Mapping[str, object]) -> None:
        """Read what is in the file, or write its first line."""
        path = self._path
        assert path is not None
        data = path.read_bytes() if path.exists() else b""
        whole, _, torn = data.rpartition(b"\n")
        if not whole and torn and not head.encode().startswith(torn):
            raise DataError(f"--answers {path}: exists and holds something else; name another file")
        if not whole:
            write_atomically(path, head + "\n")
            return
        for number, line in enumerate(whole.split(b"\n"), 1):
            try:
                self._read(line, is_head=number == 1)
            # RecursionError: of values within values without end.
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"--answers {path}:{number}: not what `lvr-lite eval --answers` writes; "
                    "name another file"
                ) from error
            if number == 1:
                _refuse_other_settings(path, json.loads(line), settings)
        if torn:
            os.truncate(path, len(whole) + 1)

    def _read(self, line: bytes, is_head: bool) -> None:
        """Raises ValueError, KeyError or TypeError for a line that the journal did not write."""
        fields = json.loads(line)
        if is_head:
            if any(fields[key] != value for key, value in HEAD.items()):
                raise ValueError("another schema")
            return
        _check_answer(fields)
        self._answers[fields["id"], fields["steps"]] = fields

    def knows(self, sample: Sample, steps: int) -> bool:
        """Raises UsageError where the answer that is there is to another question."""
        answer = self._answers.get((sample.id, steps))
        if answer is None:
            return False
        # An answer of this run is to the question that was just asked, and does not repeat it.
        known = answer.get("question"), answer["expected"]
        if "question" in answer and known != (sample.question, sample.answer):
            raise UsageError(
                f"--answers {self._path}: the question {sample.id} has changed since; name "
                "another file, or remove it"
            )
        return True

    def add(self, sample: Sample, steps: int, answer: Answer) -> None:
        """One more answer, in memory and at the end of the file. Raises OutputError where the disk
        is full; the answers before this one stay in the file.
        """
        self._answers[sample.id, steps] = answer
        if self._file is None:
            return
        images = [str(path) for path in sample.images]
        own = {"images": images, "question": sample.question}
        line = json.dumps({"id": sample.id, "steps": steps} | answer | own) + "\n"
        self._append(self._file, line.encode())

    def _append(self, file: FileIO, line: bytes) -> None:
        assert self._path is not None
        length = os.fstat(file.fileno()).st_size
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            file.truncate(length)
            raise OutputError(
                f"--answers {self._path}: cannot be written ({error.strerror or error}); the "
                "answers until here are in it: free some space and run the same again"
            ) from error
        if time.monotonic() - self._synced > SYNCED_EVERY:
            sync(self._path)
            self._synced = time.monotonic()

    def answer(self, sample: Sample, steps: int) -> Answer:
        """The answer that was added or read."""
        answer = self._answers[sample.id, steps]
        return {name: value for name, value in answer.items() if name not in _OWN_FIELDS}


def _check_answer(fields: Answer) -> None:
    """Raises ValueError, KeyError or TypeError for what is no answer of a journal."""
    for name in ("id", "question", "answer", "expected"):
        _need(isinstance(fields[name], str), name)
    _need(isinstance(fields["type"], str | None), "type")
    _need(type(fields["steps"]) is int, "steps")
    _need(isinstance(fields["correct"], bool), "correct")
    score = fields["score"]
    _need(type(score) in (int, float) and 0 <= score <= 1, "score")
    _need(_are_counts(fields["tokens"]), "tokens")
    # Of an older release they are missing.
    looks = fields.get("looks")
    _need(looks is None or _are_counts([looks]), "looks")
    visual_tokens = fields.get("visual_tokens")
    _need(visual_tokens is None or _are_counts(visual_tokens), "visual_tokens")
    unknown = set(fields) - {*_ANSWER_FIELDS, *_OWN_FIELDS, "looks", "visual_tokens"}
    _need(not unknown, ", ".join(sorted(unknown)))


def _need(condition: bool, field: str) -> None:
    if not condition:
        raise ValueError(f"not an answer: {field}")


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse_other_settings(path: Path, there: JsonObject, settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        if there.get(name) == value:
            continue
        what = f"about {name} {there.get(name)}, not {value}"
        if name == "model":
            what = "of another model"
        raise UsageError(f"--answers {path}: is {what}; name another file, or remove it")
