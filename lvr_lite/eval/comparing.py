"""A model beside other models, or beside earlier results, on the same items.

May import: numpy and what stands above `eval`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lvr_lite.errors import DataError, UsageError
from lvr_lite.eval import benchmarks
from lvr_lite.eval.journal import Journal
from lvr_lite.eval.plan import SUITES, Plan, expected_answers, load_suite
from lvr_lite.eval.statistics import bootstrap_mean, bootstrap_ratio, grouped, mcnemar
from lvr_lite.eval.suite import Progress, score_model
from lvr_lite.files import JsonObject, sha256
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import MANIFEST, Bundle, is_bundle
from lvr_lite.model.checkpoint import check_max_pixels, processor_of, read_checkpoint, resolve
from lvr_lite.model.processor_files import read_json


@dataclass(frozen=True)
class Points:
    """Of an answer what a comparison needs; the fields of `ScoredAnswer`.

    group: items that are drawn together by the bootstrap: a pair, or the item alone.
    """

    id: str
    type: str | None
    expected: str
    score: float
    group: str

    @classmethod
    def from_json(cls, answer: JsonObject) -> Points:
        """Files of before the field "score" have "correct" alone. Raises ValueError, KeyError or
        TypeError for what is no scored answer.
        """
        key = str(answer["id"])
        field = "score" if "score" in answer else "correct"
        score = float(answer[field])
        if not 0 <= score <= 1:
            raise ValueError("score")
        return cls(
            id=key,
            type=answer.get("type"),
            expected=str(answer["expected"]),
            score=score,
            group=answer.get("pair") or key,
        )


@dataclass(frozen=True)
class Result:
    """A model's points on a suite, and on the skills where they were asked beside it.

    looked, visual_tokens: as in the `eval` JSON; None in files of older releases.
    """

    model: str
    answers: list[Points]
    skills: list[Points] | None
    looked: float | None = None
    visual_tokens: JsonObject | None = None

    @classmethod
    def from_json(cls, report: JsonObject) -> Result:
        """Raises as `Points.from_json`."""
        skills = None
        if "skills" in report:
            skills = [Points.from_json(answer) for answer in report["skills"]["answers"]]
        return cls(
            model=str(report["model"]),
            answers=[Points.from_json(answer) for answer in report["answers"]],
            skills=skills,
            looked=report.get("looked"),
            visual_tokens=report.get("visual_tokens"),
        )


def compare(
    model: str,
    against: Sequence[str],
    plan: Plan,
    open_model: Callable[[str], Runtime],
    progress: Progress | None = None,
    begin: Progress | None = None,
) -> JsonObject:
    """The `eval` JSON (docs/evaluation.md) of a model, with its difference to each of `against` on
    the same items, with pictures of the same size.

    against: models, which are asked as well, with their own number of latent steps; or files that
        `lvr-lite eval --json` wrote. All are checked before the first question is asked.
    open_model: opens a model by its name; one is open at a time.
    progress: is called with the number of questions that were answered.
    begin: is called once with the number of all questions.

    Raises DataError, UsageError, BundleError; UsageError also where a file is not about the same
    items.
    """
    benchmark = _check_plan(plan)
    references = {
        name: _read_result(Path(name), plan, benchmark) for name in against if _is_result(name)
    }
    models = [name for name in against if name not in references]
    if against or plan.journal:
        for name in (model, *models):
            _check_model(name)
    check_max_pixels(model, plan.max_pixels)
    for name in models:
        check_max_pixels(name, plan.against_max_pixels)
    if models and plan.max_pixels is None and plan.against_max_pixels is None:
        plan = replace(plan, max_pixels=_smallest(model, *models))
    with contextlib.ExitStack() as held:
        journal = None
        if plan.journal:
            settings = {"model": _identity(model), **plan.settings(processor_of(model))}
            journal = held.enter_context(Journal.open(plan.journal, settings))
        if begin is not None:
            begin((_count(plan, benchmark) + plan.beside) * (1 + len(models)))
        usual = replace(plan, steps=(), journal=None)
        for name in models:
            runtime = _sized(open_model(name), _size_beside(name, plan))
            # A model that cannot look is compared as it is.
            look = plan.look if runtime.latent.steps else "auto"
            scores = score_model(runtime, replace(usual, look=look), benchmark, progress)[0]
            references[name] = Result.from_json(scores.to_json())
        runtime = _sized(open_model(model), plan.max_pixels)
        all_scores = score_model(runtime, plan, benchmark, progress, journal)
    reports = [scores.to_json() for scores in all_scores]
    for report in reports:
        report["not_applied"] = not_applied(model)
    if against:
        for report in reports:
            ours = Result.from_json(report)
            report["against"] = [_beside(ours, name, references[name]) for name in against]
    if len(reports) == 1:
        return reports[0]
    return reports[0] | {"by_steps": reports}


def _beside(ours: Result, name: str, reference: Result) -> JsonObject:
    """A model that was compared, and the difference to it. name: as in `against`."""
    facts = {
        "source": name,
        "model": reference.model,
        "looked": reference.looked,
        "visual_tokens": reference.visual_tokens,
    }
    return facts | _result_difference(ours, reference)


def _smallest(*models: str) -> int:
    """The smallest area that one of these models shrinks pictures to: the tuned model's, beside
    the base that it was made of.
    """
    areas = [processor_of(model).image.max_pixels for model in models]
    return min(areas)


def _size_beside(model: str, plan: Plan) -> int | None:
    """The area that a model in `against` shrinks pictures to; None for its own."""
    if plan.against_max_pixels is not None or plan.max_pixels is None:
        return plan.against_max_pixels
    if is_bundle(Path(model)):
        # It takes no larger ones.
        return min(plan.max_pixels, processor_of(model).image.max_pixels)
    return plan.max_pixels


def _sized(runtime: Runtime, max_pixels: int | None) -> Runtime:
    if max_pixels is not None:
        runtime.processor = runtime.processor.with_max_pixels(max_pixels)
    return runtime


def not_applied(model: str) -> JsonObject:
    """What a base model's generation_config.json asks of greedy decoding and is not done here, by
    its name there: a repetition penalty. {} for a bundle, which does not tell.
    """
    if is_bundle(Path(model)):
        return {}
    path = read_checkpoint(model).base / "generation_config.json"
    penalty = None
    if path.is_file():
        penalty = read_json(path).get("repetition_penalty")
    if penalty in (None, 1, 1.0):
        return {}
    return {"repetition_penalty": penalty}


def reference_hint(model: str) -> str:
    """What to compare a tuned model with to see what its tuning cost, in one line; "" for a model
    that was not tuned.
    """
    base: str | Path = "BASE, the model that it was tuned from (tiny for the embedded one)"
    if is_bundle(Path(model)):
        tuned = Bundle.open(Path(model), check=False).manifest.source.get("adapter", True)
    else:
        checkpoint = read_checkpoint(model)
        tuned = checkpoint.adapter
        is_tiny = checkpoint.base.resolve() == resolve("tiny").resolve()
        base = "tiny" if is_tiny else checkpoint.base
    if not tuned:
        return ""
    return f"what tuning cost: --against {base}"


def _check_plan(plan: Plan) -> benchmarks.Benchmark | None:
    """The benchmark of a plan, if it has one. Raises DataError, UsageError for what cannot be
    asked.
    """
    benchmark = None
    if plan.path is None:
        load_suite(plan.suite, plan.limit, plan.seed)
    elif plan.limit is not None and plan.limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {plan.limit}")
    else:
        benchmark = benchmarks.read(plan.suite, plan.path, plan.limit, plan.asked or "direct")
    if plan.skills and plan.suite == "skills":
        reason = "--suite skills asks them already; use --limit"
        raise UsageError(f"--skills {plan.skills}: {reason}")
    return benchmark


def _check_model(name: str) -> None:
    """Raises BundleError where there is no such model, or not all of it: before minutes are spent
    on another.
    """
    if is_bundle(Path(name)):
        Bundle.open(Path(name))
    else:
        read_checkpoint(name)


def _count(plan: Plan, benchmark: benchmarks.Benchmark | None) -> int:
    if benchmark is not None:
        return len(benchmark.rows)
    return len(expected_answers(plan.suite, plan.limit))


def _identity(model: str) -> str:
    """Names a model by its contents: a bundle by its manifest, which holds the hash of every file,
    a checkpoint by all its weights.
    """
    if is_bundle(Path(model)):
        return sha256(Path(model) / MANIFEST)
    return read_checkpoint(model).digest()


# ----------------------------------------------------------------------------------------------
# earlier results


def _is_result(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def _read_result(path: Path, plan: Plan, benchmark: benchmarks.Benchmark | None) -> Result:
    """What `lvr-lite eval --json` wrote, which must be about the items of `plan`. It has skills
    where the plan asks them too.

    Raises DataError where the file is something else, UsageError for other items.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if (report["schema"], report["version"]) != ("lvr-lite/eval", 1):
            raise KeyError("schema")
        suite = report["suite"]
        seed = report.get("seed", plan.seed)
        if (asked := report.get("prompt")) not in (None, plan.asked):
            raise UsageError(
                f"--against {path}: was asked with --prompt {asked}, not {plan.asked}: use the "
                "same, or score both again"
            )
        if not plan.beside:
            report.pop("skills", None)
        result = Result.from_json(report)
        left_out = {str(row["id"]) for row in report.get("broken", [])}
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}); name a file of `eval --json`"
        raise DataError(f"--against {path}: {reason}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = "not what `lvr-lite eval --json` writes; give a model, or write the file again"
        raise DataError(f"--against {path}: {reason}") from error
    named = (*SUITES, *benchmarks.BENCHMARKS)
    if suite != plan.suite and (suite in named or plan.suite in named):
        raise UsageError(f"--against {path}: is about the suite {suite}, not {plan.suite}")
    if plan.suite in SUITES and seed != plan.seed:
        reason = f"is about seed {seed}, not {plan.seed}: use --seed {seed}"
        raise UsageError(f"--against {path}: {reason}")
    if benchmark is None:
        expected = expected_answers(plan.suite, plan.limit, plan.seed)
    else:
        # Rows that could not be asked, there or here, are left out of the comparison.
        samples = [row.sample for row in benchmark.rows]
        expected = {sample.id: sample.answer for sample in samples if sample.id not in left_out}
        broken = {row.id for row in benchmark.broken}
        answers = [answer for answer in result.answers if answer.id not in broken]
        result = replace(result, answers=answers)
        if not expected:
            raise UsageError(f"--against {path}: could ask none of these rows; score both again")
    _refuse_other_items(path, "--limit", result.answers, expected)
    if result.skills is not None:
        expected = expected_answers("skills", plan.beside, plan.seed)
        _refuse_other_items(path, "--skills", result.skills, expected)
    return result


def _refuse_other_items(
    path: Path, option: str, answers: Sequence[Points], here: dict[str, str]
) -> None:
    """option: the one that says how many items there are. here: the right answers by id."""
    there = {answer.id: answer.expected for answer in answers}
    only = sorted(there.keys() ^ here.keys())
    if only:
        numbers = f"{len(there)} there, {len(here)} here; {only[0]} is in one of them alone"
        advice = f"use the same {option}, or score both again"
        raise UsageError(f"--against {path}: is not about the same items ({numbers}): {advice}")
    for key, expected in here.items():
        if there[key] != expected:
            what = f"{there[key]!r} there and {expected!r} here"
            reason = f"the right answer to {key} is {what}, so the items have changed"
            raise UsageError(f"--against {path}: {reason}: score both again")


# ----------------------------------------------------------------------------------------------
# differences


def versus(report: JsonObject, reference: JsonObject) -> JsonObject:
    """How an `eval` JSON differs from another over the same items, and in the skills where both
    have them.
    """
    return _result_difference(Result.from_json(report), Result.from_json(reference))


def _result_difference(ours: Result, theirs: Result) -> JsonObject:
    difference = _difference(ours.answers, theirs.answers)
    if ours.skills is not None and theirs.skills is not None:
        difference["skills"] = _difference(ours.skills, theirs.skills)
    return difference


def _difference(ours: Sequence[Points], theirs: Sequence[Points]) -> JsonObject:
    """Over all items that both have, and by type."""
    scores = {answer.id: answer.score for answer in theirs}
    ours = [answer for answer in ours if answer.id in scores]
    kinds = {answer.type for answer in ours if answer.type is not None}
    by_type = {}
    for kind in sorted(kinds):
        of_kind = [answer for answer in ours if answer.type == kind]
        by_type[kind] = _paired_difference(of_kind, scores)
    difference = _paired_difference(ours, scores)
    return difference | {"by_type": by_type}


def _paired_difference(answers: Sequence[Points], scores: dict[str, float]) -> JsonObject:
    """The difference of answers to `scores`, the reference's by id.

    accuracy: the reference's.
    difference: ours less that.
    interval: 95 %, by paired bootstrap.
    p: exact McNemar, over the items that one of the two answered better.

    Items that form a pair are drawn and counted together.
    """
    reference = np.array([scores[answer.id] for answer in answers])
    ours = np.array([answer.score for answer in answers])
    gain = ours - reference
    sums, sizes = grouped(gain, [answer.group for answer in answers])
    if sizes.max() == 1:
        interval = bootstrap_mean(gain, seed=0)
    else:
        interval = bootstrap_ratio(sums, sizes, seed=0)
    worse = int((sums < 0).sum())
    better = int((sums > 0).sum())
    p = mcnemar(worse, better)
    return {
        "n": len(answers),
        "accuracy": round(float(reference.mean()), 4),
        "difference": round(float(gain.mean()), 4),
        "interval": [round(bound, 4) for bound in interval],
        "p": float(f"{p:.3g}"),
    }
