"""Measuring: the stages of a request, its latencies, memory and bandwidth, for several systems in
one run.

May import: numpy, Pillow, the core.

It sees a model only through the Runtime protocol, and is handed ready runtimes. What is compared is
measured interleaved: a round asks every system the same request once, in an order shuffled for that
round, because the machine's speed drifts between runs (docs/decisions.md).

    system  what is measured under one name: a runtime, its precision, the bytes of its graphs
    setting latent steps, visual tokens a picture, requests in a batch: every system is measured in each
    sample  one duration in ms: of a request (preprocess, vision, embed, prefill, TTFT, …) or of one step in it (latent_step, text_step, …)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.bench.machine import load_average, read_bandwidth, read_compute, read_joules
from lvr_lite.errors import UsageError
from lvr_lite.generate.ask import PictureCache, Seconds, prepare_prompt
from lvr_lite.generate.decode import Clock, Decoding, Event, Options, Result
from lvr_lite.generate.runtime import Runtime
from lvr_lite.system import peak_rss_mb

STAGES = (
    "preprocess",
    "vision",
    "embed",
    "prefill",
    "latent_step",
    "hand_over",
    "text_step",
    "lm_head",
    "sampling",
)
STEP_STAGES = ("latent_step", "text_step", "lm_head", "sampling")
LATENCIES = ("ttft", "ttft_again", "ttfa", "tpls", "tpot", "end_to_end")
ALIKE = 0.9  # token agreement below which two systems are said to answer differently
EXACT = ("fp32", "exact")  # precisions that the quality of the others is measured against


@dataclass(frozen=True)
class System:
    """What is measured under `name`. bytes: {graph: bytes on disk}, with "decoder" what one step
    reads.

    peak_rss_mb: MiB, where the caller measured this system in a process of its own. accuracy: a
    suite's {"suite", "n", "accuracy", "interval"}, to stand beside the speed.
    """

    name: str
    precision: str
    runtime: Runtime
    bytes: dict[str, int]
    peak_rss_mb: float | None = None
    accuracy: dict[str, Any] | None = None


@dataclass(frozen=True)
class Request:
    """One picture and one question about it."""

    picture: Image.Image
    question: str


@dataclass(frozen=True)
class Setting:
    """steps: latent steps, None takes each model's own. image_tokens: visual tokens that pictures
    are scaled to, None leaves them as they are. batch: requests decoded together.
    """

    steps: int | None = None
    image_tokens: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("image_tokens", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, not {value}")


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    rounds: timed requests per system and setting; round r asks request r modulo their number, and
    in a batch those after it. seconds: go on for at least so long, since the machine's speed drifts
    over seconds and a short run sees one of its levels. warmup: untimed requests per system and
    setting in the timed form. tokens: text tokens of every answer, forced (end tokens are forbidden
    until then), so that a one-word answer still gives a time per token. settings: what each system
    is measured in. seed: of the order within rounds. threads: that read memory for the bandwidth.
    """

    rounds: int = 10
    seconds: float = 0.0
    warmup: int = 2
    tokens: int = 16
    settings: tuple[Setting, ...] = (Setting(),)
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("rounds", 1),
            ("seconds", 0),
            ("warmup", 0),
            ("tokens", 2),
            ("threads", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not self.settings:
            raise UsageError(
                "nothing to measure: name at least one number of steps, of image tokens and of requests in a batch"
            )


@dataclass
class Timing:
    """One request, or one batch, timed. Samples in ms by stage and by latency; `spent`: ms of the
    whole by stage; tokens: the answers' ids, one after another; joules: what the processor took
    meanwhile, where the machine says.
    """

    stages: dict[str, list[float]]
    latencies: dict[str, list[float]]
    spent: dict[str, float]
    tokens: list[int]
    joules: float | None = None


@dataclass
class Quality:
    """A system's free answers to the requests beside those of `reference`, the first exact system
    or else the first, greedy, untimed.

    token_agreement: share of places (the longer answer's length) with the same token.
    latent_cosine: mean cosine of latent k with the reference's, for k = 1…K. n: requests.
    """

    reference: str
    n: int
    token_agreement: float
    latent_cosine: list[float]


@dataclass
class Measured:
    """One system's outcome in one setting. timings: one per round, in the order of rounds.
    image_tokens, prompt_tokens: of the longest prompt, as the model saw it. peak_rss_mb: MiB.
    rss_is_shared: see `peak_rss_mb()`.
    """

    system: System
    setting: Setting = field(default_factory=Setting)
    image_tokens: int = 0
    prompt_tokens: int = 0
    timings: list[Timing] = field(default_factory=list)
    quality: Quality | None = None
    peak_rss_mb: float | None = None
    rss_is_shared: bool = False

    def stage(self, name: str) -> list[float]:
        """All samples of a stage, ms."""
        return [ms for timing in self.timings for ms in timing.stages[name]]

    def latency(self, name: str) -> list[float]:
        """All samples of a latency, ms; empty where it never occurred (no latents, or an answer of
        one token).
        """
        return [ms for timing in self.timings for ms in timing.latencies[name]]

    def spent(self, stage: str) -> float:
        """Mean ms that a request spends in a stage, all its steps together."""
        return float(np.mean([timing.spent[stage] for timing in self.timings]))

    @property
    def name(self) -> str:
        """The system's, with what differs in its setting from the usual one."""
        s = self.setting
        told = [f"K {s.steps}"] * (s.steps is not None) + [f"{s.image_tokens} visual tokens"] * (
            s.image_tokens is not None
        )
        return ", ".join([self.system.name, *told, *[f"batch {s.batch}"] * (s.batch > 1)])

    def throughput(self) -> float | None:
        """Text tokens a second while decoding: requests in a batch over the median time from one
        token of a row to its next.
        """
        between = self.latency("tpot")
        return self.setting.batch / (percentile(between, 50) / 1e3) if between else None

    def joules(self) -> float | None:
        """The median of what one request, or one batch, took; None where the machine does not
        say.
        """
        taken = [
            timing.joules
            for timing in self.timings
            if timing.joules is not None and timing.joules >= 0
        ]
        return percentile(taken, 50) if taken else None

    def output_md5(self, rounds: int | None = None) -> str:
        """Of the token ids of the timed answers, of all rounds or the first ones: the same where
        two systems say the same.
        """
        return hashlib.md5(
            json.dumps([timing.tokens for timing in self.timings[:rounds]]).encode(),
            usedforsecurity=False,
        ).hexdigest()

    def bandwidth_fraction(self, bandwidth_gb_s: float) -> float | None:
        """Decoder bytes per latent step over its median time, as a share of the machine's
        bandwidth; text steps where there are no latent ones.

        Above 1 where the decoder fits in the cache (the embedded model): then it says nothing. None
        without a step or without the bytes.
        """
        steps = self.stage("latent_step") or self.stage("text_step")
        if not steps or "decoder" not in self.system.bytes:
            return None
        return self.system.bytes["decoder"] / (float(np.median(steps)) / 1e3) / 1e9 / bandwidth_gb_s


@dataclass
class Run:
    """All systems of one run. bandwidth_before, bandwidth_after: GB/s beside the rounds. loads:
    one-minute load averages beside them.
    """

    plan: Plan
    systems: list[Measured]
    bandwidth_before: float
    bandwidth_after: float
    loads: tuple[float | None, float | None]
    requests: int
    compute: list[float] = field(
        default_factory=list
    )  # ms of `machine.read_compute`, one before each round

    @property
    def warnings(self) -> list[str]:
        """What must be known before these systems are compared."""
        told = (
            []
            if self.steady
            else [
                "The machine's speed changed during the run: measure again before comparing with other runs."
            ]
        )
        for measured in self.systems:
            quality = measured.quality
            if quality is not None and quality.token_agreement < ALIKE:
                told.append(
                    f"{measured.name} answers differently: {quality.token_agreement:.0%} of its tokens are those of {quality.reference}, "
                    f"less than {ALIKE:.0%}; its times are those of other answers."
                )
        return told

    @property
    def bandwidth(self) -> float:
        """GB/s: the mean of before and after."""
        return (self.bandwidth_before + self.bandwidth_after) / 2

    @property
    def steady(self) -> bool:
        """Whether the machine read at the same speed before and after, within 15 %."""
        return abs(self.bandwidth_after - self.bandwidth_before) <= 0.15 * self.bandwidth


def percentile(samples: list[float], q: float) -> float:
    """The q-th percentile, q in 0…100, of one or more samples, linear between neighbours (numpy's
    default, type 7 of Hyndman and Fan).
    """
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples_ms: list[float]) -> dict[str, Any]:
    """p50, p90, p99 and sample standard deviation (0 of one sample) with the raw samples, all in
    ms; None for each where there are no samples.
    """
    if not samples_ms:
        return {"p50_ms": None, "p90_ms": None, "p99_ms": None, "std_ms": None, "samples_ms": []}
    return {
        **{f"p{q}_ms": percentile(samples_ms, q) for q in (50, 90, 99)},
        "std_ms": float(np.std(samples_ms, ddof=1)) if len(samples_ms) > 1 else 0.0,
        "samples_ms": list(samples_ms),
    }


def shuffled_rounds(systems: int, seed: int) -> Iterator[list[int]]:
    """For each round, without end, the order in which systems take their turn: every system once,
    shuffled anew, the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield [int(i) for i in rng.permutation(systems)]


def time_round(runtime: Runtime, requests: list[Request], plan: Plan, setting: Setting) -> Timing:
    """One batch of requests as the model answers it, with what a single step costs taken from a
    second one that has as many latent steps as tokens; of a single request also the time to the
    first token of another question about its picture (`ttft_again`).

    The first steps after a prefill find the caches full of other things and are up to twice as
    slow. Latents come first and are few, so in one natural request they would bear all of that and
    text tokens none: TPLS and TPOT could not be compared.
    """
    known = PictureCache(runtime)
    options = Options(max_tokens=plan.tokens, min_tokens=plan.tokens, steps=setting.steps)
    before = read_joules()
    timing = time_request(runtime, known, requests, options)
    after = read_joules()
    timing = replace(timing, joules=None if before is None or after is None else after - before)
    if setting.batch == 1:
        again = time_request(runtime, known, requests, replace(options, max_tokens=1, min_tokens=1))
        timing = replace(
            timing, latencies=timing.latencies | {"ttft_again": again.latencies["ttft"]}
        )
    if not 0 < len(timing.stages["latent_step"]) < plan.tokens:
        return timing
    even = time_request(runtime, known, requests, replace(options, steps=plan.tokens))
    stages = timing.stages | {name: even.stages[name] for name in STEP_STAGES}
    return replace(
        timing,
        stages=stages,
        latencies=timing.latencies | {name: even.latencies[name] for name in ("tpls", "tpot")},
    )


def time_request(
    runtime: Runtime, known: PictureCache, requests: list[Request], options: Options
) -> Timing:
    """Answer a batch of requests from their arrival to the last token, timed by stage.

    TTFT and TTFA count from the arrival of pictures and text to the last row's. TPLS is a latent
    step: the decoder without the head. TPOT is the time from one text token of the first row to its
    next (embedding, text step, head, sampling and what the loop adds), so an answer of n tokens
    gives n - 1 samples, less one where latents lie between.
    """
    arrived = time.perf_counter()
    prepared = [known.prepare_prompt([request.picture], request.question) for request in requests]
    decoding = Decoding(runtime, [prompt for prompt, _ in prepared], options)
    ready = time.perf_counter() - arrived
    events = list(decoding)
    whole = time.perf_counter() - arrived
    before = Seconds(
        sum(seconds.preprocess for _, seconds in prepared),
        sum(seconds.vision for _, seconds in prepared),
    )
    return _timing(before, ready, decoding.clock, events, decoding.results, whole)


def _timing(
    before: Seconds,
    prepared: float,
    clock: Clock,
    events: list[Event],
    results: list[Result],
    whole: float,
) -> Timing:
    """Samples in ms from what one decoding left. The stage `embed` is the prompt's embedding; that
    of single tokens is part of TPOT.
    """
    stages = {
        "preprocess": [before.preprocess],
        "vision": [before.vision],
        "embed": clock.embed[:1],
        "prefill": [clock.prefill],
        "latent_step": clock.latent_step,
        "hand_over": [clock.hand_over] if clock.hand_over else [],
        "text_step": clock.text_step,
        "lm_head": clock.lm_head,
        "sampling": clock.sampling,
    }
    firsts = [
        [r.ttft for r in results if r.ttft is not None],
        [r.ttfa for r in results if r.ttfa is not None],
    ]
    latencies = {
        "ttft": [prepared + max(firsts[0])] if firsts[0] else [],
        "ttft_again": [],
        "ttfa": [prepared + max(firsts[1])] if firsts[1] else [],
        "tpls": clock.latent_step,
        "tpot": _between_tokens(events),
        "end_to_end": [whole],
    }
    spent = {name: sum(samples) for name, samples in stages.items()} | {"embed": sum(clock.embed)}
    return Timing(
        stages={name: [s * 1e3 for s in samples] for name, samples in stages.items()},
        latencies={name: [s * 1e3 for s in samples] for name, samples in latencies.items()},
        spent={name: s * 1e3 for name, s in spent.items()},
        tokens=[token for result in results for token in result.tokens],
    )


def _between_tokens(events: list[Event]) -> list[float]:
    """Seconds between text tokens of the first row that follow each other without latents between
    them.
    """
    mine = [event for event in events if event.row == 0]
    return [b.at - a.at for a, b in itertools.pairwise(mine) if a.kind == b.kind == "token"]


def measure(
    systems: list[System],
    requests: list[Request],
    plan: Plan | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Measure `systems` on `requests`: warm-up, peak memory, bandwidth, the interleaved rounds,
    bandwidth again.

    The warm-up lets every system answer every request freely; from that comes the quality. Memory
    is read after it, before the buffer of the bandwidth exists. progress: called with (requests
    timed, requests to time). Raises UsageError without systems or requests, where two systems have
    one name, and where pictures cannot have the visual tokens of a setting.
    """
    plan = plan or Plan()
    _check(systems, requests)
    outcome = [Measured(system, setting) for setting in plan.settings for system in systems]
    asked = [
        [_scaled(request, m.system.runtime, m.setting.image_tokens) for request in requests]
        for m in outcome
    ]
    for measured, scaled in zip(outcome, asked, strict=True):
        _look(measured, scaled)
    for first in range(0, len(outcome), len(systems)):
        _add_quality(
            outcome[first : first + len(systems)], asked[first : first + len(systems)], plan
        )
    for order in itertools.islice(shuffled_rounds(len(outcome), plan.seed + 1), plan.warmup):
        for i in order:
            time_round(
                outcome[i].system.runtime,
                _batch(asked[i], 0, outcome[i].setting.batch),
                plan,
                outcome[i].setting,
            )
    for measured in outcome:
        measured.peak_rss_mb = measured.system.peak_rss_mb
        if measured.peak_rss_mb is None:
            measured.peak_rss_mb, measured.rss_is_shared = peak_rss_mb(), len(systems) > 1
    before, load = read_bandwidth(plan.threads), load_average()
    compute: list[float] = []
    began, rounds = time.perf_counter(), plan.rounds
    for number, order in enumerate(shuffled_rounds(len(outcome), plan.seed)):
        if number >= rounds:
            passed = (time.perf_counter() - began) / plan.seconds if plan.seconds else 1.0
            if passed >= 1:
                break
            rounds = number + 1 if passed > 0.9 else math.ceil(number / passed)
        compute.append(read_compute())
        for turn, i in enumerate(order):
            batch = _batch(asked[i], number, outcome[i].setting.batch)
            outcome[i].timings.append(
                time_round(outcome[i].system.runtime, batch, plan, outcome[i].setting)
            )
            if progress:
                progress(number * len(outcome) + turn + 1, rounds * len(outcome))
    return Run(
        plan,
        outcome,
        before,
        read_bandwidth(plan.threads),
        (load, load_average()),
        len(requests),
        compute,
    )


def _batch(requests: list[Request], number: int, size: int) -> list[Request]:
    return [requests[(number + i) % len(requests)] for i in range(size)]


def _scaled(request: Request, runtime: Runtime, tokens: int | None) -> Request:
    """The request with its picture in a size of about `tokens` visual tokens, rows and columns as
    equal as that allows.
    """
    if tokens is None:
        return request
    side = runtime.processor.image.token_side
    rows = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    if tokens // rows > 2 * rows:  # no good rectangle: the next best number
        rows = math.isqrt(tokens)
    return replace(request, picture=request.picture.resize((tokens // rows * side, rows * side)))


def _look(measured: Measured, requests: list[Request]) -> None:
    """Notes how long prompts are. Raises UsageError where that is not what the setting says."""
    runtime, wanted = measured.system.runtime, measured.setting.image_tokens
    prompts = [
        prepare_prompt(runtime, [request.picture], request.question)[0]
        for request in (requests if wanted is None else requests[:1])
    ]
    measured.prompt_tokens = max(len(prompt.ids) for prompt in prompts)
    measured.image_tokens = max(
        int((prompt.ids == runtime.processor.tokens.image).sum()) for prompt in prompts
    )
    if wanted is not None and abs(measured.image_tokens - wanted) > wanted / 10:
        raise UsageError(
            f"image_tokens {wanted}: {measured.system.name} gives such a picture {measured.image_tokens} visual tokens, since it scales "
            "pictures to sizes of its own; name a number that it can have"
        )


def _check(systems: list[System], requests: list[Request]) -> None:
    if not systems:
        raise UsageError("nothing to measure: name at least one bundle or checkpoint")
    if not requests:
        raise UsageError("nothing to ask: the list of requests is empty")
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two systems are called {name!r}: give each its own name")


def _add_quality(outcome: list[Measured], requests: list[list[Request]], plan: Plan) -> None:
    """Every system's free answers in one setting, against those of the first exact system where
    there is one, else of the first.
    """
    if len(outcome) == 1 and outcome[0].system.precision not in EXACT:
        return
    answers = [
        [
            _answer(
                m.system.runtime, request, Options(max_tokens=plan.tokens, steps=m.setting.steps)
            )
            for request in asked
        ]
        for m, asked in zip(outcome, requests, strict=True)
    ]
    first = next((i for i, measured in enumerate(outcome) if measured.system.precision in EXACT), 0)
    for measured, mine in zip(outcome, answers, strict=True):
        measured.quality = compare(outcome[first].system.name, answers[first], mine)


def _answer(runtime: Runtime, request: Request, options: Options) -> Result:
    prompt, _ = prepare_prompt(runtime, [request.picture], request.question)
    decoding = Decoding(runtime, [prompt], options)
    for _ in decoding:
        pass
    return decoding.results[0]


def compare(reference: str, wanted: list[Result], got: list[Result]) -> Quality:
    """Quality of the answers `got` beside `wanted`, those of the system called `reference`, to the
    same requests.
    """
    same = sum(
        a == b
        for w, g in zip(wanted, got, strict=True)
        for a, b in zip(w.tokens, g.tokens, strict=False)
    )
    places = sum(max(len(w.tokens), len(g.tokens)) for w, g in zip(wanted, got, strict=True))
    by_step: dict[int, list[float]] = {}
    for w, g in zip(wanted, got, strict=True):
        for k, (a, b) in enumerate(zip(w.latents, g.latents, strict=False)):
            if a.shape == b.shape:  # another model, of another width, has no common latents
                by_step.setdefault(k, []).append(_cosine(a, b))
    cosines = [float(np.mean(by_step[k])) for k in sorted(by_step)]
    return Quality(reference, len(wanted), same / places if places else 1.0, cosines)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
