"""What flows into each weight of an fp32 decoder on calibration prompts: the sums of products that
GPTQ rounds by. May import: numpy, onnx and what stands above `quant`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lvr_lite.export import onnxfile
from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.generate.decode import Decoding, Options, Prompt
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import Bundle
from lvr_lite.quant import answers

# Inputs of a weight that are multiplied with themselves at once.
ROWS = 2048


@dataclass(frozen=True)
class Reading:
    """A sequence that a decoder reads in one go, and the states that fp32 makes of it.

    prompt: index of the prompt that it belongs to (a bottleneck reads each twice).
    ids: (S,) int64; visual tokens and latents have their placeholders.
    call: inputs of the first layer, without K/V.
    states: (S, H) float32, after the last norm.
    """

    prompt: int
    ids: np.ndarray
    call: LayerCall
    states: np.ndarray


class Products(Mapping[str, np.ndarray]):
    """{"decoder/" + weight: sum of x xᵀ over all inputs x of that weight}, (K, K) float64. For
    "lm_head/…" and "embed_tokens/…" it is that of the states which the head reads.

    Prompts, the model's own latents and its answers are all read, layer by layer: one layer is in
    memory, and its products are there until those of another are asked for. Asking in the order of
    layers costs one pass.
    """

    def __init__(self, runtime: Runtime, prompts: list[Prompt], source: Bundle) -> None:
        """runtime: reasons and answers; source: the fp32 bundle whose weights are watched."""
        recorder = _Recorder(runtime)
        # The prompt of each sequence.
        self._prompts: list[int] = []
        for i, prompt in enumerate(prompts):
            for _ in Decoding(recorder, [prompt], Options(max_tokens=answers.TOKENS)):
                pass
            self._prompts += [i] * (len(recorder.sequences) - len(self._prompts))
        self._first_calls = [sequence.call(runtime.hidden_size) for sequence in recorder.sequences]
        self._ids = [np.concatenate(sequence.ids) for sequence in recorder.sequences]
        file = source.path("decoder")
        self._folder = file.parent
        self._model = onnxfile.load(file)
        self._decoder = DecoderLayers(source)
        self._count = source.manifest.decoder.layers
        # {key: index of its layer}
        self._layers: dict[str, int] = {}
        for tensor in self._model.graph.initializer:
            layer = re.search(r"\.layers\.(\d+)\.", tensor.name)
            if layer and len(tensor.dims) == 2:
                self._layers[f"decoder/{tensor.name}"] = int(layer.group(1))
        self._restart()

    def _restart(self) -> None:
        self._next = 0
        self._calls = self._first_calls
        self._products: dict[str, np.ndarray] = {}
        # {weights that read the same inputs: these inputs, until there are enough}
        self._waiting: dict[tuple[str, ...], list[np.ndarray]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, key: object) -> bool:
        if key in self._layers:
            return True
        graph, _, _ = str(key).partition("/")
        return graph in ("lm_head", "embed_tokens")

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            raise KeyError(key)
        name = key
        layer = self._layers.get(key)
        if layer is None:
            name = "states"
            layer = self._count
        if layer < self._next - 1:
            self._restart()
        while self._next <= layer:
            self._advance()
        return np.asarray(self._products[name])

    def readings(self) -> list[Reading]:
        """All that was read, and what came of it. A whole pass, unless one has just been made."""
        if self._next < self._count:
            self["lm_head/"]
        parts = zip(self._prompts, self._ids, self._first_calls, self._states(), strict=True)
        return [Reading(*part) for part in parts]

    def _advance(self) -> None:
        """Run the next layer, or, after the last one, what the head reads."""
        self._products = {}
        if self._next == self._count:
            states = np.concatenate(self._states())
            self._products["states"] = _squared(states)
        else:
            calls = [[replace(call, added=self._added(call))] for call in self._calls]
            outputs = self._decoder.run_all(self._next, calls, self._watch)
            for readers in list(self._waiting):
                self._multiply(readers)
            self._calls = [
                replace(call, hidden=hidden)
                for call, (hidden,) in zip(self._calls, outputs, strict=True)
            ]
        self._next += 1

    def _states(self) -> list[np.ndarray]:
        return [self._normed(call.hidden[0]) for call in self._calls]

    def _added(self, call: LayerCall) -> np.ndarray | None:
        """What is added after the next layer, of what is added after any (deepstack)."""
        width = call.hidden.shape[-1]
        first = self._next * width
        if call.added is None or first >= call.added.shape[-1]:
            return None
        return call.added[..., first : first + width]

    def _normed(self, states: np.ndarray) -> np.ndarray:
        """The decoder's last norm."""
        graph = self._model.graph
        node = next(n for n in graph.node if "last_hidden_state" in n.output)
        scale = next(t for t in graph.initializer if t.name == node.input[1])
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        mean_square = np.square(states).mean(-1, keepdims=True)
        size = np.sqrt(mean_square + epsilon)
        weight = onnxfile.read(scale, self._folder)
        return np.asarray(states / size * weight)

    def _watch(self, readers: tuple[str, ...], rows: np.ndarray) -> None:
        waiting = self._waiting.setdefault(readers, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= ROWS:
            self._multiply(readers)

    def _multiply(self, readers: tuple[str, ...]) -> None:
        waiting = self._waiting.pop(readers)
        product = _squared(np.concatenate(waiting))
        keys = [f"decoder/{name}" for name in readers]
        if keys[0] in self._products:
            # One array for all of them.
            self._products[keys[0]] += product
        else:
            self._products |= dict.fromkeys(keys, product)


def _squared(rows: np.ndarray) -> np.ndarray:
    """The sum of x xᵀ over rows x (N, K): (K, K) float64."""
    product = rows.T @ rows
    return np.asarray(product, np.float64)


class _Sequence:
    """What a decoder is fed from the first position on.

    ids: (S,) int64 of each call.
    embeds: (1, S, H) of each call, or wider where visual tokens have a part for later layers.
    positions: (3, 1, S) of each call.
    """

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.embeds: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []

    def call(self, width: int) -> LayerCall:
        """All of it in one call; width: hidden size."""
        widest = max(part.shape[-1] for part in self.embeds)
        padded = []
        for part in self.embeds:
            missing = widest - part.shape[-1]
            padded.append(np.pad(part, ((0, 0), (0, 0), (0, missing))))
        embeds = np.concatenate(padded, 1)
        added = None
        if widest > width:
            added = embeds[..., width:]
        return LayerCall(
            hidden=embeds[..., :width].copy(),
            positions=np.concatenate(self.positions, 2),
            totals=np.array([embeds.shape[1]]),
            added=added,
        )


class _Recorder:
    """A runtime that keeps what its decoder is fed, one prompt at a time. A new sequence begins
    where K/V is dropped.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        # Ids that were embedded, until they are fed.
        self._embedded: np.ndarray | None = None
        self.sequences: list[_Sequence] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        self._embedded = ids[0].copy()
        return self._runtime.embed(ids)

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        assert not past, "calibration reads every prompt from its beginning"
        self.sequences.append(_Sequence())
        self._record(embeds, positions)
        return self._runtime.prefill(embeds, positions, lengths, rows)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._record(embeds[:, None], np.broadcast_to(positions, (3, 1))[..., None])
        # A copy: the states that came out of the last step are not fed back in place.
        return self._runtime.step(np.array(embeds), positions)

    def _record(self, embeds: np.ndarray, positions: np.ndarray) -> None:
        ids = self._embedded
        self._embedded = None
        if ids is None:
            # Nothing was embedded for this call, so it is fed a latent.
            ids = np.array([self._runtime.processor.tokens.lvr])
        sequence = self.sequences[-1]
        sequence.ids.append(ids)
        sequence.embeds.append(np.array(embeds))
        sequence.positions.append(np.array(positions))
