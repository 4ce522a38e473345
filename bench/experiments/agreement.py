"""How far bundles are from the torch checkpoint, on held-out scenes: tokens, hidden states through
the latent steps, accuracy.

.venv/bin/python docs/results/agreement.py demo-out/checkpoint demo-out/fp32 demo-out/int8
demo-out/int4 --limit 300
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.eval import score
from lvr_lite.eval.suite import load_suite
from lvr_lite.generate.ask import prepare_prompt, text_of
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import TorchRuntime
from lvr_lite.model.checkpoint import read_checkpoint
from lvr_lite.train import load as nf4


def answers(runtime: Runtime, limit: int, seed: int, batch: int = 16) -> list[dict[str, Any]]:
    """Tokens, latent and all hidden states, and correctness of each question."""
    out = []
    items = load_suite("scenes", limit, seed)
    while group := list(islice(items, batch)):
        prompts = [
            prepare_prompt(runtime, pictures, sample.question)[0] for sample, pictures in group
        ]
        for (sample, _), result in zip(
            group, decode(runtime, prompts, Options(max_tokens=16, keep_hidden=True)), strict=True
        ):
            right = score.is_correct(text_of(runtime, result), sample.answer)
            out.append(
                {
                    "tokens": result.tokens,
                    "hidden": np.array(result.hidden),
                    "latents": len(result.latents),
                    "right": right,
                }
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    checkpoint = read_checkpoint(a.checkpoint)
    reference = answers(TorchRuntime(nf4.load_merged(checkpoint), checkpoint), a.limit, a.seed)
    steps = checkpoint.latent.steps
    print(
        f"{len(reference)} held-out scenes (seed {a.seed}); torch fp32: accuracy {np.mean([r['right'] for r in reference]):.4f}\n"
    )
    states = " | ".join(f"h{i}" for i in range(steps + 1))
    print(
        f"| bundle | same tokens as torch | accuracy | hidden, worst relative: prefill | {states} |"
    )
    print("|---" * (steps + 5) + "|")
    for folder in a.bundles:
        got = answers(OnnxRuntime(folder), a.limit, a.seed)
        same = np.mean([r["tokens"] == g["tokens"] for r, g in zip(reference, got, strict=True)])
        # states of the prompt, of <|lvr_start|> and of the K latents, where both went through the
        # loop
        both = [
            (r["hidden"], g["hidden"])
            for r, g in zip(reference, got, strict=True)
            if r["latents"] == g["latents"] == steps
        ]
        worst = [
            max(float(np.linalg.norm(g[i] - r[i]) / np.linalg.norm(r[i])) for r, g in both)
            for i in range(steps + 2)
        ]
        accuracy = np.mean([g["right"] for g in got])
        print(
            f"| {folder.name} | {same:.2%} | {accuracy:.4f} | "
            + " | ".join(f"{w:.1e}" for w in worst)
            + " |"
        )


if __name__ == "__main__":
    main()
