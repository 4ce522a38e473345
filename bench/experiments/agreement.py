"""How far bundles are from the torch checkpoint, on held-out scenes: tokens, hidden states through
the latent steps, accuracy.

    python -m lvr_lite.bench.experiments.agreement demo-out/checkpoint demo-out/int8 demo-out/int4
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lvr_lite.bench.experiments.runner import header, launch, row
from lvr_lite.eval.plan import load_suite
from lvr_lite.eval.score import is_correct
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Result, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.train import load

BATCH = 16


@dataclass(frozen=True)
class Answers:
    """Of one runtime to the same questions. accuracy: share of right ones."""

    results: list[Result]
    accuracy: float


def answer(runtime: Runtime, limit: int, seed: int) -> Answers:
    results: list[Result] = []
    right = 0
    items = load_suite("scenes", limit, seed)
    while group := list(islice(items, BATCH)):
        prompts = [prepare_prompt(runtime, pictures, s.question)[0] for s, pictures in group]
        decoded = decode(runtime, prompts, Options(max_tokens=16, keep_hidden=True))
        for (sample, _), result in zip(group, decoded, strict=True):
            right += is_correct(runtime.processor.text(result.tokens), sample.answer)
        results += decoded
    return Answers(results, right / len(results))


def same_tokens(reference: Answers, other: Answers) -> float:
    pairs = zip(reference.results, other.results, strict=True)
    return float(np.mean([a.tokens == b.tokens for a, b in pairs]))


def worst_differences(reference: Answers, other: Answers, steps: int) -> list[float]:
    """Largest relative difference of the states of the prompt, of <|lvr_start|> and of the `steps`
    latents, where both went through the loop.
    """
    both = [
        (a.hidden, b.hidden)
        for a, b in zip(reference.results, other.results, strict=True)
        if len(a.latents) == len(b.latents) == steps
    ]
    return [
        max(float(np.linalg.norm(b[i] - a[i]) / np.linalg.norm(a[i])) for a, b in both)
        for i in range(steps + 2)
    ]


def main(
    checkpoint: Path,
    bundles: list[Path],
    limit: int = 300,
    seed: int = 0,
) -> None:
    tuned = read_checkpoint(str(checkpoint))
    steps = tuned.latent.steps
    reference = answer(TorchRuntime(load.load_merged(tuned), tuned), limit, seed)
    count = len(reference.results)
    accuracy = f"torch fp32: accuracy {reference.accuracy:.4f}"
    print(f"{count} held-out scenes (seed {seed}); {accuracy}\n")
    states = [f"h{i}" for i in range(steps + 1)]
    worst = "hidden, worst relative: prefill"
    print(header(["bundle", "same tokens as torch", "accuracy", worst, *states]))
    for folder in bundles:
        answers = answer(OnnxRuntime(Bundle.open(folder)), limit, seed)
        differences = [f"{d:.1e}" for d in worst_differences(reference, answers, steps)]
        same = f"{same_tokens(reference, answers):.2%}"
        print(row([folder.name, same, f"{answers.accuracy:.4f}", *differences]), flush=True)


if __name__ == "__main__":
    launch(main, __doc__)
