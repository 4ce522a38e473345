"""What quantization costs on a calibration set: answers and latents against the fp32 bundle's; and what flows into each weight.

May import: onnx, numpy, the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lvr_lite import onnxfile
from lvr_lite.ask import prepare_prompt
from lvr_lite.data.make import scene_samples
from lvr_lite.data.samples import read_samples
from lvr_lite.decode import Decoding, Options, Prompt, Result
from lvr_lite.errors import DataError
from lvr_lite.runtime.onnx import OnnxRuntime, open_session
from lvr_lite.runtime.preprocess import open_picture

SEED = 90_001  # of the scenes, of the training split
BATCH = 16  # prompts decoded together
TOKENS = 24  # text tokens of an answer at most
HELD = 1 << 30  # bytes of products in memory at once


def load_prompts(runtime: OnnxRuntime, data: str, count: int) -> list[Prompt]:
    """`count` prompts: "scenes" (drawn, of the training split), or a file of samples. Raises DataError for a file without samples."""
    if data == "scenes":
        return [prepare_prompt(runtime, [picture], sample.question)[0] for sample, picture in scene_samples(count, SEED, "train")]
    samples = read_samples(Path(data))[:count]
    if not samples:
        raise DataError(f"{data}: holds no samples; --calibration needs some")
    return [prepare_prompt(runtime, [open_picture(path) for path in sample.images], sample.question)[0] for sample in samples]


@dataclass(frozen=True)
class Said:
    """What the fp32 bundle answered: the choices that lead there, the log-probabilities (V,) at each, and the states at each step."""

    choices: list[int]
    log_probabilities: list[np.ndarray]
    hidden: list[np.ndarray]
    latents: int


class _Scripted:
    """A runtime whose head keeps the logits of each row, and, given a script, makes each row choose by it."""

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


def _decode(runtime: Any, prompts: list[Prompt], scripts: Sequence[Sequence[int]] | None) -> list[tuple[Result, list[np.ndarray]]]:
    scripted = _Scripted(runtime, scripts)
    decoding = scripted.decoding = Decoding(scripted, prompts, Options(max_tokens=TOKENS, keep_hidden=True))
    for _ in decoding:
        pass
    return [(result, [_log_softmax(x) for x in scripted.logits[i]]) for i, result in enumerate(decoding.results)]


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
            start = [runtime.tokens.lvr_start] if result.latents else []
            end = [runtime.tokens.end[0]] if result.reason == "stop" else []
            found.append(Said([*start, *result.tokens, *end], scores, result.hidden, len(result.latents)))
    return found


def loss(runtime: OnnxRuntime, prompts: list[Prompt], reference: list[Said]) -> dict[str, float]:
    """How far a bundle is from what the fp32 one said, made to choose the same tokens, but fed with its own latents.

    kl: mean KL divergence of its distributions from fp32's, in nats, over all choices. drift: mean of 1 - cosine of its latents to
    fp32's, over all steps. loss: their sum.
    """
    divergences, gaps = [], []
    for part in _batches(prompts):
        wanted = reference[part]
        for (result, scores), said in zip(_decode(runtime, prompts[part], [s.choices for s in wanted]), wanted, strict=True):
            for mine, theirs in zip(scores, said.log_probabilities, strict=True):
                divergences.append(float((np.exp(theirs) * (theirs - mine)).sum()))
            first = 1  # the state after the prompt chose <|lvr_start|>; those of the latent steps come next
            for step in range(first, first + said.latents):
                a, b = said.hidden[step], result.hidden[step]
                gaps.append(1 - float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
    kl, drift = float(np.mean(divergences)), float(np.mean(gaps)) if gaps else 0.0
    return {"kl": kl, "drift": drift, "loss": kl + drift}


class Products(Mapping[str, np.ndarray]):
    """{"decoder/" + weight: sum of x xᵀ over all inputs x of a weight of an fp32 decoder, float64 (K, K)}, on calibration prompts.

    Made when asked for, for as many weights of neighbouring layers at once as HELD allows; those before are forgotten.
    """

    def __init__(self, runtime: OnnxRuntime, prompts: list[Prompt]) -> None:
        self._runtime, self._prompts = runtime, prompts
        self._file = runtime.folder / runtime.manifest.graphs["decoder"].path
        self._model = onnxfile.load(self._file)
        rows = {tensor.name: tensor.dims[0] for tensor in self._model.graph.initializer if len(tensor.dims) == 2}
        products = [node for node in self._model.graph.node if node.op_type == "MatMul" and node.input[1] in rows]
        self._inputs = {f"decoder/{node.input[1]}": (node.input[0], rows[node.input[1]]) for node in products}
        self._held: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def __contains__(self, key: object) -> bool:
        return key in self._inputs

    def __getitem__(self, key: str) -> np.ndarray:
        name, _ = self._inputs[key]
        if name not in self._held:
            self._fill(key)
        return self._held[name]

    def _fill(self, key: str) -> None:
        wanted: dict[str, int] = {}
        for name, width in list(self._inputs.values())[list(self._inputs).index(key) :]:
            if wanted and 8 * (sum(w * w for w in wanted.values()) + width * width) > HELD:
                break
            wanted[name] = width
        self._held = {name: np.zeros((width, width)) for name, width in wanted.items()}
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted)
        watched = _Watched(self._runtime, open_session(model.SerializeToString(), self._file.parent), list(wanted), self._add)
        for part in _batches(self._prompts):
            for _ in Decoding(watched, self._prompts[part], Options(max_tokens=TOKENS)):
                pass

    def _add(self, name: str, rows: np.ndarray) -> None:
        self._held[name] += rows.T @ rows


class _Watched(OnnxRuntime):
    """A bundle whose decoder shows, beside its outputs, what flows into some of its weights."""

    def __init__(self, runtime: OnnxRuntime, decoder: Any, names: list[str], seen: Callable[[str, np.ndarray], None]) -> None:
        self.__dict__.update(runtime.with_graphs(decoder=decoder).__dict__)
        self._names, self._seen = names, seen

    def _run(self, binding: Any, real: np.ndarray) -> None:
        for name in self._names:
            binding.bind_output(name)
        super()._run(binding, real)
        shown = binding.get_outputs()[-len(self._names) :]  # bound last
        for name, value in zip(self._names, shown, strict=True):
            self._seen(name, value.numpy()[real].astype(np.float32))
