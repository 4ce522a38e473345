"""Evaluation: the questions of a suite through a runtime, graded.

May import: numpy and what stands above `eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Pictures
from lvr_lite.errors import LvrError, UsageError
from lvr_lite.eval import benchmarks, score
from lvr_lite.eval.benchmark_files import Broken
from lvr_lite.eval.journal import Journal
from lvr_lite.eval.plan import (
    SKILLS_TOKENS,
    SUITES,
    Plan,
    load_suite,
    tokens_for,
)
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import median_and_most, prepare_prompt, visual_tokens
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.runtime import Runtime

# An item whose pictures may still have to be opened.
UnopenedItem = tuple[Sample, Pictures | Callable[[], Pictures]]
# How right an answer is, from 0 to 1.
Grade = Callable[[Sample, str], float]
# Called with the number of questions that were answered since the last call.
Progress = Callable[[int], None]

# ----------------------------------------------------------------------------------------------
# grades


def exact(sample: Sample, answer: str) -> float:
    """1.0 for the right answer, 0.0 for any other."""
    return float(score.is_correct(answer, sample.answer))


def skill(sample: Sample, answer: str) -> float:
    """Grades the suite `skills`: a caption by its details that are right (`score.caption`), other
    answers exactly.
    """
    if sample.type == "caption":
        return score.caption(answer, sample.answer)
    return exact(sample, answer)


def lettered(sample: Sample, answer: str) -> float:
    """As `exact`; where the question shows the sample's choices with letters ("(A) red (B) blue"),
    the letter of the right choice counts too.
    """
    if not sample.choices:
        return exact(sample, answer)
    options = score.lettered_options(sample.question)
    letters = score.LETTERS[: len(options)]
    choices = [score.normalized(choice) for choice in sample.choices]
    shown = [score.normalized(option) for option in options]
    if not options or choices not in (shown, list(letters.lower())):
        return exact(sample, answer)
    right = letters[choices.index(score.normalized(sample.answer))]
    return max(exact(sample, answer), float(score.chosen_letter(answer, options) == right))


# ----------------------------------------------------------------------------------------------
# answers and scores


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and how right it is.

    id, type, expected: of the sample.
    answer: the model's text.
    correct: the score is 1.
    score: from 0 to 1, with four decimals.
    tokens: of the answer.
    pair: which items belong together, or None.
    looks: how often it looked before it answered.
    visual_tokens: of each of its pictures.

    A journal of an older release has the last two as None.
    """

    id: str
    type: str | None
    answer: str
    expected: str
    correct: bool
    score: float
    tokens: list[int]
    pair: str | None
    looks: int | None = None
    visual_tokens: list[int] | None = None

    def to_json(self) -> JsonObject:
        """As the `eval` JSON and a journal have it, without "pair"."""
        fields = dict(vars(self))
        del fields["pair"]
        return fields

    def with_pair(self) -> JsonObject:
        """As the `eval` JSON of a benchmark has it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Scores:
    """The answers of a model to some questions."""

    model: str
    answers: list[ScoredAnswer]

    @property
    def pair_accuracy(self) -> float | None:
        return score.pair_accuracy((answer.pair, answer.correct) for answer in self.answers)

    def to_json(self) -> JsonObject:
        """The `eval` JSON without "suite".

        An accuracy is the mean of the grades. It is the share of right answers where a grade is 0
        or 1, as it is except for captions.
        """
        kinds = sorted({answer.type for answer in self.answers if answer.type is not None})
        by_type = {
            kind: _mean_score([answer for answer in self.answers if answer.type == kind])
            for kind in kinds
        }
        interval = score.wilson(sum(answer.score for answer in self.answers), len(self.answers))
        return {
            "schema": "lvr-lite/eval",
            "version": 1,
            "model": self.model,
            **_mean_score(self.answers),
            "interval": [round(bound, 4) for bound in interval],
            "by_type": by_type,
            "pair_accuracy": self.pair_accuracy,
            "looked": self.looked,
            "visual_tokens": self.visual_tokens,
            "answers": [answer.to_json() for answer in self.answers],
        }

    @property
    def looked(self) -> float | None:
        """The share of answers that looked; None where none tells."""
        looks = [answer.looks for answer in self.answers if answer.looks is not None]
        if not looks:
            return None
        return round(sum(n > 0 for n in looks) / len(looks), 4)

    @property
    def visual_tokens(self) -> JsonObject:
        """A picture's, median and most."""
        return median_and_most([n for a in self.answers for n in a.visual_tokens or ()])


def _mean_score(answers: Sequence[ScoredAnswer]) -> JsonObject:
    n = len(answers)
    mean = sum(answer.score for answer in answers) / max(1, n)
    return {"n": n, "accuracy": round(mean, 4)}


def accuracy_on(
    runtime: Runtime, items: Iterable[Item], expected: Iterable[str]
) -> tuple[float, float]:
    """Free-running accuracy on items, for evaluation during training, and the share of answers that
    looked.

    expected: the right answers, which say how long one may be.
    """
    tokens = tokens_for(runtime.processor, expected)
    report = evaluate(runtime, items, Options(max_tokens=tokens))
    return float(report["accuracy"]), float(report["looked"] or 0)


def evaluate(
    runtime: Runtime,
    items: Iterable[Item],
    options: Options | None = None,
    batch: int = 16,
    progress: Progress | None = None,
    grade: Grade = exact,
) -> JsonObject:
    """Answers to all items and their score, as the `eval` JSON has it without "suite".

    batch: questions decoded together.
    """
    options = options or Options()
    questioning = Questioning(
        runtime=runtime, steps=(options.steps,), batch=batch, progress=progress
    )
    (answers,) = questioning.answers(items, options, grade)
    return Scores(runtime.name, answers).to_json()


@dataclass(frozen=True)
class Asked:
    """A question that needs an answer.

    visual_tokens: of each of its pictures.
    """

    sample: Sample
    prompt: Prompt
    visual_tokens: list[int]


@dataclass(frozen=True)
class Questioning:
    """How a model is asked.

    steps: latent steps, one number or several; None for the model's own.
    batch: questions decoded together.
    journal: answers that are known and not asked for again; new ones are added.
    """

    runtime: Runtime
    steps: tuple[int | None, ...]
    batch: int
    progress: Progress | None = None
    journal: Journal = field(default_factory=Journal)

    @property
    def counts(self) -> list[int]:
        """The latent steps in numbers."""
        return [self.runtime.latent.steps if k is None else k for k in self.steps]

    def answers(
        self,
        items: Iterable[UnopenedItem],
        options: Options,
        grade: Grade,
        unopened: list[tuple[str, str]] | None = None,
    ) -> list[list[ScoredAnswer]]:
        """For each number of latent steps the answers to all items. Pictures are encoded once.

        options: all but `steps` counts.
        unopened: receives (id, problem) of each item whose pictures cannot be read; without it,
            such an item is an error.
        """
        samples: list[Sample] = []
        prompts = self._prompts(items, samples, unopened)
        while group := list(islice(prompts, self.batch)):
            for steps, count in zip(self.steps, self.counts, strict=True):
                self._decode(group, replace(options, steps=steps), count, grade)
            self._advance(len(group))
        return [[self._answer(sample, count) for sample in samples] for count in self.counts]

    def _prompts(
        self,
        items: Iterable[UnopenedItem],
        samples: list[Sample],
        unopened: list[tuple[str, str]] | None,
    ) -> Iterator[Asked]:
        """The prompts that still need an answer. samples: receives all that have an answer in the
        end.
        """
        for sample, pictures in items:
            if all(self.journal.knows(sample, count) for count in self.counts):
                samples.append(sample)
                self._advance(1)
                continue
            try:
                opened = pictures() if callable(pictures) else pictures
                prompt, _ = prepare_prompt(self.runtime, opened, sample.question)
            except LvrError as error:
                if unopened is None:
                    raise
                unopened.append((sample.id, str(error)))
                self._advance(1)
                continue
            samples.append(sample)
            yield Asked(sample, prompt, visual_tokens(self.runtime, opened))

    def _decode(self, group: list[Asked], options: Options, count: int, grade: Grade) -> None:
        group = [asked for asked in group if not self.journal.knows(asked.sample, count)]
        if not group:
            return
        results = decode(self.runtime, [asked.prompt for asked in group], options)
        for asked, result in zip(group, results, strict=True):
            sample = asked.sample
            text = self.runtime.processor.text(result.tokens)
            points = grade(sample, text)
            answer = ScoredAnswer(
                id=sample.id,
                type=sample.type,
                answer=text,
                expected=sample.answer,
                correct=points == 1,
                score=round(points, 4),
                tokens=result.tokens,
                pair=sample.pair,
                looks=int(result.looked),
                visual_tokens=asked.visual_tokens,
            )
            self.journal.add(sample, count, answer.to_json())

    def _answer(self, sample: Sample, count: int) -> ScoredAnswer:
        return ScoredAnswer(**self.journal.answer(sample, count), pair=sample.pair)

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            self.progress(count)


# ----------------------------------------------------------------------------------------------
# a suite with what is asked beside it


@dataclass(frozen=True)
class SuiteScores:
    """How a model did under a plan with one number of latent steps.

    steps: latent steps.
    max_pixels: area that pictures were shrunk to.
    max_tokens: of an answer.
    skills: what was asked beside the suite, if anything was.
    benchmark: where the suite is one.
    broken: rows of the benchmark that could not be asked.
    """

    plan: Plan
    steps: int
    scores: Scores
    max_pixels: int
    max_tokens: int
    skills: Scores | None = None
    benchmark: benchmarks.Benchmark | None = None
    broken: Sequence[Broken] = ()

    def to_json(self) -> JsonObject:
        """The `eval` JSON (docs/evaluation.md)."""
        report = self.scores.to_json()
        if self.benchmark is not None:
            report |= self._of_benchmark(self.benchmark)
        report["suite"] = self.plan.suite
        report["seed"] = self.plan.seed if self.plan.suite in SUITES else None
        report["steps"] = self.steps
        report["look"] = self.plan.look
        report["prompt"] = self.plan.asked
        report["max_pixels"] = self.max_pixels
        report["max_tokens"] = self.max_tokens
        if self.skills is not None:
            skills = self.skills.to_json()
            names = ("n", "accuracy", "interval", "by_type", "looked", "visual_tokens", "answers")
            report["skills"] = {name: skills[name] for name in names}
        return report

    def _of_benchmark(self, benchmark: benchmarks.Benchmark) -> JsonObject:
        """The benchmark's own scores, and the rows that could not be asked."""
        answers = [answer.with_pair() for answer in self.scores.answers]
        paired = benchmark.name == "mmvp"
        return {
            "path": str(benchmark.folder),
            "of": len(answers) + len(self.broken),
            "scores": benchmarks.scores(benchmark.name, answers),
            "by_type": {} if paired else benchmarks.by_type(benchmark.name, answers),
            "pair_accuracy": self.scores.pair_accuracy if paired else None,
            "broken": [row.to_json() for row in self.broken],
            "answers": answers,
        }


def score_model(
    runtime: Runtime,
    plan: Plan,
    benchmark: benchmarks.Benchmark | None,
    progress: Progress | None,
    journal: Journal | None = None,
) -> list[SuiteScores]:
    """How a model does under a plan, for each number of latent steps.

    Raises UsageError for latent steps, or a forced look, of a model without them, DataError where
    no row of a benchmark can be asked.
    """
    most = max(plan.steps, default=0)
    if most and not runtime.latent.steps:
        reason = f"{runtime.name} was not tuned for latent steps: use steps 0"
        raise UsageError(f"--steps {most}: {reason}")
    steps = plan.steps or (None,)
    questioning = Questioning(
        runtime=runtime,
        steps=steps,
        batch=plan.batch,
        progress=progress,
        journal=journal or Journal(),
    )
    options = Options(max_tokens=plan.tokens(runtime.processor), look=plan.look)
    options.steps_of(runtime)
    broken: list[Broken] = []
    if benchmark is None:
        grade = {"scenes": exact, "skills": skill}.get(plan.suite, lettered)
        special = runtime.processor.special_tokens
        items = load_suite(
            suite=plan.suite, limit=plan.limit, seed=plan.seed, special_tokens=special
        )
        answers = questioning.answers(items, options, grade)
    else:
        unopened: list[tuple[str, str]] = []
        rows = benchmark.items()
        answers = questioning.answers(rows, options, benchmarks.grade, unopened)
        broken = benchmark.unopened(unopened)
        if not answers[0]:
            raise benchmarks.none_readable(benchmark, broken)
    scores = [Scores(runtime.name, of_steps) for of_steps in answers]
    skills: list[Scores | None] = [None] * len(scores)
    if plan.beside:
        items = load_suite("skills", plan.beside, plan.seed)
        longer = replace(options, max_tokens=SKILLS_TOKENS)
        beside = questioning.answers(items, longer, skill)
        skills = [Scores(runtime.name, of_steps) for of_steps in beside]
    max_pixels = runtime.processor.image.max_pixels
    return [
        SuiteScores(
            plan=plan,
            steps=count,
            scores=score,
            max_pixels=max_pixels,
            max_tokens=options.max_tokens,
            skills=of_skills,
            benchmark=benchmark,
            broken=broken,
        )
        for count, score, of_skills in zip(questioning.counts, scores, skills, strict=True)
    ]
