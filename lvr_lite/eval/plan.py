"""What a model is asked, and how: suites of questions, and the options of `lvr-lite eval`.

May import: numpy and what stands above `eval`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lvr_lite.data.sources import Item, open_source
from lvr_lite.data.validate import check_samples
from lvr_lite.errors import UsageError
from lvr_lite.eval import benchmarks
from lvr_lite.files import JsonObject
from lvr_lite.generate.records import Look, check_look
from lvr_lite.model.processor import Processor

# The suites that are drawn.
SUITES = ("scenes", "skills")
# Questions of the suite `skills` that are asked beside the scenes.
SKILLS_BESIDE = 150
# Of an answer, where the longest right one does not need more.
MAX_TOKENS = 16
# A caption of eight things takes 55 tokens.
SKILLS_TOKENS = 64
TEST_SEED = 0


def load_suite(
    suite: str,
    limit: int | None,
    seed: int = TEST_SEED,
    special_tokens: Iterable[str] = (),
) -> Iterator[Item]:
    """The items of a suite.

    suite: `scenes` (held-out scenes), `skills` (question types that the scenes do not contain), or
        a file of samples.
    limit: items at most; of a drawn suite 300 by default.
    special_tokens: what no sample of a file may hold.

    Raises DataError, UsageError.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if suite not in SUITES and not Path(suite).is_file():
        names = ", ".join((*SUITES, *benchmarks.BENCHMARKS))
        raise UsageError(f"--suite {suite}: neither a suite ({names}) nor a file of samples")
    source = open_source(suite, "test", seed, limit, SUITES)
    if suite not in SUITES:
        check_samples(source, special_tokens)
    return source.items()


def expected_answers(suite: str, limit: int | None, seed: int = TEST_SEED) -> dict[str, str]:
    """The right answer to each item of a suite by its id, without opening or drawing a picture."""
    return open_source(
        name=suite, split="test", seed=seed, count=limit, registered=SUITES
    ).answers()


def tokens_for(processor: Processor, answers: Iterable[str]) -> int:
    """Tokens that an answer may take where these are the right ones: half as many again as the
    longest of them, so that a wrong one is not cut either; MAX_TOKENS at least.
    """
    tokenizer = processor.tokenizer
    lengths = (len(tokenizer.encode(answer, add_special_tokens=False).ids) for answer in answers)
    longest = max(lengths, default=0)
    return max(MAX_TOKENS, longest + longest // 2)


@dataclass(frozen=True)
class Plan:
    """What a model is asked and how: the options of `lvr-lite eval`.

    suite, limit, seed: as in `load_suite`; the suite may also be a benchmark.
    steps: latent steps of the model, one number or several; () for its own.
    batch: questions decoded together.
    look: whether answers look, as in `generate.records.Options`.
    max_pixels: area that pictures are shrunk to; None for the model's own.
    against_max_pixels: the same for the models that are compared; None for the model's.
    prompt: how a benchmark asks, see `benchmarks.PROMPTS`; None for "direct".
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
    look: Look = "auto"
    max_pixels: int | None = None
    against_max_pixels: int | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    skills: int | None = None
    path: str | None = None
    journal: Path | None = None

    def __post_init__(self) -> None:
        names = benchmarks.BENCHMARKS
        if wrong := [k for k in self.steps if k < 0]:
            raise UsageError(f"--steps {wrong[0]}: latent steps must be 0 or more")
        for steps in self.steps or (None,):
            check_look(self.look, steps)
        if self.prompt is not None and self.suite not in names:
            raise UsageError(
                f"--prompt {self.prompt}: is for --suite {', '.join(names)}; leave it out"
            )
        if self.prompt not in (None, *benchmarks.PROMPTS):
            known = " or ".join(benchmarks.PROMPTS)
            raise UsageError(f"--prompt {self.prompt}: must be {known}")
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
    def asked(self) -> str | None:
        """How a benchmark asks; None for another suite."""
        if self.path is None:
            return None
        return self.prompt or benchmarks.PROMPTS[0]

    def tokens(self, processor: Processor) -> int:
        """Tokens of an answer at most; of a file's, room for its longest right answer."""
        if self.max_tokens:
            return self.max_tokens
        if self.suite == "skills":
            return SKILLS_TOKENS
        if self.asked is not None:
            return benchmarks.MAX_TOKENS[self.asked]
        if self.suite in SUITES:
            return MAX_TOKENS
        return tokens_for(processor, expected_answers(self.suite, self.limit).values())

    def settings(self, processor: Processor) -> JsonObject:
        """What all answers in a journal must have been given under, beside the model.

        What is as it was before journals told it is None, as it is in journals of that time.
        """
        drawn = self.suite in SUITES
        place = Path(self.path or self.suite)
        own = processor.image.max_pixels
        return {
            "suite": self.suite if drawn or self.path is not None else "file",
            "data": None if drawn else str(place.resolve()),
            "seed": self.seed if drawn else None,
            "max_tokens": self.tokens(processor),
            "look": None if self.look == "auto" else self.look,
            "max_pixels": None if self.max_pixels == own else self.max_pixels,
            "prompt": None if self.asked == "direct" else self.asked,
        }
