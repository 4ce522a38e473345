"""Evaluation: the questions of a suite through a runtime, graded.

May import: numpy and what stands above `eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from lvr_lite.data.samples import Sample
from lvr_lite.data.sources import Item, Pictures, open_source
from lvr_lite.errors import LvrError, UsageError
from lvr_lite.eval import benchmarks, score
from lvr_lite.eval.benchmark_files import Broken
from lvr_lite.eval.journal import Journal
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Prompt, decode
from lvr_lite.generate.runtime import Runtime

# An item whose pictures may still have to be opened.
UnopenedItem = tuple[Sample, Pictures | Callable[[], Pictures]]
# How right an answer is, from 0 to 1.
Grade = Callable[[Sample, str], float]
# Called with the number of questions that were answered since the last call.
Progress = Callable[[int], None]

# The suites that are drawn.
SUITES = ("scenes", "skills")
# Questions of the suite `skills` that are asked beside the scenes.
SKILLS_BESIDE = 150
MAX_TOKENS = 16
# A caption of eight things takes 55 tokens.
SKILLS_TOKENS = 64
TEST_SEED = 0


def load_suite(suite: str, limit: int | None, seed: int = TEST_SEED) -> Iterator[Item]:
    """The items of a suite.

    suite: `scenes` (held-out scenes), `skills` (question types that the scenes do not contain), or
        a file of samples.
    limit: items at most; of a drawn suite 300 by default.

    Raises DataError, UsageError.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if suite not in SUITES and not Path(suite).is_file():
        names = ", ".join((*SUITES, *benchmarks.BENCHMARKS))
        raise UsageError(f"--suite {suite}: neither a suite ({names}) nor a file of samples")
    return open_source(suite, "test", seed, limit, SUITES).items()


def expected_answers(suite: str, limit: int | None, seed: int = TEST_SEED) -> dict[str, str]:
    """The right answer to each item of a suite by its id, without opening or drawing a picture."""
    return open_source(suite, "test", seed, limit, SUITES).answers()


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
    """

    id: str
    type: str | None
    answer: str
    expected: str
    correct: bool
    score: float
    tokens: list[int]
    pair: str | None

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
            "answers": [answer.to_json() for answer in self.answers],
        }


def _mean_score(answers: Sequence[ScoredAnswer]) -> JsonObject:
    n = len(answers)
    mean = sum(answer.score for answer in answers) / max(1, n)
    return {"n": n, "accuracy": round(mean, 4)}


def accuracy_on(runtime: Runtime, items: Iterable[Item]) -> float:
    """Free-running accuracy on items, for evaluation during training."""
    return float(evaluate(runtime, items, Options(max_tokens=MAX_TOKENS))["accuracy"])


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
    questioning = Questioning(runtime, (options.steps,), batch, progress)
    (answers,) = questioning.answers(items, options, grade)
    return Scores(runtime.name, answers).to_json()


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
    ) -> Iterator[tuple[Sample, Prompt]]:
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
            yield sample, prompt

    def _decode(
        self, group: list[tuple[Sample, Prompt]], options: Options, count: int, grade: Grade
    ) -> None:
        group = [pair for pair in group if not self.journal.knows(pair[0], count)]
        if not group:
            return
        results = decode(self.runtime, [prompt for _, prompt in group], options)
        for (sample, _), result in zip(group, results, strict=True):
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
class Plan:
    """What a model is asked and how: the options of `lvr-lite eval`.

    suite, limit, seed: as in `load_suite`; the suite may also be a benchmark.
    steps: latent steps of the model, one number or several; () for its own.
    batch: questions decoded together.
    max_tokens: of an answer; None for the suite's usual.
    skills: questions outside the suite, asked beside it; None for 150, or `limit` if that is fewer,
        beside the scenes and none beside another suite.
    path: the folder of the benchmark.
    journal: a file of the model's answers, to go on from.

    Raises UsageError for options that contradict each other.
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
        names = benchmarks.BENCHMARKS
        if wrong := [k for k in self.steps if k < 0]:
            raise UsageError(f"--steps {wrong[0]}: latent steps must be 0 or more")
        if self.suite in names and self.path is None:
            holds = benchmarks.HOLDS[self.suite]
            raise UsageError(f"--suite {self.suite} needs --path DIR, a folder that holds {holds}")
        if self.suite not in names and self.path is not None:
            reason = f"is for --suite {', '.join(names)}; leave it out"
            raise UsageError(f"--path {self.path}: {reason}")

    @property
    def beside(self) -> int:
        """How many of the skills are asked beside the suite."""
        if self.skills is not None:
            return self.skills
        if self.suite != "scenes":
            return 0
        return min(SKILLS_BESIDE, self.limit or SKILLS_BESIDE)

    @property
    def tokens(self) -> int:
        """Tokens of an answer at most."""
        if self.max_tokens:
            return self.max_tokens
        if self.suite == "skills":
            return SKILLS_TOKENS
        return MAX_TOKENS if self.path is None else benchmarks.MAX_TOKENS

    @property
    def settings(self) -> JsonObject:
        """What all answers in a journal must have been given under, beside the model."""
        drawn = self.suite in SUITES
        place = Path(self.path or self.suite)
        return {
            "suite": self.suite if drawn or self.path is not None else "file",
            "data": None if drawn else str(place.resolve()),
            "seed": self.seed if drawn else None,
            "max_tokens": self.tokens,
        }


@dataclass(frozen=True)
class SuiteScores:
    """How a model did under a plan with one number of latent steps.

    steps: latent steps.
    skills: what was asked beside the suite, if anything was.
    benchmark: where the suite is one.
    broken: rows of the benchmark that could not be asked.
    """

    plan: Plan
    steps: int
    scores: Scores
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
        if self.skills is not None:
            skills = self.skills.to_json()
            names = ("n", "accuracy", "interval", "by_type", "answers")
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

    Raises UsageError for latent steps of a model without them, DataError where no row of a
    benchmark can be asked.
    """
    most = max(plan.steps, default=0)
    if most and not runtime.latent.steps:
        reason = f"{runtime.name} was not tuned for latent steps: use steps 0"
        raise UsageError(f"--steps {most}: {reason}")
    steps = plan.steps or (None,)
    questioning = Questioning(runtime, steps, plan.batch, progress, journal or Journal())
    options = Options(max_tokens=plan.tokens)
    broken: list[Broken] = []
    if benchmark is None:
        grade = {"scenes": exact, "skills": skill}.get(plan.suite, lettered)
        items = load_suite(plan.suite, plan.limit, plan.seed)
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
        beside = questioning.answers(items, Options(max_tokens=SKILLS_TOKENS), skill)
        skills = [Scores(runtime.name, of_steps) for of_steps in beside]
    return [
        SuiteScores(plan, count, score, of_skills, benchmark, broken)
        for count, score, of_skills in zip(questioning.counts, scores, skills, strict=True)
    ]
