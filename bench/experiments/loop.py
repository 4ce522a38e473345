"""What of a latent step and of a text step is the loop's own Python, and not one of the graphs.

    lvr-lite export --synthetic qwen2-vl-2b q2b --precision int4
    python docs/results/loop.py q2b        (half a minute on 2 cores)

All calls into ONNX Runtime are timed; the rest of the time between two events of a row is Python's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.generate.decode import Decoding, Options, Prompt
from lvr_lite.generate.onnx import OnnxRuntime

LATENTS, TOKENS, PROMPT = 24, 24, 64


class Timed:
    """A session whose runs are timed."""

    seconds = 0.0

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if name not in ("run", "run_with_iobinding"):
            return found

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*arguments)
            finally:
                Timed.seconds += time.perf_counter() - began

        return timed


class Reasoning:
    """A runtime whose first choice is to reason: random weights would not."""

    def __init__(self, runtime: OnnxRuntime) -> None:
        self._runtime, self._said = runtime, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = self._runtime.head(hidden)
        if not self._said:
            self._said, logits = True, np.array(logits)
            logits[:, self._runtime.tokens.lvr_start] = np.inf
        return logits


def main() -> None:
    runtime = OnnxRuntime(Path(sys.argv[1]))
    runtime = runtime.with_graphs(
        **{name: Timed(getattr(runtime, f"_{name}")) for name in ("decoder", "embed", "head")}
    )
    positions = np.broadcast_to(np.arange(PROMPT), (3, PROMPT)).astype(np.int64)
    prompt = Prompt(
        np.full(PROMPT, 5, np.int64), np.zeros((0, runtime.hidden_size), np.float32), positions
    )
    options = Options(max_tokens=TOKENS, min_tokens=TOKENS, steps=LATENTS)
    shares: dict[str, list[tuple[float, float]]] = {"latent": [], "token": []}
    for _ in range(2):  # the first one warms up
        at, graphs = time.perf_counter(), Timed.seconds
        for event in Decoding(Reasoning(runtime), [prompt], options):
            now = time.perf_counter()
            if event.kind in shares and now - at > 1e-4:  # several events of one step come together
                shares[event.kind].append((now - at, Timed.seconds - graphs))
                at, graphs = now, Timed.seconds
    for kind, found in shares.items():
        whole, inside = np.array(
            found[len(found) // 2 + 1 :]
        ).T  # of the second time, without the step in which it began
        own, share = np.median(whole - inside), np.median(1 - inside / whole)
        print(f"{kind}: {1e3 * np.median(whole):.2f} ms, Python {1e6 * own:.0f} µs = {share:.2%}")


if __name__ == "__main__":
    main()
