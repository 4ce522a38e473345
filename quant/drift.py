"""How far quantized graphs are from their fp32 ones: each graph, each decoder layer, and the latent
loop step by step. May import: numpy, Pillow, matplotlib and what stands above `quant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.generate.decode import Prompt, embedded
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.padding import PaddedBatch
from lvr_lite.quant.prompts import load_prompts
from lvr_lite.quant.reports import DecoderDrift, Drift, StepDrift

# Latent steps over which drift is measured.
LATENT_STEPS = 8
# Questions about drawn scenes, and the seed of these.
PROMPTS = 4
SEED = 7
# Bytes of an fp32 bundle beyond which layers are compared one by one, and nothing else: both
# bundles at once may not fit into memory.
LARGE = 4 << 30


def measure(source: Bundle, quantized: Bundle) -> Drift:
    """Errors of a quantized bundle against its fp32 one. Of an fp32 bundle of more than 4 GiB,
    layer by layer alone.
    """
    runtime = OnnxRuntime(quantized)
    layers = _layer_drift(source, quantized, runtime)
    if source.bytes > LARGE:
        return Drift(graphs={}, layers=layers, decoder=None)
    reference = OnnxRuntime(source)
    graphs = _graph_drift(reference, runtime)
    return Drift(graphs, layers, latent_loop(reference, runtime))


def _graph_drift(reference: Runtime, other: Runtime) -> dict[str, float]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (168, 224, 3), dtype=np.uint8))
    processor = reference.processor
    pixels = processor.see([noise])
    ids = rng.integers(0, processor.tokenizer.get_vocab_size(), (1, 24), np.int64)
    prompts = load_prompts(reference, "scenes", 1, SEED)
    hidden = _start(reference, prompts)
    return {
        "vision_encoder": _relative(
            reference.encode(pixels.patches, pixels.grids),
            other.encode(pixels.patches, pixels.grids),
        ),
        "embed_tokens": _relative(
            reference.embed(ids),
            other.embed(ids),
        ),
        "lm_head": _relative(
            reference.head(hidden),
            other.head(hidden),
        ),
    }


def _layer_drift(source: Bundle, quantized: Bundle, runtime: Runtime) -> list[float]:
    """Of what each layer adds to a prompt's states; both read what the fp32 layers before wrote."""
    reference = DecoderLayers(source)
    other = DecoderLayers(quantized)
    prompts = load_prompts(runtime, "scenes", 1, SEED)
    embeds, positions, lengths = _inputs(runtime, prompts)
    width = runtime.hidden_size
    states = embeds[..., :width]
    drifts = []
    for index in range(source.manifest.decoder.layers):
        first = (index + 1) * width
        added = embeds[..., first : first + width]
        call = LayerCall(
            hidden=states,
            positions=positions,
            totals=lengths,
            added=added if added.shape[-1] else None,
        )
        (wanted,) = reference.run(index, [call])
        (got,) = other.run(index, [call])
        drifts.append(_relative(wanted - states, got - states))
        states = wanted
    return drifts


def latent_loop(reference: Runtime, other: Runtime, count: int = PROMPTS) -> DecoderDrift:
    """Drift over the latent steps of `count` prompts; the visual tokens are those of each runtime's
    own vision graph.
    """
    wanted_prompts = load_prompts(reference, "scenes", count, SEED)
    got_prompts = load_prompts(other, "scenes", count, SEED)
    wanted = _loop(reference, wanted_prompts, feeds_back=True)
    got = _loop(other, got_prompts, feeds_back=True)
    wanted_fed = _loop(reference, wanted_prompts, feeds_back=False)
    got_fed = _loop(other, got_prompts, feeds_back=False)
    return DecoderDrift(
        prompts=count,
        prefill=_relative(wanted[0], got[0]),
        fed_back=_step_drift(wanted[1:], got[1:]),
        token_fed=_step_drift(wanted_fed[1:], got_fed[1:]),
    )


def _step_drift(wanted: list[np.ndarray], got: list[np.ndarray]) -> StepDrift:
    drift = StepDrift(relative=[], cosine=[], norm=[])
    for reference, states in zip(wanted, got, strict=True):
        cosines = _cosine(reference, states)
        norms = _norm(states) / _norm(reference)
        drift.relative.append(_relative(reference, states))
        drift.cosine.append(float(np.mean(cosines)))
        drift.norm.append(float(np.mean(norms)))
    return drift


def _loop(runtime: Runtime, prompts: list[Prompt], feeds_back: bool) -> list[np.ndarray]:
    """States (B, H) after the prompts and after each latent step. feeds_back: each step is fed what
    the model makes of its own state; otherwise the embedding of <|lvr|>.
    """
    states = _start(runtime, prompts)
    every = [states]
    ids = np.full((len(prompts), 1), runtime.processor.tokens.lvr, np.int64)
    marker = runtime.embed(ids)[:, 0]
    following = np.array([prompt.positions.max() + 2 for prompt in prompts])
    for step in range(LATENT_STEPS):
        fed = marker
        if feeds_back and runtime.latent.feedback != "token":
            fed = runtime.latent.fed(states)
        after = runtime.step(np.array(fed), following + step)
        states = np.array(after)
        every.append(states)
    return every


def _start(runtime: Runtime, prompts: list[Prompt]) -> np.ndarray:
    """States (B, H) after the prompts and <|lvr_start|>."""
    embeds, positions, lengths = _inputs(runtime, prompts)
    room = embeds.shape[1] + LATENT_STEPS
    runtime.start(len(prompts), room)
    states = runtime.prefill(embeds, positions, lengths)
    return np.array(states)


def _inputs(runtime: Runtime, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Runtime.prefill` takes of the prompts with <|lvr_start|> after them: embeddings (B, S,
    H), or as wide as the visual tokens, positions (3, B, S) and lengths (B,).
    """
    tokens = runtime.processor.tokens
    batch = PaddedBatch.of(
        [np.append(prompt.ids, tokens.lvr_start) for prompt in prompts],
        [_one_more(prompt.positions) for prompt in prompts],
        filler=tokens.end[0],
    )
    features = [prompt.features for prompt in prompts]
    embeds = embedded(runtime, batch, tokens.image, features)
    return embeds, batch.positions, batch.lengths


def _one_more(positions: np.ndarray) -> np.ndarray:
    following = np.full((3, 1), positions.max() + 1)
    return np.concatenate([positions, following], 1)


def _norm(states: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(states, axis=-1))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lengths = np.maximum(_norm(a) * _norm(b), 1e-30)
    products = (a * b).sum(-1)
    return np.asarray(products / lengths)


def _relative(wanted: np.ndarray, got: np.ndarray) -> float:
    """Norm of the difference / norm of what is wanted."""
    size = max(float(np.linalg.norm(wanted)), 1e-30)
    return float(np.linalg.norm(got - wanted) / size)


def draw(drifts: Mapping[str, Drift], path: Path) -> None:
    """A figure (PNG) of drift by latent step; drifts: {precision: what `measure` returned}. None
    where no bundle was compared whole.
    """
    decoders = {name: drift.decoder for name, drift in drifts.items() if drift.decoder}
    if not decoders:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, LATENT_STEPS + 1)
    for name, decoder in decoders.items():
        fed_back = [100 * error for error in decoder.fed_back.relative]
        token_fed = [100 * error for error in decoder.token_fed.relative]
        (line,) = left.plot(steps, fed_back, marker="o", label=f"{name}, fed back")
        color = line.get_color()
        left.plot(
            steps,
            token_fed,
            "--",
            color=color,
            label=f"{name}, token fed",
        )
        right.plot(
            steps,
            decoder.fed_back.cosine,
            marker="o",
            color=color,
            label=name,
        )
    left.set(
        xlabel="latent step",
        ylabel="error of the state, % of fp32",
        ylim=(0, None),
    )
    right.set(
        xlabel="latent step",
        ylabel="cosine to fp32, fed back",
        ylim=(None, 1),
    )
    left.legend(frameon=False, fontsize=7, ncols=2)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
