"""Measuring: the stages of a request, its latencies, memory and bandwidth, for several systems in one run.

May import: numpy, Pillow, the core.

It sees a model only through the Runtime protocol, and is handed ready runtimes. What is compared is measured interleaved: a round asks
every system the same request once, in an order shuffled for that round, because the machine's speed drifts between runs
(docs/decisions.md).

    system  what is measured under one name: a runtime, its precision, the bytes of its graphs
    sample  one duration in ms: of a request (preprocess, vision, embed, prefill, TTFT, …) or of one step in it (latent_step, text_step, …)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.ask import prepare_prompt
from lvr_lite.decode import Clock, Decoding, Event, Options, Result
from lvr_lite.errors import UsageError
from lvr_lite.memory import peak_rss_mb
from lvr_lite.runtime.base import Runtime

STAGES = ("preprocess", "vision", "embed", "prefill", "latent_step", "hand_over", "text_step", "lm_head", "sampling")
STEP_STAGES = ("latent_step", "text_step", "lm_head", "sampling")
LATENCIES = ("ttft", "ttfa", "tpls", "tpot", "end_to_end")
EXACT = ("fp32", "exact")  # precisions that the quality of the others is measured against
BUFFER_MB = 512  # larger than any last-level cache that a desktop has


@dataclass(frozen=True)
class System:
    """What is measured under `name`. bytes: {graph: bytes on disk}, with "decoder" what one step reads.

    peak_rss_mb: MiB, where the caller measured this system in a process of its own. accuracy: a suite's {"suite", "n", "accuracy",
    "interval"}, to stand beside the speed.
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
class Plan:
    """How much to measure.

    rounds: timed requests per system; round r asks request r modulo their number. warmup: untimed requests per system in the timed form.
    tokens: text tokens of every answer, forced (end tokens are forbidden until then), so that a one-word answer still gives a time per
    token. steps: latent steps, None takes each model's own. seed: of the order of systems within rounds. threads: that read memory for
    the bandwidth.
    """

    rounds: int = 10
    warmup: int = 2
    tokens: int = 16
    steps: int | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("tokens", 2), ("threads", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, not {getattr(self, name)}")


@dataclass
class Timing:
    """One request, timed. Samples in ms by stage and by latency; `spent`: ms of the whole request by stage; tokens: the answer's ids."""

    stages: dict[str, list[float]]
    latencies: dict[str, list[float]]
    spent: dict[str, float]
    tokens: list[int]


@dataclass
class Quality:
    """A system's free answers to the requests beside those of the exact one (`reference`), greedy, untimed.

    token_agreement: share of places (the longer answer's length) with the same token. latent_cosine: mean cosine of latent k with the
    reference's, for k = 1…K. n: requests.
    """

    reference: str
    n: int
    token_agreement: float
    latent_cosine: list[float]


@dataclass
class Measured:
    """One system's outcome. timings: one per round, in the order of rounds. peak_rss_mb: MiB. rss_is_shared: see `peak_rss_mb()`."""

    system: System
    timings: list[Timing] = field(default_factory=list)
    quality: Quality | None = None
    peak_rss_mb: float | None = None
    rss_is_shared: bool = False

    def stage(self, name: str) -> list[float]:
        """All samples of a stage, ms."""
        return [ms for timing in self.timings for ms in timing.stages[name]]

    def latency(self, name: str) -> list[float]:
        """All samples of a latency, ms; empty where it never occurred (no latents, or an answer of one token)."""
        return [ms for timing in self.timings for ms in timing.latencies[name]]

    def spent(self, stage: str) -> float:
        """Mean ms that a request spends in a stage, all its steps together."""
        return float(np.mean([timing.spent[stage] for timing in self.timings]))

    def output_md5(self) -> str:
        """Of the token ids of all timed answers, in the order of rounds: the same where two systems say the same."""
        return hashlib.md5(json.dumps([timing.tokens for timing in self.timings]).encode(), usedforsecurity=False).hexdigest()

    def bandwidth_fraction(self, bandwidth_gb_s: float) -> float | None:
        """Decoder bytes per latent step over its median time, as a share of the machine's bandwidth; text steps where there are no latent
        ones.

        Above 1 where the decoder fits in the cache (the embedded model): then it says nothing. None without a step or without the bytes.
        """
        steps = self.stage("latent_step") or self.stage("text_step")
        if not steps or "decoder" not in self.system.bytes:
            return None
        return self.system.bytes["decoder"] / (float(np.median(steps)) / 1e3) / 1e9 / bandwidth_gb_s


@dataclass
class Run:
    """All systems of one run. bandwidth_before, bandwidth_after: GB/s beside the rounds. loads: one-minute load averages beside them."""

    plan: Plan
    systems: list[Measured]
    bandwidth_before: float
    bandwidth_after: float
    loads: tuple[float | None, float | None]
    requests: int

    @property
    def bandwidth(self) -> float:
        """GB/s: the mean of before and after."""
        return (self.bandwidth_before + self.bandwidth_after) / 2

    @property
    def steady(self) -> bool:
        """Whether the machine read at the same speed before and after, within 15 %."""
        return abs(self.bandwidth_after - self.bandwidth_before) <= 0.15 * self.bandwidth


def percentile(samples: list[float], q: float) -> float:
    """The q-th percentile, q in 0…100, of one or more samples, linear between neighbours (numpy's default, type 7 of Hyndman and Fan)."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples_ms: list[float]) -> dict[str, Any]:
    """p50, p90, p99 and sample standard deviation (0 of one sample) with the raw samples, all in ms; None for each where there are no
    samples.
    """
    if not samples_ms:
        return {"p50_ms": None, "p90_ms": None, "p99_ms": None, "std_ms": None, "samples_ms": []}
    return {
        **{f"p{q}_ms": percentile(samples_ms, q) for q in (50, 90, 99)},
        "std_ms": float(np.std(samples_ms, ddof=1)) if len(samples_ms) > 1 else 0.0,
        "samples_ms": list(samples_ms),
    }


def shuffled_rounds(systems: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round the order in which systems take their turn: every system once, shuffled anew, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [[int(i) for i in rng.permutation(systems)] for _ in range(rounds)]


def read_bandwidth(threads: int, megabytes: int = BUFFER_MB, repeats: int = 4) -> float:
    """GB/s (1e9) at which `threads` threads together read memory: the best of `repeats` passes over a buffer of `megabytes` MiB.

    Each thread takes the maximum of its share of an int32 buffer: the cheapest reduction that numpy vectorises everywhere, without BLAS
    (whose own threads would interfere) and without the interpreter lock. One thread does not saturate most machines.
    """
    buffer = np.ones(megabytes * 2**18, np.int32)  # ones, not zeros: every page must be backed by memory of its own
    shares = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, shares))
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best / 1e9


def load_average() -> float | None:
    """The one-minute load average, None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def time_round(runtime: Runtime, request: Request, plan: Plan) -> Timing:
    """One request as the model answers it, with what a single step costs taken from a second one that has as many latent steps as tokens.

    The first steps after a prefill find the caches full of other things and are up to twice as slow. Latents come first and are few, so
    in one natural request they would bear all of that and text tokens none: TPLS and TPOT could not be compared.
    """
    natural = time_request(runtime, request, Options(max_tokens=plan.tokens, min_tokens=plan.tokens, steps=plan.steps))
    if not 0 < len(natural.stages["latent_step"]) < plan.tokens:
        return natural
    even = time_request(runtime, request, Options(max_tokens=plan.tokens, min_tokens=plan.tokens, steps=plan.tokens))
    stages = natural.stages | {name: even.stages[name] for name in STEP_STAGES}
    return replace(natural, stages=stages, latencies=natural.latencies | {name: even.latencies[name] for name in ("tpls", "tpot")})


def time_request(runtime: Runtime, request: Request, options: Options) -> Timing:
    """Answer one request from its arrival to its last token, timed by stage.

    TTFT and TTFA count from the arrival of picture and text. TPLS is a latent step: the decoder without the head. TPOT is the time from
    one text token to the next (embedding, text step, head, sampling and what the loop adds), so an answer of n tokens gives n - 1
    samples, less one where latents lie between.
    """
    arrived = time.perf_counter()
    prompt, before = prepare_prompt(runtime, [request.picture], request.question)
    decoding = Decoding(runtime, [prompt], options)
    prepared = time.perf_counter() - arrived
    events = list(decoding)
    whole = time.perf_counter() - arrived
    (result,) = decoding.results
    return _timing(before, prepared, decoding.clock, events, result, whole)


def _timing(before: dict[str, float], prepared: float, clock: Clock, events: list[Event], result: Result, whole: float) -> Timing:
    """Samples in ms from what one decoding left. The stage `embed` is the prompt's embedding; that of single tokens is part of TPOT."""
    stages = {
        "preprocess": [before["preprocess"]],
        "vision": [before["vision"]],
        "embed": clock.embed[:1],
        "prefill": [clock.prefill],
        "latent_step": clock.latent_step,
        "hand_over": [clock.hand_over] if clock.hand_over else [],
        "text_step": clock.text_step,
        "lm_head": clock.lm_head,
        "sampling": clock.sampling,
    }
    latencies = {
        "ttft": [] if result.ttft is None else [prepared + result.ttft],
        "ttfa": [] if result.ttfa is None else [prepared + result.ttfa],
        "tpls": clock.latent_step,
        "tpot": _between_tokens(events),
        "end_to_end": [whole],
    }
    spent = {name: sum(samples) for name, samples in stages.items()} | {"embed": sum(clock.embed)}
    return Timing(
        stages={name: [s * 1e3 for s in samples] for name, samples in stages.items()},
        latencies={name: [s * 1e3 for s in samples] for name, samples in latencies.items()},
        spent={name: s * 1e3 for name, s in spent.items()},
        tokens=list(result.tokens),
    )


def _between_tokens(events: list[Event]) -> list[float]:
    """Seconds between text tokens that follow each other without latents between them."""
    return [b.at - a.at for a, b in itertools.pairwise(events) if a.kind == b.kind == "token"]


def measure(
    systems: list[System], requests: list[Request], plan: Plan | None = None, progress: Callable[[int, int], None] | None = None
) -> Run:
    """Measure `systems` on `requests`: warm-up, peak memory, bandwidth, the interleaved rounds, bandwidth again.

    The warm-up lets every system answer every request freely; from that comes the quality. Memory is read after it, before the buffer of
    the bandwidth exists. progress: called with (requests timed, requests to time). Raises UsageError without systems or requests, or
    where two systems have one name.
    """
    plan = plan or Plan()
    _check(systems, requests)
    outcome = [Measured(system) for system in systems]
    _add_quality(outcome, requests, plan)
    for order in shuffled_rounds(len(systems), plan.warmup, plan.seed + 1):
        for i in order:
            time_round(systems[i].runtime, requests[0], plan)
    for measured in outcome:
        measured.peak_rss_mb = measured.system.peak_rss_mb
        if measured.peak_rss_mb is None:
            measured.peak_rss_mb, measured.rss_is_shared = peak_rss_mb(), len(systems) > 1
    before, load = read_bandwidth(plan.threads), load_average()
    for number, order in enumerate(shuffled_rounds(len(systems), plan.rounds, plan.seed)):
        for turn, i in enumerate(order):
            outcome[i].timings.append(time_round(systems[i].runtime, requests[number % len(requests)], plan))
            if progress:
                progress(number * len(systems) + turn + 1, plan.rounds * len(systems))
    return Run(plan, outcome, before, read_bandwidth(plan.threads), (load, load_average()), len(requests))


def _check(systems: list[System], requests: list[Request]) -> None:
    if not systems:
        raise UsageError("nothing to measure: name at least one bundle or checkpoint")
    if not requests:
        raise UsageError("nothing to ask: the list of requests is empty")
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two systems are called {name!r}: give each its own name")


def _add_quality(outcome: list[Measured], requests: list[Request], plan: Plan) -> None:
    """Every system's free answers, against those of the first exact system where there is one."""
    options = Options(max_tokens=plan.tokens, steps=plan.steps)
    answers = [[_answer(measured.system.runtime, request, options) for request in requests] for measured in outcome]
    exact = next((i for i, measured in enumerate(outcome) if measured.system.precision in EXACT), None)
    if exact is None:
        return
    for measured, mine in zip(outcome, answers, strict=True):
        measured.quality = compare(outcome[exact].system.name, answers[exact], mine)


def _answer(runtime: Runtime, request: Request, options: Options) -> Result:
    prompt, _ = prepare_prompt(runtime, [request.picture], request.question)
    decoding = Decoding(runtime, [prompt], options)
    for _ in decoding:
        pass
    return decoding.results[0]


def compare(reference: str, wanted: list[Result], got: list[Result]) -> Quality:
    """Quality of the answers `got` beside `wanted`, those of the system called `reference`, to the same requests."""
    same = sum(a == b for w, g in zip(wanted, got, strict=True) for a, b in zip(w.tokens, g.tokens, strict=False))
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
