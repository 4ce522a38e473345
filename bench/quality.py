"""Whether systems that are measured beside each other give the same answers. May import: numpy,
generate/.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lvr_lite.bench.plan import Request, System
from lvr_lite.bench.record import Quality
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Result, decode


def qualities(
    systems: Sequence[System],
    requests: Sequence[Sequence[Request]],
    options: Sequence[Options],
) -> list[Quality | None]:
    """Every system's free answers to its own form of the same requests, against those of the first
    exact system where there is one, else of the first; None for a single system that is not exact.
    """
    first = next((i for i, system in enumerate(systems) if system.exact), 0)
    if len(systems) == 1 and not systems[0].exact:
        return [None]
    answers = [
        [_answer(system, request, how) for request in own]
        for system, own, how in zip(systems, requests, options, strict=True)
    ]
    return [compare_answers(systems[first].name, answers[first], own) for own in answers]


def _answer(system: System, request: Request, options: Options) -> Result:
    prompt, _ = prepare_prompt(system.runtime, [request.picture], request.question)
    return decode(system.runtime, [prompt], options)[0]


def compare_answers(reference: str, want: Sequence[Result], got: Sequence[Result]) -> Quality:
    """Quality of the answers `got` beside `want`, those of the system called `reference`, to the
    same requests.
    """
    same = 0
    places = 0
    by_step: dict[int, list[float]] = {}
    for wanted, other in zip(want, got, strict=True):
        tokens = zip(wanted.tokens, other.tokens, strict=False)
        same += sum(a == b for a, b in tokens)
        places += max(len(wanted.tokens), len(other.tokens))
        latents = zip(wanted.latents, other.latents, strict=False)
        for step, (a, b) in enumerate(latents):
            # Another model, of another width, has no common latents.
            if a.shape == b.shape:
                cosines = by_step.setdefault(step, [])
                cosines.append(_cosine(a, b))
    agreement = 1.0
    if places:
        agreement = same / places
    return Quality(
        reference=reference,
        n=len(want),
        token_agreement=agreement,
        latent_cosine=[float(np.mean(by_step[step])) for step in sorted(by_step)],
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    product = a @ b
    return float(product / max(norms, 1e-30))
