"""What quantization costs on a calibration set: answers and latents against the fp32 bundle's; and
what flows into each weight.

May import: numpy, the core.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lvr_lite.data.sources import open_source
from lvr_lite.errors import DataError
from lvr_lite.export import onnxfile
from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Decoding, Options, Prompt, Result
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle

SEED = 90_001  # of the scenes, of the training split
BATCH = 16  # prompts decoded together
TOKENS = 24  # text tokens of an answer at most
ROWS = 2048  # inputs of a weight multiplied with themselves at once


def load_prompts(runtime: OnnxRuntime, data: str, count: int) -> list[Prompt]:
    """`count` prompts: "scenes" (drawn, of the training split), or a file of samples. Raises
    DataError for a file without samples.
    """
    source = open_source(data, "train", SEED, count, registered=("scenes",))
    if not len(source):
        raise DataError(f"{data}: holds no samples; --calibration needs some")
    return [
        prepare_prompt(runtime, list(pictures), sample.question)[0]
        for sample, pictures in source.items()
    ]


@dataclass(frozen=True)
class Said:
    """What the fp32 bundle answered: the choices that lead there, the log-probabilities (V,) at
    each, and the states at each step.
    """

    choices: list[int]
    log_probabilities: list[np.ndarray]
    hidden: list[np.ndarray]
    latents: int


class _Scripted:
    """A runtime whose head keeps the logits of each row, and, given a script, makes each row choose
    by it.
    """

    def __init__(self, runtime: Any, scripts: Sequence[Sequence[int]] | None) -> None:
        self._runtime, self._scripts = runtime, scripts
        self.logits: dict[int, list[np.ndarray]] = {}
        self.decoding: Decoding | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        assert self.decoding is not None
        logits = np.array(self._runtime.head(hidden))
        speaking = [i for i, row in enumerate(self.decoding.rows) if row.state == "text"]
        for place, row in enumerate(speaking):
            kept = self.logits.setdefault(row, [])
            kept.append(logits[place].copy())
            if self._scripts is not None:
                logits[place] = -np.inf
                logits[place, self._scripts[row][len(kept) - 1]] = 0
        return logits


def _decode(
    runtime: Any, prompts: list[Prompt], scripts: Sequence[Sequence[int]] | None
) -> list[tuple[Result, list[np.ndarray]]]:
    scripted = _Scripted(runtime, scripts)
    decoding = scripted.decoding = Decoding(
        scripted, prompts, Options(max_tokens=TOKENS, keep_hidden=True)
    )
    for _ in decoding:
        pass
    return [
        (result, [_log_softmax(x) for x in scripted.logits[i]])
        for i, result in enumerate(decoding.results)
    ]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max()
    return np.asarray(x - np.log(np.exp(x).sum()), np.float32)


def _batches(prompts: Sequence[Prompt]) -> Iterator[slice]:
    for first in range(0, len(prompts), BATCH):
        yield slice(first, first + BATCH)


def listen(runtime: OnnxRuntime, prompts: list[Prompt]) -> list[Said]:
    """What a bundle answers by itself."""
    found = []
    for part in _batches(prompts):
        for result, scores in _decode(runtime, prompts[part], None):
            start = [runtime.processor.tokens.lvr_start] if result.latents else []
            end = [runtime.processor.tokens.end[0]] if result.reason == "stop" else []
            found.append(
                Said([*start, *result.tokens, *end], scores, result.hidden, len(result.latents))
            )
    return found


def loss(runtime: OnnxRuntime, prompts: list[Prompt], reference: list[Said]) -> dict[str, float]:
    """How far a bundle is from what the fp32 one said, made to choose the same tokens, but fed with
    its own latents.

    kl: mean KL divergence of its distributions from fp32's, in nats, over all choices. drift: mean
    of 1 - cosine of its latents to fp32's, over all steps. loss: their sum.
    """
    divergences, gaps = [], []
    for part in _batches(prompts):
        wanted = reference[part]
        for (result, scores), said in zip(
            _decode(runtime, prompts[part], [s.choices for s in wanted]), wanted, strict=True
        ):
            for mine, theirs in zip(scores, said.log_probabilities, strict=True):
                divergences.append(float((np.exp(theirs) * (theirs - mine)).sum()))
            # the state after the prompt chose <|lvr_start|>; those of the latent steps come next
            first = 1
            for step in range(first, first + said.latents):
                a, b = said.hidden[step], result.hidden[step]
                gaps.append(
                    1 - float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)
                )
    kl, drift = float(np.mean(divergences)), float(np.mean(gaps)) if gaps else 0.0
    return {"kl": kl, "drift": drift, "loss": kl + drift}


@dataclass(frozen=True)
class Reading:
    """What a decoder reads in one go, and what fp32 makes of it. prompt: which one it belongs to (a
    bottleneck reads each twice). ids (S,), those of a picture and of latents their placeholders; a
    call without K/V; states (S, H) after the last norm.
    """

    prompt: int
    ids: np.ndarray
    call: LayerCall
    states: np.ndarray


class Products(Mapping[str, np.ndarray]):
    """{"decoder/" + weight: sum of x xᵀ over all inputs x of a weight of an fp32 decoder, float64
    (K, K)}, on calibration prompts; for "lm_head/…" and "embed_tokens/…" that of the states which
    the head reads.

    Prompts, the model's own latents and its answers are all read, layer by layer: one layer is in
    memory, and its products are there until those of another are asked for. Asking in the order of
    layers costs one pass.
    """

    def __init__(
        self, runtime: OnnxRuntime, prompts: list[Prompt], source: Path | None = None
    ) -> None:
        """runtime: what reasons and answers; source: the fp32 bundle, `runtime`'s own where it is
        that.
        """
        source = source or runtime.bundle.folder
        recorder = _Recorder(runtime)
        self._prompts: list[int] = []  # of each sequence
        for i, prompt in enumerate(prompts):
            for _ in Decoding(recorder, [prompt], Options(max_tokens=TOKENS)):
                pass
            self._prompts += [i] * (len(recorder.ids) - len(self._prompts))
        self._begin, self._ids = recorder.sequences, [np.concatenate(read) for read in recorder.ids]
        bundle = Bundle.open(source, check=False)
        self._layers = DecoderLayers(bundle)
        self._model = onnxfile.load(bundle.path("decoder"))
        self._at = source / "onnx"
        matrices = [t.name for t in self._model.graph.initializer if len(t.dims) == 2]
        places = [(name, re.search(r"\.layers\.(\d+)\.", name)) for name in matrices]
        self._layer = {f"decoder/{name}": int(place.group(1)) for name, place in places if place}
        self._last = runtime.bundle.manifest.decoder.layers
        self._restart()

    def _restart(self) -> None:
        self._next, self._calls = 0, self._begin
        self._held: dict[str, np.ndarray] = {}
        self._waiting: dict[
            tuple[str, ...], list[np.ndarray]
        ] = {}  # inputs that several weights read, until there are enough

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer)

    def __len__(self) -> int:
        return len(self._layer)

    def __contains__(self, key: object) -> bool:
        return key in self._layer or str(key).split("/")[0] in ("lm_head", "embed_tokens")

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            raise KeyError(key)
        layer = self._layer.get(key, self._last)
        if layer < self._next - 1:
            self._restart()
        while self._next <= layer:
            self._advance()
        return np.asarray(self._held[key if key in self._layer else "states"])

    def _advance(self) -> None:
        self._held = {}
        if self._next == self._last:
            states = np.concatenate(self._last_states())
            self._held["states"] = (states.T @ states).astype(np.float64)
        else:
            calls = [[replace(call, added=self._of_layer(call.added))] for call in self._calls]
            after = self._layers.run_all(self._next, calls, self._add)
            for readers in list(self._waiting):
                self._multiply(readers)
            self._calls = [
                replace(call, hidden=hidden)
                for call, (hidden,) in zip(self._calls, after, strict=True)
            ]
        self._next += 1

    def readings(self) -> list[Reading]:
        """All that was read, and what came of it. A whole pass, unless one has just been made."""
        if self._next < self._last:
            self["lm_head/"]
        return [
            Reading(*kept)
            for kept in zip(self._prompts, self._ids, self._begin, self._last_states(), strict=True)
        ]

    def _last_states(self) -> list[np.ndarray]:
        return [self._normed(call.hidden[0]) for call in self._calls]

    def _of_layer(self, added: np.ndarray | None) -> np.ndarray | None:
        """What is added after this layer, of what is added after any (deepstack)."""
        width = self._begin[0].hidden.shape[-1]
        first = self._next * width
        return (
            None if added is None or first >= added.shape[-1] else added[..., first : first + width]
        )

    def _normed(self, states: np.ndarray) -> np.ndarray:
        node = next(n for n in self._model.graph.node if "last_hidden_state" in n.output)
        scale = next(t for t in self._model.graph.initializer if t.name == node.input[1])
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        size = np.sqrt(np.square(states).mean(-1, keepdims=True) + epsilon)
        return np.asarray(states / size * onnxfile.read(scale, self._at))

    def _add(self, readers: tuple[str, ...], rows: np.ndarray) -> None:
        waiting = self._waiting.setdefault(readers, [])
        waiting.append(rows)
        if sum(map(len, waiting)) >= ROWS:
            self._multiply(readers)

    def _multiply(self, readers: tuple[str, ...]) -> None:
        rows = np.concatenate(self._waiting.pop(readers))
        first, product = f"decoder/{readers[0]}", (rows.T @ rows).astype(np.float64)
        if first in self._held:
            self._held[first] += product
        else:
            self._held |= dict.fromkeys((f"decoder/{name}" for name in readers), product)


class _Recorder:
    """A runtime that keeps what its decoder is fed, one prompt at a time: each sequence as one
    call, as if all of it had been known.

    A new sequence begins where K/V is dropped.
    """

    def __init__(self, runtime: OnnxRuntime) -> None:
        self._runtime = runtime
        self._fed: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.ids: list[list[np.ndarray]] = []
        self._embedded: np.ndarray | None = None  # ids, until they are fed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        self._embedded = ids[0].copy()
        return np.asarray(self._runtime.embed(ids))

    def _taken(self) -> np.ndarray:
        """The ids that were embedded for this call; a latent where none were."""
        ids, self._embedded = self._embedded, None
        return np.array([self._runtime.processor.tokens.lvr]) if ids is None else ids

    @property
    def sequences(self) -> list[LayerCall]:
        calls, width = [], self._runtime.hidden_size
        for fed in self._fed:
            widest = max(
                embeds.shape[-1] for embeds, _ in fed
            )  # of visual tokens that have a part for later layers
            embeds = np.concatenate(
                [np.pad(e, ((0, 0), (0, 0), (0, widest - e.shape[-1]))) for e, _ in fed], 1
            )
            positions = np.concatenate([p for _, p in fed], 2)
            added = embeds[..., width:] if widest > width else None
            calls.append(
                LayerCall(embeds[..., :width].copy(), positions, np.array([embeds.shape[1]]), added)
            )
        return calls

    def prefill(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        rows: list[int] | None = None,
        past: int = 0,
    ) -> np.ndarray:
        assert not past, "calibration reads every prompt from its beginning"
        self._fed.append([(np.array(embeds), np.array(positions))])
        self.ids.append([self._taken()])
        return self._runtime.prefill(embeds, positions, lengths, rows)

    def step(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._fed[-1].append(
            (np.array(embeds)[:, None], np.broadcast_to(positions, (3, 1))[..., None].copy())
        )
        self.ids[-1].append(self._taken())
        return self._runtime.step(np.array(embeds), positions)
