"""Measuring: requests (`timing`), memory and bandwidth, for several systems in one run.

May import: numpy, generate/.

It sees a model only through the Runtime protocol, and is handed ready runtimes. What is compared is
measured interleaved: a round asks every system the same request once, in an order shuffled for that
round, because the machine's speed drifts between runs (docs/decisions.md).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from lvr_lite.bench.machine import load_average, read_bandwidth, read_compute
from lvr_lite.bench.plan import Plan, Request, Setting, System
from lvr_lite.bench.quality import qualities
from lvr_lite.bench.record import (
    LATENCIES,
    STAGES,
    Bandwidth,
    Benchmark,
    Quality,
    SettingResult,
    Summary,
    SystemResult,
    percentile,
)
from lvr_lite.bench.timing import Timing, time_round
from lvr_lite.errors import UsageError
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import median_and_most, prepare_prompt
from lvr_lite.generate.records import Look
from lvr_lite.system import peak_rss_mb

# Token agreement below which two systems are said to answer differently.
ALIKE = 0.9
# What the machine's speed may change by during a run, as a share of its mean.
STEADY = 0.15


@dataclass
class Measured:
    """One system's outcome in one setting.

    requests: with pictures of the setting's size.
    look: as in `Options`.
    picture_tokens: visual tokens of each request's picture.
    prompt_tokens: of the longest prompt, as the model saw it.
    timings: one per round, in the order of rounds.
    rss_is_shared: whether `peak_rss_mb` (MiB) is that of all systems together.
    """

    system: System
    setting: Setting = field(default_factory=Setting)
    requests: Sequence[Request] = ()
    look: Look = "auto"
    picture_tokens: Sequence[int] = ()
    prompt_tokens: int = 0
    timings: list[Timing] = field(default_factory=list)
    quality: Quality | None = None
    peak_rss_mb: float | None = None
    rss_is_shared: bool = False

    def batch(self, number: int) -> list[Request]:
        """The requests of a round."""
        count = len(self.requests)
        return [self.requests[(number + i) % count] for i in range(self.setting.batch)]

    def stage(self, name: str) -> list[float]:
        """All samples of a stage, ms."""
        return [ms for timing in self.timings for ms in timing.stages[name]]

    def latency(self, name: str) -> list[float]:
        """All samples of a latency, ms; empty where it never occurred (no latents, or an answer of
        one token).
        """
        return [ms for timing in self.timings for ms in timing.latencies[name]]

    @property
    def name(self) -> str:
        """The system's, with what differs in its setting from the usual one."""
        parts = [self.system.name]
        if self.setting.steps is not None:
            parts.append(f"K {self.setting.steps}")
        if self.setting.image_tokens is not None:
            parts.append(f"{self.setting.image_tokens} visual tokens")
        if self.setting.batch > 1:
            parts.append(f"batch {self.setting.batch}")
        return ", ".join(parts)

    @property
    def latent_steps(self) -> list[int]:
        """That the timed answers took."""
        return [steps for timing in self.timings for steps in timing.latents]

    def throughput(self) -> float | None:
        """Text tokens a second while decoding: requests in a batch over the median time from one
        token of a row to its next.
        """
        between = self.latency("tpot")
        if not between:
            return None
        return self.setting.batch / (percentile(between, 50) / 1e3)

    def joules(self) -> float | None:
        """The median of what one request, or one batch, took; None where the machine does not
        say.
        """
        samples = [timing.joules for timing in self.timings if timing.joules is not None]
        # A counter that started again at 0 gives a negative difference.
        samples = [joules for joules in samples if joules >= 0]
        if not samples:
            return None
        return percentile(samples, 50)

    def output_md5(self, rounds: int | None = None) -> str:
        """Of the token ids of the timed answers, of all rounds or the first ones: the same where
        two systems give the same answers.
        """
        tokens = json.dumps([timing.tokens for timing in self.timings[:rounds]])
        return hashlib.md5(tokens.encode(), usedforsecurity=False).hexdigest()

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

    def result(self, bandwidth_gb_s: float, rounds: int) -> SystemResult:
        """rounds: that every run of this plan has, whose answers `output_md5` is of."""
        prompt = {
            "visual_tokens": max(self.picture_tokens, default=0),
            "prompt_tokens": self.prompt_tokens,
        }
        taken = self.latent_steps
        spent = {name: [timing.spent[name] for timing in self.timings] for name in STAGES}
        return SystemResult(
            name=self.name,
            system=self.system.name,
            precision=self.system.precision,
            setting=SettingResult(**asdict(self.setting), **prompt),
            stages={name: Summary.of(self.stage(name)) for name in STAGES},
            latencies={name: Summary.of(self.latency(name)) for name in LATENCIES},
            output_md5=self.output_md5(rounds),
            request_ms={name: float(np.mean(samples)) for name, samples in spent.items()},
            throughput_tokens_s=self.throughput(),
            joules=self.joules(),
            peak_rss_mb=self.peak_rss_mb,
            peak_rss_shared=self.rss_is_shared,
            bytes=dict(self.system.bytes),
            bandwidth_fraction=self.bandwidth_fraction(bandwidth_gb_s),
            quality=self.quality,
            accuracy=self.system.accuracy,
            look=self.look,
            looked=float(np.mean([steps > 0 for steps in taken])) if taken else None,
            latent_steps=float(np.mean(taken)) if taken else None,
            visual_tokens=median_and_most(self.picture_tokens),
        )


@dataclass
class Run:
    """All systems of one run.

    bandwidth_before, bandwidth_after: GB/s beside the rounds.
    loads: one-minute load averages beside them.
    requests: their number.
    compute: ms of `machine.read_compute`, one before each round.
    """

    plan: Plan
    systems: list[Measured]
    bandwidth_before: float
    bandwidth_after: float
    loads: tuple[float | None, float | None]
    requests: int
    compute: list[float] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What must be known before these systems are compared."""
        warnings = []
        if not self.steady:
            warnings.append(
                "The machine's speed changed during the run: measure again before comparing with "
                "other runs."
            )
        for measured in self.systems:
            quality = measured.quality
            if quality is not None and quality.token_agreement < ALIKE:
                warnings.append(
                    f"{measured.name} answers differently: {quality.token_agreement:.0%} of its "
                    f"tokens are those of {quality.reference}, less than {ALIKE:.0%}; its times "
                    "are those of other answers."
                )
        return warnings

    @property
    def bandwidth(self) -> float:
        """GB/s: the mean of before and after."""
        return (self.bandwidth_before + self.bandwidth_after) / 2

    @property
    def steady(self) -> bool:
        """Whether the machine read at the same speed before and after, within STEADY."""
        return abs(self.bandwidth_after - self.bandwidth_before) <= STEADY * self.bandwidth

    def result(self, machine: JsonObject) -> Benchmark:
        """The run as docs/runtime.md specifies it. machine: `machine.card()`."""
        plan = asdict(self.plan) | {"requests": self.requests}
        threads = plan.pop("threads")
        plan["settings"] = list(plan["settings"])
        return Benchmark(
            machine=machine,
            bandwidth_gb_s=self.bandwidth,
            rounds=len(self.compute),
            core_ms=self.compute,
            bandwidth=Bandwidth(
                before_gb_s=self.bandwidth_before,
                after_gb_s=self.bandwidth_after,
                threads=threads,
                steady=self.steady,
                load_before=self.loads[0],
                load_after=self.loads[1],
            ),
            plan=plan,
            warnings=self.warnings,
            systems=[m.result(self.bandwidth, self.plan.rounds) for m in self.systems],
        )


def shuffled_rounds(systems: int, seed: int) -> Iterator[list[int]]:
    """For each round, without end, the order in which systems take their turn: every system once,
    shuffled anew, the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield [int(i) for i in rng.permutation(systems)]


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
    outcome = [Measured(s, setting) for setting in plan.settings for s in systems]
    for measured in outcome:
        tokens = measured.setting.image_tokens
        measured.look = plan.options(measured.system.runtime, measured.setting).look
        measured.requests = [r.scaled(measured.system.runtime, tokens) for r in requests]
        _note_prompts(measured)
    for first in range(0, len(outcome), len(systems)):
        _note_quality(outcome[first : first + len(systems)], plan)
    for order in itertools.islice(shuffled_rounds(len(outcome), plan.seed + 1), plan.warmup):
        for i in order:
            _time(outcome[i], 0, plan)
    for measured in outcome:
        _note_memory(measured, shared=len(systems) > 1)
    bandwidth_before = read_bandwidth(plan.threads)
    load_before = load_average()
    compute = _time_rounds(outcome, plan, progress)
    return Run(
        plan=plan,
        systems=outcome,
        bandwidth_before=bandwidth_before,
        bandwidth_after=read_bandwidth(plan.threads),
        loads=(load_before, load_average()),
        requests=len(requests),
        compute=compute,
    )


def _time(measured: Measured, number: int, plan: Plan) -> Timing:
    """A system's turn in a round."""
    return time_round(
        runtime=measured.system.runtime,
        requests=measured.batch(number),
        plan=plan,
        setting=measured.setting,
    )


def _time_rounds(
    outcome: list[Measured], plan: Plan, progress: Callable[[int, int], None] | None
) -> list[float]:
    """The timed rounds; returns the ms of `read_compute` before each."""
    compute: list[float] = []
    began = time.perf_counter()
    rounds = plan.rounds
    for number, order in enumerate(shuffled_rounds(len(outcome), plan.seed)):
        if number >= rounds:
            share = 1.0
            if plan.seconds:
                share = (time.perf_counter() - began) / plan.seconds
            if share >= 1:
                break
            rounds = number + 1 if share > 0.9 else math.ceil(number / share)
        compute.append(read_compute())
        for turn, i in enumerate(order):
            outcome[i].timings.append(_time(outcome[i], number, plan))
            if progress:
                progress(number * len(outcome) + turn + 1, rounds * len(outcome))
    return compute


def _note_prompts(measured: Measured) -> None:
    """Notes how long prompts are. Raises UsageError where that is not what the setting says."""
    runtime = measured.system.runtime
    wanted = measured.setting.image_tokens
    # Where pictures have one size, so have prompts, all but their questions.
    requests = measured.requests if wanted is None else measured.requests[:1]
    ids = [prepare_prompt(runtime, [r.picture], r.question)[0].ids for r in requests]
    image = runtime.processor.tokens.image
    measured.prompt_tokens = max(len(prompt) for prompt in ids)
    measured.picture_tokens = [int((prompt == image).sum()) for prompt in ids]
    most = max(measured.picture_tokens)
    if wanted is not None and abs(most - wanted) > wanted / 10:
        raise UsageError(
            f"image_tokens {wanted}: {measured.system.name} gives such a picture "
            f"{most} visual tokens, since it scales pictures to sizes of its "
            "own; name a number that it can have"
        )


def _note_quality(alike: list[Measured], plan: Plan) -> None:
    """Compares the free answers of all systems in one setting."""
    options = [plan.options(m.system.runtime, m.setting) for m in alike]
    compared = qualities([m.system for m in alike], [m.requests for m in alike], options)
    for measured, quality in zip(alike, compared, strict=True):
        measured.quality = quality


def _note_memory(measured: Measured, shared: bool) -> None:
    measured.peak_rss_mb = measured.system.peak_rss_mb
    if measured.peak_rss_mb is None:
        measured.peak_rss_mb = peak_rss_mb()
        measured.rss_is_shared = shared


def _check(systems: list[System], requests: list[Request]) -> None:
    if not systems:
        raise UsageError("nothing to measure: name at least one bundle or checkpoint")
    if not requests:
        raise UsageError("nothing to ask: the list of requests is empty")
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two systems are called {name!r}: give each its own name")
