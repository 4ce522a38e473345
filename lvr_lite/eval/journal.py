"""A model's answers as they are given, in a file of JSONL that a later run goes on from. May
import: the standard library and the core.

{"schema": "lvr-lite/answers", "version": 1, "model": hash, "suite", "data", "seed", "max_tokens"}      the first line: under which settings
{"id", "steps", "type", "answer", "expected", "correct", "score", "tokens", "images": [paths], "question"}    one line an answer
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError, UsageError

HEAD = {"schema": "lvr-lite/answers", "version": 1}


class Journal:
    """Answers by sample and number of latent steps; kept in memory alone unless made by `open`."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._answers: dict[tuple[str, int], dict[str, Any]] = {}

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> Journal:
        """The answers of a file, to which new ones are added; the file begins with `settings` where
        it is new.

        What a stopped run left half-written at its end is cut off. Raises UsageError where the file
        is about other settings, DataError where it is no file of answers.
        """
        journal, head = cls(), HEAD | settings
        journal._path = path
        data = path.read_bytes() if path.exists() else b""
        whole, _, torn = data.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        if not lines and torn and not json.dumps(head).encode().startswith(torn):
            raise DataError(f"--answers {path}: exists and holds something else; name another file")
        for number, line in enumerate(lines, 1):
            try:
                told = json.loads(line)
                if number > 1:
                    journal._answers[told["id"], told["steps"]] = told
                    (
                        told["question"],
                        told["expected"],
                        float(told["score"]),
                        told["answer"],
                        told["type"],
                        told["tokens"],
                    )
                elif any(told[key] != value for key, value in HEAD.items()):
                    raise ValueError("another schema")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"--answers {path}:{number}: not what `lvr-lite eval --answers` writes; name another file"
                ) from error
            if number == 1 and (
                other := [key for key in settings if told.get(key) != settings[key]]
            ):
                there, here = (x.get(other[0]) for x in (told, settings))
                what = (
                    "of another model"
                    if other[0] == "model"
                    else f"about {other[0]} {there}, not {here}"
                )
                raise UsageError(f"--answers {path}: is {what}; name another file, or remove it")
        if torn and lines:
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1)
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return journal

    def knows(self, sample: Sample, steps: int) -> bool:
        """Raises UsageError where the answer that is there is to another question."""
        told = self._answers.get((sample.id, steps))
        if (
            told is not None
            and "question" in told
            and (told["question"], told["expected"]) != (sample.question, sample.answer)
        ):
            raise UsageError(
                f"--answers {self._path}: the question {sample.id} has changed since; name another file, or remove it"
            )
        return told is not None

    def add(self, sample: Sample, steps: int, answer: dict[str, Any]) -> None:
        """answer: as the `eval` JSON has it."""
        self._answers[sample.id, steps] = answer
        if self._path is not None:
            more = {"images": [str(path) for path in sample.images], "question": sample.question}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": sample.id, "steps": steps} | answer | more) + "\n")

    def answer(self, sample: Sample, steps: int) -> dict[str, Any]:
        """What was added, as the `eval` JSON has it."""
        return {
            k: v
            for k, v in self._answers[sample.id, steps].items()
            if k not in ("steps", "images", "question")
        }
