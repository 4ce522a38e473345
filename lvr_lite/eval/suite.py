"""Evaluation: a suite of questions through a runtime, scored. May import: the core (device world)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from lvr_lite.ask import prepare_prompt, text_of
from lvr_lite.data.make import scene_samples
from lvr_lite.data.samples import Sample, read_samples
from lvr_lite.decode import Options, decode
from lvr_lite.errors import UsageError
from lvr_lite.eval import score
from lvr_lite.runtime.base import Runtime
from lvr_lite.runtime.preprocess import open_picture

Item = tuple[Sample, tuple[Image.Image, ...]]
SUITES = ("scenes",)
SCENES_LIMIT = 300
TEST_SEED = 0


def load_suite(suite: str, limit: int | None, seed: int = TEST_SEED) -> Iterator[Item]:
    """The items of a suite: `scenes` (held-out scenes, 300 unless limited) or a file of samples. Raises DataError, UsageError."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if suite == "scenes":
        return scene_items(limit or SCENES_LIMIT, seed)
    path = Path(suite)
    if not path.is_file():
        raise UsageError(f"--suite {suite}: neither a suite ({', '.join(SUITES)}) nor a file of samples")
    samples = read_samples(path)
    return islice(((s, tuple(open_picture(p) for p in s.images)) for s in samples), limit)


def scene_items(count: int, seed: int, split: str = "test") -> Iterator[Item]:
    """Drawn scenes as items, with their pictures in memory."""
    return ((sample, (picture,)) for sample, picture in scene_samples(count, seed, split))


def accuracy_on(runtime: Runtime, items: Iterable[Item]) -> float:
    """Free-running accuracy on items, for evaluation during training."""
    return float(evaluate(runtime, items, Options(max_tokens=16))["accuracy"])


def evaluate(
    runtime: Runtime, items: Iterable[Item], options: Options | None = None, batch: int = 16, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Answers to all items and their score, as the `eval` JSON has it (docs/design.md) without "suite"; decoded `batch` at a time."""
    answers: list[dict[str, Any]] = []
    outcomes: list[tuple[str | None, str | None, bool]] = []
    waiting = iter(items)
    while group := list(islice(waiting, batch)):
        prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in group]
        for (sample, _), result in zip(group, decode(runtime, prompts, options), strict=True):
            text = text_of(runtime, result)
            right = score.is_correct(text, sample.answer)
            answers.append({"id": sample.id, "answer": text, "expected": sample.answer, "correct": right, "tokens": result.tokens})
            outcomes.append((sample.type, sample.pair, right))
        if progress is not None:
            progress(len(group))
    total = sum(r for _, _, r in outcomes)
    by_type = {}
    for kind in sorted({k for k, _, _ in outcomes if k is not None}):
        of_kind = [r for k, _, r in outcomes if k == kind]
        by_type[kind] = {"n": len(of_kind), "accuracy": round(sum(of_kind) / len(of_kind), 4)}
    return {
        "schema": "lvr-lite/eval",
        "version": 1,
        "model": runtime.name,
        "n": len(answers),
        "accuracy": round(total / max(1, len(answers)), 4),
        "interval": [round(v, 4) for v in score.wilson(total, len(answers))],
        "by_type": by_type,
        "pair_accuracy": score.pair_accuracy((pair, r) for _, pair, r in outcomes),
        "answers": answers,
    }
