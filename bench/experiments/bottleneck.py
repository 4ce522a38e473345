"""Text steps after the latents, open against bottleneck, by size of the picture: same weights,
interleaved.

    python docs/results/bottleneck.py BUNDLE [--rounds 20] [--threads N] [--json FILE]

The mode is all that differs. Pictures are noise of 224, 448 and 896 px (64, 256 and 1,024 visual
tokens), every row is made to open the loop and to say 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options
from lvr_lite.generate.onnx import OnnxRuntime

SIZES = {64: 224, 256: 448, 1024: 896}  # visual tokens: pixels a side
TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    runtimes = {}
    for mode in ("open", "bottleneck"):
        runtime = OnnxRuntime(a.bundle, a.threads)
        runtime.image_spec = runtime.image_spec | {"max_pixels": 896 * 896}
        runtime.latent = replace(runtime.latent, mode=mode)
        runtimes[mode] = runtime
    steps = runtimes["open"].latent.steps or 4
    rng = np.random.default_rng(0)
    found: Any = {
        m: {n: {"text": [], "hand_over": [], "latent": []} for n in SIZES} for m in runtimes
    }
    for visual, side in SIZES.items():
        picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        prompt, _ = prepare_prompt(runtimes["open"], [picture], "what is here")
        assert len(prompt.features) == visual
        for round_ in range(a.rounds + 2):
            for mode in random.Random(round_).sample(list(runtimes), len(runtimes)):
                decoding = Decoding(
                    StartsWithLatents(runtimes[mode], steps),
                    [prompt],
                    Options(max_tokens=TOKENS, min_tokens=TOKENS),
                )
                list(decoding)
                if round_ >= 2:
                    here = found[mode][visual]
                    # the first steps after a prefill run on cold caches, in both modes
                    here["text"] += decoding.clock.text_step[-TOKENS // 2 :]
                    here["latent"] += decoding.clock.latent_step
                    here["hand_over"].append(decoding.clock.hand_over)
    rows: list[dict[str, Any]] = []
    print(
        "| visual tokens | text step, open, ms | bottleneck, ms | open / bottleneck | second reading, ms | latent step, ms |"
    )
    print("|---|---|---|---|---|---|")
    for visual in SIZES:
        middle = {
            m: {k: 1e3 * statistics.median(v) for k, v in found[m][visual].items()}
            for m in runtimes
        }
        both = middle["open"]["text"], middle["bottleneck"]["text"]
        rows.append(
            {
                "visual_tokens": visual,
                "text_step_ms": dict(zip(runtimes, both, strict=True)),
                "ratio": both[0] / both[1],
            }
        )
        rows[-1] |= {
            "hand_over_ms": middle["bottleneck"]["hand_over"],
            "latent_step_ms": middle["bottleneck"]["latent"],
        }
        print(f"| {visual} | {both[0]:.3f} | {both[1]:.3f} | {both[0] / both[1]:.2f} | ", end="")
        print(f"{middle['bottleneck']['hand_over']:.2f} | {middle['bottleneck']['latent']:.3f} |")
    if a.json:
        a.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
