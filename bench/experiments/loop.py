"""What of a latent step and of a text step is the loop's own Python, and not one of the graphs.
Half a minute on two cores.

    lvr-lite export --synthetic qwen2-vl-2b q2b --precision int4
    python -m lvr_lite.bench.experiments.loop q2b

All calls into ONNX Runtime are timed; the rest of the time between two events of an answer is
Python's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.bench.experiments.runner import launch
from lvr_lite.export.parity import StartsWithLatents
from lvr_lite.generate.decode import Decoding, Options, Prompt
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle

LATENTS = 24
TOKENS = 24
PROMPT = 64
# Several events of one step come together.
SHORTEST = 1e-4


class Timed:
    """A session whose runs are timed: `seconds` of all sessions together."""

    seconds = 0.0

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        return self._time(self._session.run, *arguments)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self._time(self._session.run_with_iobinding, *arguments)

    @staticmethod
    def _time(call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            Timed.seconds += time.perf_counter() - began


class Reasoning(StartsWithLatents):
    """Without a copy of the logits after the first choice, which would be counted as Python's."""

    def head(self, hidden: np.ndarray) -> np.ndarray:
        if self._first:
            return super().head(hidden)
        return self._runtime.head(hidden)


def measure(runtime: OnnxRuntime) -> dict[str, np.ndarray]:
    """{kind of event: (N, 2) seconds of each step, whole and in the graphs} of one answer."""
    positions = np.broadcast_to(np.arange(PROMPT), (3, PROMPT)).astype(np.int64)
    features = np.zeros((0, runtime.hidden_size), np.float32)
    prompt = Prompt(np.full(PROMPT, 5, np.int64), features, positions)
    options = Options(max_tokens=TOKENS, min_tokens=TOKENS, steps=LATENTS)
    steps: dict[str, list[tuple[float, float]]] = {"latent": [], "token": []}
    began = time.perf_counter()
    graphs = Timed.seconds
    for event in Decoding(Reasoning(runtime, LATENTS), [prompt], options):
        now = time.perf_counter()
        if event.kind in steps and now - began > SHORTEST:
            steps[event.kind].append((now - began, Timed.seconds - graphs))
            began = now
            graphs = Timed.seconds
    return {kind: np.array(times) for kind, times in steps.items()}


def main(bundle: Path) -> None:
    runtime = OnnxRuntime(Bundle.open(bundle))
    graphs = {name: Timed(getattr(runtime, f"_{name}")) for name in ("decoder", "embed", "head")}
    timed = runtime.with_graphs(**graphs)
    # The first answer warms up.
    measure(timed)
    for kind, times in measure(timed).items():
        # Without the step in which this kind began.
        whole, inside = times[1:].T
        python = 1e6 * np.median(whole - inside)
        share = np.median(1 - inside / whole)
        print(f"{kind}: {1e3 * np.median(whole):.2f} ms, Python {python:.0f} µs = {share:.2%}")


if __name__ == "__main__":
    launch(main, __doc__)
