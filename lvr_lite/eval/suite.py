"""Evaluation: a suite of questions through a runtime, scored, and beside other models on the same items.

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
from PIL import Image

from lvr_lite.ask import prepare_prompt, text_of
from lvr_lite.bundle import is_bundle, read_manifest
from lvr_lite.checkpoint import read_checkpoint, resolve
from lvr_lite.data import scenes
from lvr_lite.data.make import scene_samples, skill_samples
from lvr_lite.data.samples import Sample, read_samples
from lvr_lite.decode import Options, decode
from lvr_lite.errors import DataError, UsageError
from lvr_lite.eval import score
from lvr_lite.eval.statistics import bootstrap_mean, mcnemar
from lvr_lite.runtime.base import Runtime
from lvr_lite.runtime.preprocess import open_picture

Item = tuple[Sample, tuple[Image.Image, ...]]
Grade = Callable[[Sample, str], float]  # how right an answer is, 0 to 1
SUITES = ("scenes", "skills")
DRAWN_LIMIT = 300  # items of a drawn suite, unless limited
SKILLS_BESIDE = 150  # of the skills beside the scenes
MAX_TOKENS, SKILLS_TOKENS = 16, 64  # of an answer; a caption of eight things takes 55
TEST_SEED = 0


def load_suite(suite: str, limit: int | None, seed: int = TEST_SEED) -> Iterator[Item]:
    """The items of a suite: `scenes` (held-out scenes), `skills` (what they never ask), 300 of either unless limited, or a
    file of samples. Raises DataError, UsageError."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if suite == "scenes":
        return scene_items(limit or DRAWN_LIMIT, seed)
    if suite == "skills":
        return ((sample, (picture,)) for sample, picture in skill_samples(limit or DRAWN_LIMIT, seed))
    path = Path(suite)
    if not path.is_file():
        raise UsageError(f"--suite {suite}: neither a suite ({', '.join(SUITES)}) nor a file of samples")
    samples = read_samples(path)
    return islice(((s, tuple(open_picture(p) for p in s.images)) for s in samples), limit)


def scene_items(count: int, seed: int, split: str = "test") -> Iterator[Item]:
    """Drawn scenes as items, with their pictures in memory."""
    return ((sample, (picture,)) for sample, picture in scene_samples(count, seed, split))


def expected_answers(suite: str, limit: int | None, seed: int = TEST_SEED) -> dict[str, str]:
    """The right answer to each item of a suite by its id, without opening or drawing a picture."""
    if suite == "scenes":
        return {name: question.answer for name, _, question, _ in scenes.items(seed, "test", limit or DRAWN_LIMIT)}
    if suite == "skills":
        return {name: question.answer for name, _, question in scenes.skills(seed, limit or DRAWN_LIMIT)}
    return {sample.id: sample.answer for sample in read_samples(suite)[:limit]}


def exact(sample: Sample, answer: str) -> float:
    """1.0 for the right answer, 0.0 for any other."""
    return float(score.is_correct(answer, sample.answer))


def skill(sample: Sample, answer: str) -> float:
    """How right an answer in the suite `skills` is: captions by the share of details that are right (`score.caption`), others exactly."""
    return score.caption(answer, sample.answer) if sample.type == "caption" else exact(sample, answer)


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
    """Answers to all items and their score, as the `eval` JSON has it (docs/design.md) without "suite"; decoded `batch` at a time.

    An accuracy is the mean of what `grade` gives: the share of right answers where that is 0 or 1, as it is except for captions. An
    answer is "correct" when its score is 1.
    """
    answers: list[dict[str, Any]] = []
    pairs: list[tuple[str | None, bool]] = []
    waiting = iter(items)
    while group := list(islice(waiting, batch)):
        prompts = [prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in group]
        for (sample, _), result in zip(group, decode(runtime, prompts, options), strict=True):
            text = text_of(runtime, result)
            points = grade(sample, text)
            told = {"id": sample.id, "type": sample.type, "answer": text, "expected": sample.answer}
            answers.append(told | {"correct": points == 1, "score": round(points, 4), "tokens": result.tokens})
            pairs.append((sample.pair, points == 1))
        if progress is not None:
            progress(len(group))
    by_type = {kind: _mean_score(of_kind) for kind, of_kind in _by_type(answers).items()}
    return {
        "schema": "lvr-lite/eval",
        "version": 1,
        "model": runtime.name,
        **_mean_score(answers),
        "interval": [round(v, 4) for v in score.wilson(sum(a["score"] for a in answers), len(answers))],
        "by_type": by_type,
        "pair_accuracy": score.pair_accuracy(pairs),
        "answers": answers,
    }


def _mean_score(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"n": len(answers), "accuracy": round(sum(a["score"] for a in answers) / max(1, len(answers)), 4)}


def _by_type(answers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds = sorted({a["type"] for a in answers if a["type"] is not None})
    return {kind: [a for a in answers if a["type"] == kind] for kind in kinds}


# --------------------------------------------------------------------------------------------------- several models, same items


@dataclass(frozen=True)
class Plan:
    """What a model is asked and how: the options of `lvr-lite eval`.

    suite, limit, seed: as in `load_suite`. steps: latent steps of the model, None for its own. batch: questions decoded together.
    max_tokens: of an answer, None for the suite's usual. skills: questions outside the suite, asked beside; None for 150, or
    `limit` if that is fewer, beside the scenes and none beside another suite.
    """

    suite: str = "scenes"
    limit: int | None = None
    seed: int = TEST_SEED
    steps: int | None = None
    batch: int = 16
    max_tokens: int | None = None
    skills: int | None = None

    @property
    def beside(self) -> int:
        """How many of the skills are asked beside the suite."""
        if self.skills is not None:
            return self.skills
        return min(SKILLS_BESIDE, self.limit or SKILLS_BESIDE) if self.suite == "scenes" else 0


def compare(
    model: str,
    against: Sequence[str],
    plan: Plan,
    open_model: Callable[[str], Runtime],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The `eval` JSON (docs/design.md) of a model, with its difference to each of `against` on the same items.

    against: models, which are asked as well, with their own number of latent steps; or files that `lvr-lite eval --json` wrote. All are
    looked at before the first question is asked, and one model is open at a time. Raises DataError, UsageError, BundleError; UsageError
    also where a file is not about the same items.
    """
    load_suite(plan.suite, plan.limit, plan.seed)
    if plan.skills and plan.suite == "skills":
        raise UsageError(f"--skills {plan.skills}: --suite skills asks them already; use --limit")
    references = {name: _read_result(Path(name), plan) for name in against if _is_result(name)}
    models = [name for name in against if name not in references]
    for name in (model, *models) if against else ():
        _check_model(name)

    references |= {name: _score_model(open_model(name), replace(plan, steps=None), progress) for name in models}
    result = _score_model(open_model(model), plan, progress)
    if against:
        result["against"] = [{"source": name, "model": references[name]["model"]} | versus(result, references[name]) for name in against]
    return result


def reference_hint(model: str) -> str:
    """What to compare a tuned model with to see what its tuning cost, in one line; "" for a model that was not tuned."""
    if is_bundle(Path(model)):
        tuned = read_manifest(Path(model), check=False).source.get("adapter", True)
        return "what tuning cost: --against BASE, the model that it was tuned from (tiny for the embedded one)" if tuned else ""
    checkpoint = read_checkpoint(model)
    if not checkpoint.adapter:
        return ""
    base = "tiny" if checkpoint.base.resolve() == resolve("tiny").resolve() else checkpoint.base
    return f"what tuning cost: --against {base}"


def _score_model(runtime: Runtime, plan: Plan, progress: Callable[[int], None] | None) -> dict[str, Any]:
    """One model's score on a plan, with "skills" where the plan asks any beside."""

    def scored(suite: str, limit: int | None, max_tokens: int) -> dict[str, Any]:
        items, options = load_suite(suite, limit, plan.seed), Options(max_tokens=max_tokens, steps=plan.steps)
        return evaluate(runtime, items, options, plan.batch, progress, skill if suite == "skills" else exact)

    usual = SKILLS_TOKENS if plan.suite == "skills" else MAX_TOKENS
    result = scored(plan.suite, plan.limit, plan.max_tokens or usual)
    result |= {"suite": plan.suite, "seed": plan.seed if plan.suite in SUITES else None}
    if plan.beside:
        beside = scored("skills", plan.beside, SKILLS_TOKENS)
        result["skills"] = {k: beside[k] for k in ("n", "accuracy", "interval", "by_type", "answers")}
    return result


def _is_result(name: str) -> bool:
    return name.endswith(".json") or Path(name).is_file()


def _check_model(name: str) -> None:
    """Raises BundleError where there is no such model, or not all of it: before minutes are spent on another."""
    if is_bundle(Path(name)):
        read_manifest(Path(name))
    else:
        read_checkpoint(name)


def _read_result(path: Path, plan: Plan) -> dict[str, Any]:
    """Model and scored answers of what `lvr-lite eval --json` wrote, which must be about the items of `plan`; skills where both have them.

    Raises DataError where the file is something else, UsageError for other items."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["schema"], data["version"]) != ("lvr-lite/eval", 1):
            raise KeyError("schema")
        suite, seed = data["suite"], data.get("seed", plan.seed)
        result: dict[str, Any] = {"model": str(data["model"]), "answers": _scored_answers(data)}
        if "skills" in data and plan.beside:
            result["skills"] = {"answers": _scored_answers(data["skills"])}
    except OSError as error:
        raise DataError(f"--against {path}: cannot be read ({error.strerror or error}); name a file of `eval --json`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"--against {path}: not what `lvr-lite eval --json` writes; give a model, or write the file again") from error
    if suite != plan.suite and (suite in SUITES or plan.suite in SUITES):
        raise UsageError(f"--against {path}: is about the suite {suite}, not {plan.suite}")
    if plan.suite in SUITES and seed != plan.seed:
        raise UsageError(f"--against {path}: is about seed {seed}, not {plan.seed}: use --seed {seed}")
    _refuse_other_items(path, "--limit", result["answers"], expected_answers(plan.suite, plan.limit, plan.seed))
    if "skills" in result:
        _refuse_other_items(path, "--skills", result["skills"]["answers"], expected_answers("skills", plan.beside, plan.seed))
    return result


def _scored_answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each answer what a comparison needs; files of before the field "score" have "correct" alone."""
    answers: list[dict[str, Any]] = [
        {"id": str(a["id"]), "expected": str(a["expected"]), "score": float(a["score"] if "score" in a else a["correct"])}
        for a in data["answers"]
    ]
    if not all(0 <= a["score"] <= 1 for a in answers):
        raise ValueError("score")
    return answers


def _refuse_other_items(path: Path, option: str, answers: list[dict[str, Any]], here: dict[str, str]) -> None:
    """option: the one that says how many items there are."""
    there = {a["id"]: a["expected"] for a in answers}
    if only := sorted(there.keys() ^ here.keys()):
        numbers = f"{len(there)} there, {len(here)} here; {only[0]} is in one of them alone"
        raise UsageError(f"--against {path}: is not about the same items ({numbers}): use the same {option}, or score both again")
    if changed := next((i for i in here if there[i] != here[i]), None):
        what = f"{there[changed]!r} there and {here[changed]!r} here"
        raise UsageError(f"--against {path}: the right answer to {changed} is {what}, so the items have changed: score both again")


def versus(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How a result differs from another over the same items, and in the skills where both have them."""
    found = _difference(result["answers"], reference["answers"])
    if "skills" in result and "skills" in reference:
        found["skills"] = _difference(result["skills"]["answers"], reference["skills"]["answers"])
    return found


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired by id. accuracy: the reference's; difference: ours less that; interval: 95 %, by paired bootstrap; p: exact McNemar, over
    the items that one of the two answered better."""
    points = {a["id"]: a["score"] for a in theirs}

    def over(answers: list[dict[str, Any]]) -> dict[str, Any]:
        reference = np.array([points[a["id"]] for a in answers])
        gain = np.array([a["score"] for a in answers]) - reference
        return {
            "n": len(answers),
            "accuracy": round(float(reference.mean()), 4),
            "difference": round(float(gain.mean()), 4),
            "interval": [round(v, 4) for v in bootstrap_mean(gain, seed=0)],
            "p": float(f"{mcnemar(int((gain < 0).sum()), int((gain > 0).sum())):.3g}"),
        }

    return over(ours) | {"by_type": {kind: over(answers) for kind, answers in _by_type(ours).items()}}
