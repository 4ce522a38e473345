"""One request, or one batch, timed by stage. May import: generate/, what stands above it.

A sample is one duration in ms: of a request (preprocess, vision, embed, prefill, TTFT, …) or of one
step in it (latent_step, text_step, …).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lvr_lite.bench.machine import read_joules
from lvr_lite.bench.plan import Plan, Request, Setting
from lvr_lite.errors import UsageError
from lvr_lite.generate.ask import PictureCache, Seconds
from lvr_lite.generate.decode import Clock, Decoding, Event, Options, Result
from lvr_lite.generate.runtime import Runtime

# Stages and latencies of single steps.
STEP_STAGES = ("latent_step", "text_step", "lm_head", "sampling")
STEP_LATENCIES = ("tpls", "tpot")


@dataclass(frozen=True)
class Timing:
    """One request, or one batch, timed.

    stages, latencies: {name: samples in ms}.
    spent: {stage: ms of the whole}.
    tokens: the answers' ids, one after another.
    joules: what the processor took meanwhile, where the machine says.
    latents: latent steps that each answer took.
    """

    stages: dict[str, list[float]]
    latencies: dict[str, list[float]]
    spent: dict[str, float]
    tokens: list[int]
    joules: float | None = None
    latents: list[int] = field(default_factory=list)


def time_round(
    runtime: Runtime,
    requests: list[Request],
    plan: Plan,
    setting: Setting,
) -> Timing:
    """One batch of requests as the model answers it, with what a single step costs taken from a
    second one that has as many latent steps as tokens; of a single request also the time to the
    first token of another question about its picture (`ttft_again`).

    The first steps after a prefill find the caches full of other data and are up to twice as slow.
    Latents come first and are few, so in one natural request they would bear all of that and text
    tokens none: TPLS and TPOT could not be compared.
    """
    cache = PictureCache(runtime)
    options = replace(plan.options(runtime, setting), min_tokens=plan.tokens)
    before = read_joules()
    timing = time_request(runtime, cache, requests, options)
    after = read_joules()
    _refuse_false_claim(runtime, options, timing)
    joules = None
    if before is not None and after is not None:
        joules = after - before
    stages = timing.stages
    latencies = timing.latencies
    if setting.batch == 1:
        one_token = replace(options, max_tokens=1, min_tokens=1)
        again = time_request(runtime, cache, requests, one_token)
        latencies = latencies | {"ttft_again": again.latencies["ttft"]}
    if 0 < len(timing.stages["latent_step"]) < plan.tokens:
        even = time_request(
            runtime=runtime,
            cache=cache,
            requests=requests,
            options=replace(options, steps=plan.tokens),
        )
        stages = stages | {name: even.stages[name] for name in STEP_STAGES}
        latencies = latencies | {name: even.latencies[name] for name in STEP_LATENCIES}
    return replace(timing, stages=stages, latencies=latencies, joules=joules)


def _refuse_false_claim(runtime: Runtime, options: Options, timing: Timing) -> None:
    """Raises UsageError where latent steps were asked for and an answer did not take them: its
    times would stand under a name that is not theirs.
    """
    claimed = options.steps_of(runtime)
    asked = options.steps or options.look == "always"
    if not asked or timing.latents == [claimed] * len(timing.latents):
        return
    few = min(timing.latents)
    raise UsageError(
        f"{runtime.name}: {claimed} latent steps were asked for, and an answer took {few}: leave "
        f"out --look {options.look}, or --steps"
    )


def time_request(
    runtime: Runtime,
    cache: PictureCache,
    requests: list[Request],
    options: Options,
) -> Timing:
    """Answer a batch of requests from their arrival to the last token, timed by stage.

    TTFT and TTFA count from the arrival of pictures and text to the last row's. TPLS is a latent
    step: the decoder without the head. TPOT is the time from one text token of the first row to its
    next (embedding, text step, head, sampling and what the loop adds), so an answer of n tokens
    gives n - 1 samples, less one where latents lie between.
    """
    arrived = time.perf_counter()
    prepared = [cache.prepare_prompt([request.picture], request.question) for request in requests]
    decoding = Decoding(runtime, [prompt for prompt, _ in prepared], options)
    ready = time.perf_counter() - arrived
    events = list(decoding)
    whole = time.perf_counter() - arrived
    before = Seconds(
        sum(seconds.preprocess for _, seconds in prepared),
        sum(seconds.vision for _, seconds in prepared),
    )
    return _timing(
        before=before,
        ready=ready,
        clock=decoding.clock,
        events=events,
        results=decoding.results,
        whole=whole,
    )


def _timing(
    before: Seconds,
    ready: float,
    clock: Clock,
    events: list[Event],
    results: list[Result],
    whole: float,
) -> Timing:
    """Samples in ms from what one decoding left. The stage `embed` is the prompt's embedding; that
    of single tokens is part of TPOT.

    before: of preparing the prompts. ready, whole: seconds from the arrival until decoding began
    and until it ended.
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
    ttft = [result.ttft for result in results if result.ttft is not None]
    ttfa = [result.ttfa for result in results if result.ttfa is not None]
    latencies = {
        "ttft": [ready + max(ttft)] if ttft else [],
        "ttft_again": [],
        "ttfa": [ready + max(ttfa)] if ttfa else [],
        "tpls": clock.latent_step,
        "tpot": between_tokens(events),
        "end_to_end": [whole],
    }
    spent = {name: sum(samples) for name, samples in stages.items()} | {"embed": sum(clock.embed)}
    return Timing(
        stages={name: _ms(samples) for name, samples in stages.items()},
        latencies={name: _ms(samples) for name, samples in latencies.items()},
        spent={name: seconds * 1e3 for name, seconds in spent.items()},
        tokens=[token for result in results for token in result.tokens],
        latents=[len(result.latents) for result in results],
    )


def _ms(seconds: Sequence[float]) -> list[float]:
    return [s * 1e3 for s in seconds]


def between_tokens(events: list[Event]) -> list[float]:
    """Seconds between text tokens of the first row that follow each other without latents between
    them.
    """
    first_row = [event for event in events if event.row == 0]
    pairs = itertools.pairwise(first_row)
    return [later.at - event.at for event, later in pairs if event.kind == later.kind == "token"]
