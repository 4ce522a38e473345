"""Public benchmarks: their questions, their own scores, and what the paper published for them. May
import: Pillow and what stands above `eval`.

A row that cannot be asked is kept as `Broken`, and is in no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data.rows import JsonObject
from lvr_lite.data.samples import Sample
from lvr_lite.errors import DataError
from lvr_lite.eval import score
from lvr_lite.eval.benchmark_files import Broken, Pictures, Question, read_rows
from lvr_lite.eval.journal import Answer

HOLDS = {
    "mmvp": 'Questions.csv and the folder "MMVP Images" (or MMVP_Images, or images)',
    "vstar": "test_questions.jsonl and the pictures that it names",
    "blink": "a folder for each subtask, such as Counting, with val-*.parquet or *.jsonl in it",
    "hrbench": "hr_bench_4k.tsv or hr_bench_8k.tsv, or both (or the same as .parquet)",
}
BENCHMARKS = tuple(HOLDS)
# How options are asked for: "direct" with the paper's sentence (`INSTRUCTION`), "plain" without it.
PROMPTS = ("direct", "plain")
# Tokens of an answer at most: a letter in a sentence, or at the end of a few.
MAX_TOKENS = {"direct": 64, "plain": 256}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's questions, and the rows that cannot be asked, both in their order."""

    name: str
    folder: Path
    rows: list[Question]
    broken: list[Broken]

    def items(self) -> Iterator[tuple[Sample, Callable[[], Pictures]]]:
        """Samples, each with what opens its pictures: DataError, naming row and field, where that
        cannot be done.
        """
        return ((row.sample, row.pictures) for row in self.rows)

    def unopened(self, failures: Sequence[tuple[str, str]]) -> list[Broken]:
        """All rows that were not asked. failures: (id, problem) of the questions whose pictures
        could not be opened.
        """
        where = {row.sample.id: row.where for row in self.rows}
        failed = [Broken(name, where[name], problem) for name, problem in failures]
        return [*self.broken, *failed]


def read(
    name: str,
    folder: Path | str,
    limit: int | None = None,
    prompt: str = "direct",
) -> Benchmark:
    """A benchmark's first `limit` rows, or all; prompt: one of PROMPTS.

    Raises DataError, one line, where the folder lacks a file or no row can be asked.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"--path {folder}: no such folder; it must hold {HOLDS[name]}")
    rows = read_rows(name, folder)
    if rows is None:
        raise DataError(
            f"--path {folder}: is not {name} as it is published; the folder must hold {HOLDS[name]}"
        )
    questions: dict[str, Question] = {}
    broken: list[Broken] = []
    # Read to the end whatever the limit is: a damaged file is refused as a whole.
    for row in list(rows)[:limit]:
        if isinstance(row, Broken):
            broken.append(row)
            continue
        key = row.sample.id
        if key in questions:
            broken.append(
                Broken(
                    None,
                    row.where,
                    f"the id {key} is already taken by {questions[key].where}",
                )
            )
        else:
            questions[key] = row if prompt == "direct" else row.plain()
    benchmark = Benchmark(name, folder, list(questions.values()), broken)
    if not questions:
        raise none_readable(benchmark, broken)
    return benchmark


def none_readable(benchmark: Benchmark, broken: Sequence[Broken]) -> DataError:
    reason = "the files hold no rows"
    if broken:
        reason = f"none of {len(broken)} rows can be asked; the first: {broken[0]}"
    return DataError(f"--path {benchmark.folder}: {reason}")


# ----------------------------------------------------------------------------------------------
# scores


@dataclass(frozen=True)
class Share:
    """A share from 0 to 1 of n items, and its 95 % interval."""

    n: int
    mean: float
    interval: tuple[float, float]

    def to_json(self) -> JsonObject:
        return {
            "n": self.n,
            "accuracy": round(self.mean, 4),
            "interval": [round(bound, 4) for bound in self.interval],
        }


def grade(sample: Sample, answer: str) -> float:
    """1.0 where the answer chooses the right letter (`score.chosen_letter`), 0.0 otherwise."""
    letter = score.chosen_letter(answer, sample.choices or ())
    return float(letter == sample.answer)


def scores(name: str, answers: Sequence[Answer]) -> list[JsonObject]:
    """The benchmark's own scores first, each {"name", "n", "accuracy", "interval"}. answers: with
    the field "pair".
    """
    shares = _shares(name, answers)
    return [{"name": title} | share.to_json() for title, share in shares.items()]


def by_type(name: str, answers: Sequence[Answer]) -> dict[str, JsonObject]:
    """Of each category or subtask {"n", "accuracy", "interval"}."""
    share = _share
    if name == "hrbench":
        share = _rotated_share
    return {kind: share(of_kind).to_json() for kind, of_kind in _of_types(answers).items()}


def _shares(name: str, answers: Sequence[Answer]) -> dict[str, Share]:
    if name == "mmvp":
        return {
            "single items": _share(answers),
            "pairs, both right": _all_right(answers, 2),
        }
    if name == "vstar":
        return {"all questions": _share(answers)}
    if name == "blink":
        kinds = _of_types(answers).values()
        rights = [(_points(of_kind), len(of_kind)) for of_kind in kinds]
        mean, low, high = score.mean_of_shares(rights)
        return {
            "mean over subtasks": Share(len(kinds), mean, (low, high)),
            "all questions": _share(answers),
        }
    by_size: dict[str, list[Answer]] = {}
    for answer in answers:
        size, *_ = answer["type"].split()
        by_size.setdefault(size, []).append(answer)
    shares = {}
    for size, rows in sorted(by_size.items()):
        shares[f"{size}, all rows"] = _rotated_share(rows)
        shares[f"{size}, all four rotations right"] = _all_right(rows, 4)
    return shares


def _of_types(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    by_type: dict[str, list[Answer]] = {}
    for answer in answers:
        by_type.setdefault(answer["type"], []).append(answer)
    return dict(sorted(by_type.items()))


def _points(answers: Sequence[Answer]) -> float:
    points: float = sum(answer["score"] for answer in answers)
    return points


def _share(answers: Sequence[Answer]) -> Share:
    right = _points(answers)
    n = len(answers)
    mean = right / max(1, n)
    return Share(n, mean, score.wilson(mean * n, n))


def _rotated_share(answers: Sequence[Answer]) -> Share:
    """The rows of a question with its options rotated: the interval is as wide as with one row a
    question.
    """
    mean = _share(answers).mean
    questions = len({answer["pair"] for answer in answers})
    interval = score.wilson(mean * questions, questions)
    return Share(len(answers), mean, interval)


def _all_right(answers: Sequence[Answer], size: int) -> Share:
    """Of the whole groups of `size` answers, the share that is all right."""
    outcomes = [(answer["pair"], answer["score"] == 1) for answer in answers]
    groups = score.together(outcomes, size)
    n = len(groups)
    right = sum(groups)
    return Share(
        n=n,
        mean=right / max(1, n),
        interval=score.wilson(right, n),
    )


# ----------------------------------------------------------------------------------------------
# what the paper published

Published = tuple[str, dict[str, float]]


def _lvr(model: str, name: str, *by_steps: float) -> list[Published]:
    columns = zip((4, 8, 16), by_steps, strict=True)
    return [(f"{model}, {steps} steps", {name: share}) for steps, share in columns]


def _vstar(model: str, *shares: float) -> Published:
    names = ("all questions", "direct_attributes", "relative_position")
    return model, dict(zip(names, shares, strict=True))


def _blink(model: str, *shares: float) -> Published:
    names = ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
    return model, dict(zip(names, shares, strict=True))


# Of arXiv 2509.24251, in percent, under the names of scores and types here. There MMVP is scored by
# single items, and V* over 191 questions.
PUBLISHED: dict[str, list[Published]] = {
    "mmvp": [
        ("Qwen2.5-VL-7B", {"single items": 66.7}),
        ("7B, SFT, same data", {"single items": 65.7}),
        *_lvr("LVR-7B", "single items", 72.0, 71.7, 71.7),
        *_lvr("LVR-3B", "single items", 54.7, 56.0, 56.0),
        *_lvr("LVR-3B with RL", "single items", 55.3, 55.3, 58.0),
    ],
    "vstar": [
        _vstar("Qwen2.5-VL-7B", 78.5, 81.7, 73.7),
        _vstar("7B, SFT, same data", 79.1, 82.6, 73.7),
        _vstar("LVR-7B, 4 steps", 81.2, 84.4, 76.3),
        _vstar("LVR-7B, 8 steps", 81.7, 84.4, 77.6),
        _vstar("LVR-7B, 16 steps", 80.6, 81.7, 79.0),
        *_lvr("LVR-3B", "all questions", 64.9, 65.5, 66.5),
        *_lvr("LVR-3B with RL", "all questions", 65.5, 67.0, 66.5),
    ],
    "blink": [
        _blink("Qwen2.5-VL-7B", 66.7, 26.0, 52.0, 38.8, 87.4),
        _blink("7B, SFT, same data", 67.5, 26.7, 45.3, 33.6, 88.8),
        _blink("LVR-7B, 4 steps", 69.2, 28.7, 52.7, 42.5, 89.5),
        _blink("LVR-7B, 8 steps", 70.0, 29.3, 52.0, 42.5, 86.0),
        _blink("LVR-7B, 16 steps", 70.8, 27.3, 52.7, 41.8, 87.4),
    ],
}
