"""Evaluation: a suite of questions through a runtime, scored, and beside other models on the same
items.

May import: numpy and the core (device world).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Pictures, open_source
from lvr_lite.errors import DataError, LvrError, UsageError
from lvr_lite.eval import benchmarks, score
from lvr_lite.eval.journal import Journal
from lvr_lite.eval.statistics import bootstrap_mean, bootstrap_ratio, grouped, mcnemar
from lvr_lite.files import sha256
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import MANIFEST, Bundle, is_bundle
from lvr_lite.model.checkpoint import read_checkpoint, resolve

Closed = tuple[
    Sample, Pictures | Callable[[], Pictures]
]  # an item whose pictures may still have to be opened
Grade = Callable[[Sample, str], float]  # how right an answer is, 0 to 1
SUITES = ("scenes", "skills")  # drawn
SKILLS_BESIDE = 150  # of the skills beside the scenes
MAX_TOKENS, SKILLS_TOKENS = 16, 64  # of an answer; a caption of eight things takes 55
TEST_SEED = 0


def load_suite(suite: str, limit: int | None, seed: int = TEST_SEED) -> Iterator[Item]:
    """The items of a suite: `scenes` (held-out scenes), `skills` (question types that the scenes do
    not contain), 300 of either unless limited, or a file of samples. Raises DataError, UsageError.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if suite not in SUITES and not Path(suite).is_file():
        raise UsageError(
            f"--suite {suite}: neither a suite ({', '.join((*SUITES, *benchmarks.BENCHMARKS))}) nor a file of samples"
        )
    return open_source(suite, "test", seed, limit, SUITES).items()


def expected_answers(suite: str, limit: int | None, seed: int = TEST_SEED) -> dict[str, str]:
    """The right answer to each item of a suite by its id, without opening or drawing a picture."""
    return open_source(suite, "test", seed, limit, SUITES).answers()


def exact(sample: Sample, answer: str) -> float:
    """1.0 for the right answer, 0.0 for any other."""
    return float(score.is_correct(answer, sample.answer))


def skill(sample: Sample, answer: str) -> float:
    """How right an answer in the suite `skills` is: captions by the share of details that are right
    (`score.caption`), others exactly.
    """
    return (
        score.caption(answer, sample.answer) if sample.type == "caption" else exact(sample, answer)
    )


def lettered(sample: Sample, answer: str) -> float:
    """As `exact`; where the question shows the sample's choices with letters ("(A) red (B) blue"),
    the right one's letter counts too.
    """
    options = score.lettered_options(sample.question) if sample.choices else []
    choices = [score.normalized(choice) for choice in sample.choices or ()]
    letters = score.LETTERS[: len(options)]
    if not options or choices not in (
        [score.normalized(option) for option in options],
        [*letters.lower()],
    ):
        return exact(sample, answer)
    right = letters[choices.index(score.normalized(sample.answer))]
    return max(exact(sample, answer), float(score.chosen_letter(answer, options) == right))


def accuracy_on(runtime: Runtime, items: Iterable[Item]) -> float:
    """Free-running accuracy on items, for evaluation during training."""
    return float(evaluate(runtime, items, Options(max_tokens=MAX_TOKENS))["accuracy"])


def evaluate(
    runtime: Runtime,
    items: Iterable[Item],
    options: Options | None = None,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
    grade: Grade = exact,
) -> dict[str, Any]:
    """Answers to all items and their score, as the `eval` JSON has it (docs/design.md) without
    "suite"; decoded `batch` at a time.

    An accuracy is the mean of what `grade` gives: the share of right answers where that is 0 or 1,
    as it is except for captions. An answer is "correct" when its score is 1.
    """
    (answers,) = answer_all(runtime, items, [options or Options()], batch, progress, grade)
    return _scored(runtime, answers)


def answer_all(
    runtime: Runtime,
    items: Iterable[Closed],
    options: Sequence[Options],
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
    grade: Grade = exact,
    journal: Journal | None = None,
    unopened: list[tuple[str, str]] | None = None,
) -> list[list[dict[str, Any]]]:
    """For each of `options` the answers to all items, with every sample's pictures seen once.

    journal: answers that are known already, which are not asked for again; new ones are added.
    unopened: where items whose pictures cannot be read are put as (id, problem), instead of an
    error.
    """
    journal = journal or Journal()
    order: list[Sample] = []
    steps = [runtime.latent.steps if o.steps is None else o.steps for o in options]

    def unanswered() -> Iterator[tuple[Sample, Prompt]]:
        for sample, pictures in items:
            if not all(journal.knows(sample, k) for k in steps):
                try:
                    prompt, _ = prepare_prompt(
                        runtime, pictures() if callable(pictures) else pictures, sample.question
                    )
                except LvrError as error:
                    if unopened is None:
                        raise
                    unopened.append((sample.id, str(error)))
                    if progress is not None:
                        progress(1)
                    continue
                yield sample, prompt
            elif progress is not None:
                progress(1)
            order.append(sample)

    waiting = unanswered()
    while group := list(islice(waiting, batch)):
        for k, how in zip(steps, options, strict=True):
            left = [(sample, prompt) for sample, prompt in group if not journal.knows(sample, k)]
            results = decode(runtime, [prompt for _, prompt in left], how) if left else []
            for (sample, _), result in zip(left, results, strict=True):
                text = runtime.processor.text(result.tokens)
                points = grade(sample, text)
                told = {
                    "id": sample.id,
                    "type": sample.type,
                    "answer": text,
                    "expected": sample.answer,
                }
                journal.add(
                    sample,
                    k,
                    told
                    | {"correct": points == 1, "score": round(points, 4), "tokens": result.tokens},
                )
        if progress is not None:
            progress(len(group))
    return [[journal.answer(sample, k) | {"pair": sample.pair} for sample in order] for k in steps]


def _scored(runtime: Runtime, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The `eval` JSON of answers as `answer_all` gives them."""
    pairs = [(a["pair"], a["correct"]) for a in answers]
    answers = [{k: v for k, v in a.items() if k != "pair"} for a in answers]
    by_type = {kind: _mean_score(of_kind) for kind, of_kind in _by_type(answers).items()}
    return {
        "schema": "lvr-lite/eval",
        "version": 1,
        "model": runtime.name,
        **_mean_score(answers),
        "interval": [
            round(v, 4) for v in score.wilson(sum(a["score"] for a in answers), len(answers))
        ],
        "by_type": by_type,
        "pair_accuracy": score.pair_accuracy(pairs),
        "answers": answers,
    }


def _mean_score(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "n": len(answers),
        "accuracy": round(sum(a["score"] for a in answers) / max(1, len(answers)), 4),
    }


def _by_type(answers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds = sorted({a["type"] for a in answers if a["type"] is not None})
    return {kind: [a for a in answers if a["type"] == kind] for kind in kinds}


# ---------------------------------------------------------------------------------------------------
# several models, same items


@dataclass(frozen=True)
class Plan:
    """What a model is asked and how: the options of `lvr-lite eval`.

    suite, limit, seed: as in `load_suite`, or a benchmark, which lies in the folder `path`. steps:
    latent steps of the model, one number or several; () for its own. batch: questions decoded
    together. max_tokens: of an answer, None for the suite's usual. skills: questions outside the
    suite, asked beside; None for 150, or `limit` if that is fewer, beside the scenes and none
    beside another suite. journal: a file of the model's answers, to go on from.
    """

    suite: str = "scenes"
    limit: int | None = None
    seed: int = TEST_SEED
    steps: tuple[int, ...] = ()
    batch: int = 16
    max_tokens: int | None = None
    skills: int | None = None
    path: str | None = None
    journal: Path | None = None

    def __post_init__(self) -> None:
        if wrong := [k for k in self.steps if k < 0]:
            raise UsageError(f"--steps {wrong[0]}: latent steps must be 0 or more")
        if self.suite in benchmarks.BENCHMARKS and self.path is None:
            raise UsageError(
                f"--suite {self.suite} needs --path DIR, a folder that holds {benchmarks.HOLDS[self.suite]}"
            )
        if self.suite not in benchmarks.BENCHMARKS and self.path is not None:
            raise UsageError(
                f"--path {self.path}: is for --suite {', '.join(benchmarks.BENCHMARKS)}; leave it out"
            )

    @property
    def beside(self) -> int:
        """How many of the skills are asked beside the suite."""
        if self.skills is not None:
            return self.skills
        return min(SKILLS_BESIDE, self.limit or SKILLS_BESIDE) if self.suite == "scenes" else 0

    @property
    def tokens(self) -> int:
        usual = (
            SKILLS_TOKENS
            if self.suite == "skills"
            else benchmarks.MAX_TOKENS
            if self.path is not None
            else MAX_TOKENS
        )
        return self.max_tokens or usual

    @property
    def settings(self) -> dict[str, Any]:
        """What all answers in a journal must have been given under, beside the model."""
        place = Path(self.path or self.suite)
        data = None if self.suite in SUITES else str(place.resolve())
        suite = self.suite if self.path is not None or data is None else "file"
        return {
            "suite": suite,
            "data": data,
            "seed": self.seed if data is None else None,
            "max_tokens": self.tokens,
        }


def compare(
    model: str,
    against: Sequence[str],
    plan: Plan,
    open_model: Callable[[str], Runtime],
    progress: Callable[[int], None] | None = None,
    begin: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The `eval` JSON (docs/design.md) of a model, with its difference to each of `against` on the
    same items.

    against: models, which are asked as well, with their own number of latent steps; or files that
    `lvr-lite eval --json` wrote. All are looked at before the first question is asked, and one
    model is open at a time. begin: told how many questions there are, of which `progress` tells
    those that are done. Raises DataError, UsageError, BundleError; UsageError also where a file is
    not about the same items.
    """
    benchmark = None
    if plan.path is None:
        load_suite(plan.suite, plan.limit, plan.seed)
    elif plan.limit is not None and plan.limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {plan.limit}")
    else:
        benchmark = benchmarks.read(plan.suite, plan.path, plan.limit)
    if plan.skills and plan.suite == "skills":
        raise UsageError(f"--skills {plan.skills}: --suite skills asks them already; use --limit")
    references = {
        name: _read_result(Path(name), plan, benchmark) for name in against if _is_result(name)
    }
    models = [name for name in against if name not in references]
    for name in (model, *models) if against or plan.journal else ():
        _check_model(name)
    journal = (
        Journal.open(plan.journal, {"model": _identity(model), **plan.settings})
        if plan.journal
        else None
    )
    if begin is not None:
        begin((_count(plan, benchmark) + plan.beside) * (1 + len(models)))

    elsewhere = replace(plan, steps=(), journal=None)
    references |= {
        name: _score_model(open_model(name), elsewhere, benchmark, progress)[0] for name in models
    }
    results = _score_model(open_model(model), plan, benchmark, progress, journal)
    for result in results if against else ():
        result["against"] = [
            {"source": name, "model": references[name]["model"]} | versus(result, references[name])
            for name in against
        ]
    return results[0] | ({"by_steps": results} if len(results) > 1 else {})


def _count(plan: Plan, benchmark: benchmarks.Benchmark | None) -> int:
    if benchmark is not None:
        return len(benchmark.rows)
    return len(expected_answers(plan.suite, plan.limit))


def _identity(model: str) -> str:
    """Names a model by its contents: a bundle by its manifest, which holds the hash of every file,
    a checkpoint by all its weights.
    """
    return (
        sha256(Path(model) / MANIFEST)
        if is_bundle(Path(model))
        else read_checkpoint(model).digest()
    )


def reference_hint(model: str) -> str:
    """What to compare a tuned model with to see what its tuning cost, in one line; "" for a model
    that was not tuned.
    """
    if is_bundle(Path(model)):
        tuned = Bundle.open(Path(model), check=False).manifest.source.get("adapter", True)
        return (
            "what tuning cost: --against BASE, the model that it was tuned from (tiny for the embedded one)"
            if tuned
            else ""
        )
    checkpoint = read_checkpoint(model)
    if not checkpoint.adapter:
        return ""
    base = "tiny" if checkpoint.base.resolve() == resolve("tiny").resolve() else checkpoint.base
    return f"what tuning cost: --against {base}"


def _score_model(
    runtime: Runtime,
    plan: Plan,
    benchmark: benchmarks.Benchmark | None,
    progress: Callable[[int], None] | None,
    journal: Journal | None = None,
) -> list[dict[str, Any]]:
    """One model's score on a plan for each number of latent steps, with "skills" where the plan
    asks any beside.
    """
    steps: Sequence[int | None] = plan.steps or (None,)
    if (refused := max(plan.steps, default=0)) and not runtime.latent.steps:
        raise UsageError(
            f"--steps {refused}: {runtime.name} was not tuned for latent steps: use steps 0"
        )

    def answered(
        items: Iterable[Closed],
        max_tokens: int,
        grade: Grade,
        unopened: list[tuple[str, str]] | None = None,
    ) -> Any:
        options = [Options(max_tokens=max_tokens, steps=k) for k in steps]
        return answer_all(runtime, items, options, plan.batch, progress, grade, journal, unopened)

    if benchmark is None:
        grade = {"scenes": exact, "skills": skill}.get(plan.suite, lettered)
        found = answered(load_suite(plan.suite, plan.limit, plan.seed), plan.tokens, grade)
        results = [_scored(runtime, answers) for answers in found]
    else:
        unopened: list[tuple[str, str]] = []
        found = answered(benchmark.items(), plan.tokens, benchmarks.grade, unopened)
        results = [
            _scored(runtime, answers) | _of_benchmark(benchmark, answers, unopened)
            for answers in found
        ]
    beside = (
        answered(load_suite("skills", plan.beside, plan.seed), SKILLS_TOKENS, skill)
        if plan.beside
        else []
    )
    for k, result in zip(steps, results, strict=True):
        result |= {"suite": plan.suite, "seed": plan.seed if plan.suite in SUITES else None}
        result["steps"] = runtime.latent.steps if k is None else k
    for result, answers in zip(results, beside, strict=False):
        scored = _scored(runtime, answers)
        result["skills"] = {
            k: scored[k] for k in ("n", "accuracy", "interval", "by_type", "answers")
        }
    return results


def _of_benchmark(
    benchmark: benchmarks.Benchmark, answers: list[dict[str, Any]], unopened: list[tuple[str, str]]
) -> dict[str, Any]:
    """What the `eval` JSON of a benchmark has beside: its own scores, and the rows that could not
    be asked.
    """
    broken = benchmark.unopened(unopened)
    if not answers:
        raise benchmarks.none_readable(benchmark, broken)
    return {
        "path": str(benchmark.folder),
        "of": len(answers) + len(broken),
        "scores": benchmarks.scores(benchmark.name, answers),
        "by_type": benchmarks.by_type(benchmark.name, answers) if benchmark.name != "mmvp" else {},
        "pair_accuracy": score.pair_accuracy((a["pair"], a["correct"]) for a in answers)
        if benchmark.name == "mmvp"
        else None,
        "broken": [row.to_json() for row in broken],
        "answers": answers,
    }


def _is_result(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def _check_model(name: str) -> None:
    """Raises BundleError where there is no such model, or not all of it: before minutes are spent
    on another.
    """
    if is_bundle(Path(name)):
        Bundle.open(Path(name))
    else:
        read_checkpoint(name)


def _read_result(path: Path, plan: Plan, benchmark: benchmarks.Benchmark | None) -> dict[str, Any]:
    """Model and scored answers of what `lvr-lite eval --json` wrote, which must be about the items
    of `plan`; skills where both have them.

    Raises DataError where the file is something else, UsageError for other items.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["schema"], data["version"]) != ("lvr-lite/eval", 1):
            raise KeyError("schema")
        suite, seed = data["suite"], data.get("seed", plan.seed)
        result: dict[str, Any] = {"model": str(data["model"]), "answers": _scored_answers(data)}
        left_out = {str(row["id"]) for row in data.get("broken", [])}
        if "skills" in data and plan.beside:
            result["skills"] = {"answers": _scored_answers(data["skills"])}
    except OSError as error:
        raise DataError(
            f"--against {path}: cannot be read ({error.strerror or error}); name a file of `eval --json`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--against {path}: not what `lvr-lite eval --json` writes; give a model, or write the file again"
        ) from error
    named = (*SUITES, *benchmarks.BENCHMARKS)
    if suite != plan.suite and (suite in named or plan.suite in named):
        raise UsageError(f"--against {path}: is about the suite {suite}, not {plan.suite}")
    if plan.suite in SUITES and seed != plan.seed:
        raise UsageError(
            f"--against {path}: is about seed {seed}, not {plan.seed}: use --seed {seed}"
        )
    if benchmark is None:
        expected = expected_answers(plan.suite, plan.limit, plan.seed)
    else:  # rows that could not be asked there are left out of the comparison
        expected = {
            row.sample.id: row.sample.answer
            for row in benchmark.rows
            if row.sample.id not in left_out
        }
        here = {row.id for row in benchmark.broken}
        result["answers"] = [a for a in result["answers"] if a["id"] not in here]
        if not expected:
            raise UsageError(f"--against {path}: could ask none of these rows; score both again")
    _refuse_other_items(path, "--limit", result["answers"], expected)
    if "skills" in result:
        _refuse_other_items(
            path,
            "--skills",
            result["skills"]["answers"],
            expected_answers("skills", plan.beside, plan.seed),
        )
    return result


def _scored_answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each answer what a comparison needs; files of before the field "score" have "correct"
    alone.
    """
    answers: list[dict[str, Any]] = [
        {
            "id": str(a["id"]),
            "expected": str(a["expected"]),
            "score": float(a["score"] if "score" in a else a["correct"]),
        }
        for a in data["answers"]
    ]
    if not all(0 <= a["score"] <= 1 for a in answers):
        raise ValueError("score")
    return answers


def _refuse_other_items(
    path: Path, option: str, answers: list[dict[str, Any]], here: dict[str, str]
) -> None:
    """option: the one that says how many items there are."""
    there = {a["id"]: a["expected"] for a in answers}
    if only := sorted(there.keys() ^ here.keys()):
        numbers = f"{len(there)} there, {len(here)} here; {only[0]} is in one of them alone"
        raise UsageError(
            f"--against {path}: is not about the same items ({numbers}): use the same {option}, or score both again"
        )
    if changed := next((i for i in here if there[i] != here[i]), None):
        what = f"{there[changed]!r} there and {here[changed]!r} here"
        raise UsageError(
            f"--against {path}: the right answer to {changed} is {what}, so the items have changed: score both again"
        )


def versus(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How a result differs from another over the same items, and in the skills where both have
    them.
    """
    found = _difference(result["answers"], reference["answers"])
    if "skills" in result and "skills" in reference:
        found["skills"] = _difference(result["skills"]["answers"], reference["skills"]["answers"])
    return found


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired by id. accuracy: the reference's; difference: ours less that; interval: 95 %, by
    paired bootstrap; p: exact McNemar, over the items that one of the two answered better. Where
    answers have a "pair", whole pairs are drawn and counted instead of items.
    """
    points = {a["id"]: a["score"] for a in theirs}

    def over(answers: list[dict[str, Any]]) -> dict[str, Any]:
        reference = np.array([points[a["id"]] for a in answers])
        gain = np.array([a["score"] for a in answers]) - reference
        groups = [a.get("pair") or a["id"] for a in answers]
        sums, sizes = grouped(gain, groups)
        return {
            "n": len(answers),
            "accuracy": round(float(reference.mean()), 4),
            "difference": round(float(gain.mean()), 4),
            "interval": [
                round(v, 4)
                for v in (
                    bootstrap_mean(gain, seed=0)
                    if sizes.max() == 1
                    else bootstrap_ratio(sums, sizes, seed=0)
                )
            ],
            "p": float(f"{mcnemar(int((sums < 0).sum()), int((sums > 0).sum())):.3g}"),
        }

    ours = [a for a in ours if a["id"] in points]
    return over(ours) | {
        "by_type": {kind: over(answers) for kind, answers in _by_type(ours).items()}
    }
