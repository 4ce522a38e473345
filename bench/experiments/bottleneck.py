"""Text steps after the latents, open against bottleneck, by size of the picture: the same weights,
measured by turns.

    python -m lvr_lite.bench.experiments.bottleneck BUNDLE --rounds 20 --threads 2

The mode is all that differs. Pictures are noise of 224, 448 and 896 px (64, 256 and 1,024 visual
tokens); every answer opens the loop and has 32 tokens.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from lvr_lite.bench.experiments.runner import Rounds, Threads, launch, table, write_results
from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle

# Visual tokens: pixels a side.
SIZES = {64: 224, 256: 448, 1024: 896}
MODES = ("open", "bottleneck")
TITLES = (
    "visual tokens",
    "text step, open, ms",
    "bottleneck, ms",
    "open / bottleneck",
    "second reading, ms",
    "latent step, ms",
)
TOKENS = 32
WARMUP = 2


@dataclass(frozen=True)
class Times:
    """Seconds of each step of one mode at one size. hand_over: the second reading, once an
    answer.
    """

    text: list[float] = field(default_factory=list)
    latent: list[float] = field(default_factory=list)
    hand_over: list[float] = field(default_factory=list)

    def take(self, runtime: OnnxRuntime, prompt: Prompt) -> None:
        """Measure one answer."""
        steps = runtime.latent.steps or 4
        options = Options(max_tokens=TOKENS, min_tokens=TOKENS)
        decoding = Decoding(StartsWithLatents(runtime, steps), [prompt], options)
        list(decoding)
        # The first steps after a prefill run on cold caches, in both modes.
        self.text.extend(decoding.clock.text_step[-TOKENS // 2 :])
        self.latent.extend(decoding.clock.latent_step)
        self.hand_over.append(decoding.clock.hand_over)


@dataclass(frozen=True)
class Medians:
    """At one size of the picture. Steps in ms; `hand_over_ms` and `latent_ms` of the bottleneck."""

    visual_tokens: int
    open_text_ms: float
    text_ms: float
    ratio: float
    hand_over_ms: float
    latent_ms: float


def open_bundle(bundle: Path, mode: str, threads: int | None) -> OnnxRuntime:
    runtime = OnnxRuntime(Bundle.open(bundle), threads)
    runtime.processor = runtime.processor.with_max_pixels(max(SIZES.values()) ** 2)
    runtime.latent = replace(runtime.latent, mode=mode)
    return runtime


def measure(runtimes: dict[str, OnnxRuntime], prompt: Prompt, rounds: int) -> dict[str, Times]:
    """The times of each mode, in an order shuffled each round."""
    times = {mode: Times() for mode in runtimes}
    for number in range(rounds + WARMUP):
        for mode in random.Random(number).sample(list(runtimes), len(runtimes)):
            kept = times[mode] if number >= WARMUP else Times()
            kept.take(runtimes[mode], prompt)
    return times


def main(
    bundle: Path,
    rounds: Rounds = 20,
    threads: Threads = None,
    json: Path | None = None,
) -> None:
    runtimes = {mode: open_bundle(bundle, mode, threads) for mode in MODES}
    rng = np.random.default_rng(0)
    rows = []
    for visual, side in SIZES.items():
        picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        prompt, _ = prepare_prompt(runtimes["open"], [picture], "what is here")
        assert len(prompt.features) == visual
        opened, closed = measure(runtimes, prompt, rounds).values()
        times = (opened.text, closed.text, closed.hand_over, closed.latent)
        text, after, hand_over, latent = (1e3 * statistics.median(each) for each in times)
        rows.append(
            Medians(
                visual_tokens=visual,
                open_text_ms=text,
                text_ms=after,
                ratio=text / after,
                hand_over_ms=hand_over,
                latent_ms=latent,
            )
        )
    print(table(TITLES, [[f"{value:.4g}" for value in astuple(medians)] for medians in rows]))
    if json is not None:
        write_results(json, {"rows": rows}, threads)


if __name__ == "__main__":
    launch(main, __doc__)
