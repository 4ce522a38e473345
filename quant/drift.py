"""How far quantized graphs are from their fp32 ones: each graph, each decoder layer, and the latent
loop step by step.

May import: numpy, Pillow, matplotlib, the core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Prompt
from lvr_lite.generate.onnx import OnnxRuntime
from lvr_lite.model.bundle import Bundle
from lvr_lite.toy.make import scene_samples

LATENT_STEPS = 8  # over which drift is measured
PROMPTS = 4  # questions about drawn scenes, of the training split
LARGE = (
    4 << 30
)  # bytes of an fp32 bundle beyond which layers are compared one by one, and nothing else


def measure(source: Path, quantized: Path) -> dict[str, Any]:
    """Errors of a quantized bundle against its fp32 one, all as norm of the difference / norm of
    the reference.

    vision_encoder, embed_tokens, lm_head: on the same input. layers: of each decoder layer on the
    same input, fp32's. decoder: states after the prompt, then of 8 latent steps: `fed_back`, where
    both go on from their own states, so that errors may add up, and `token_fed`, where both are fed
    the embedding of <|lvr|>; each with relative error, cosine, and norm / norm of the reference. A
    bundle of more than 4 GiB in fp32 is compared layer by layer only ("decoder" is null): both at
    once may not fit into memory.
    """
    original = Bundle.open(source, check=False)
    other = OnnxRuntime(Bundle.open(quantized))
    layers = _layers(original, other)
    if original.bytes > LARGE:
        return {"layers": layers, "decoder": None}
    reference = OnnxRuntime(original)
    return {**_graphs(reference, other), "layers": layers, "decoder": latent_loop(reference, other)}


def _graphs(*both: OnnxRuntime) -> dict[str, Any]:
    reference = both[0]
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (168, 224, 3), dtype=np.uint8))
    pixels = reference.processor.see([noise])
    ids = rng.integers(0, reference.processor.tokenizer.get_vocab_size(), (1, 24), np.int64)
    hidden = _start(reference, prompts(reference, 1))
    return {
        "vision_encoder": _apart(
            *(runtime.encode(pixels.patches, pixels.grids) for runtime in both)
        ),
        "embed_tokens": _apart(*(runtime.embed(ids) for runtime in both)),
        "lm_head": _apart(*(runtime.head(hidden) for runtime in both)),
    }


def _layers(source: Bundle, other: OnnxRuntime) -> list[float]:
    """Of what each layer adds to a prompt's states; both read what the fp32 layers before wrote."""
    runs = [DecoderLayers(bundle) for bundle in (source, other.bundle)]
    embeds, positions, lengths = _inputs(other, prompts(other, 1))
    width, found = other.hidden_size, []
    states, added = embeds[..., :width], embeds[..., width:]
    for index in range(other.bundle.manifest.decoder.layers):
        part = added[..., index * width : (index + 1) * width]
        call = LayerCall(states, positions, lengths, part if part.shape[-1] else None)
        want, got = (run.run(index, [call])[0] for run in runs)
        found.append(_apart(want - states, got - states))
        states = want
    return found


def prompts(runtime: OnnxRuntime, count: int) -> list[Prompt]:
    """Questions about drawn scenes, of the training split, as prompts for this model."""
    asked = []
    for sample, picture in scene_samples(count, 7, "train"):
        asked.append(prepare_prompt(runtime, [picture], sample.question)[0])
    return asked


def _inputs(runtime: OnnxRuntime, asked: list[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, positions and lengths of the prompts with <|lvr_start|> after them."""
    lengths = np.array([len(p.ids) + 1 for p in asked])
    longest, start = int(lengths.max()), runtime.processor.tokens.lvr_start
    ids = np.full((len(asked), longest), runtime.processor.tokens.end[0], np.int64)
    positions = np.zeros((3, len(asked), longest), np.int64)
    for i, p in enumerate(asked):
        ids[i, : lengths[i]] = [*p.ids, start]
        positions[:, i, : lengths[i]] = np.concatenate(
            [p.positions, np.full((3, 1), p.positions.max() + 1)], 1
        )
    embeds = runtime.embed(ids)
    embeds = np.pad(
        embeds, ((0, 0), (0, 0), (0, max(p.features.shape[1] for p in asked) - embeds.shape[2]))
    )
    for i, p in enumerate(asked):
        embeds[i, : lengths[i] - 1][
            p.ids == runtime.processor.tokens.image, : p.features.shape[1]
        ] = p.features
    return embeds, positions, lengths


def _start(runtime: OnnxRuntime, asked: list[Prompt]) -> np.ndarray:
    """States (B, H) after the prompts and <|lvr_start|>."""
    embeds, positions, lengths = _inputs(runtime, asked)
    runtime.start(len(asked), embeds.shape[1] + LATENT_STEPS)
    return np.array(runtime.prefill(embeds, positions, lengths))


def latent_loop(reference: OnnxRuntime, other: OnnxRuntime, count: int = PROMPTS) -> dict[str, Any]:
    """Drift over the latent steps of `count` prompts; the visual tokens are those of each runtime's
    own vision graph.
    """
    asked = [prompts(runtime, count) for runtime in (reference, other)]
    states = {
        feeding: [
            _loop(runtime, p, feeding) for runtime, p in zip((reference, other), asked, strict=True)
        ]
        for feeding in ("fed_back", "token_fed")
    }
    found: dict[str, Any] = {
        "prompts": count,
        "prefill": _apart(states["fed_back"][0][0], states["fed_back"][1][0]),
    }
    for feeding, (want, got) in states.items():
        steps = list(zip(want[1:], got[1:], strict=True))
        found[feeding] = {
            "relative": [_apart(a, b) for a, b in steps],
            "cosine": [float(np.mean(_cosine(a, b))) for a, b in steps],
            "norm": [
                float(np.mean(np.linalg.norm(b, axis=-1) / np.linalg.norm(a, axis=-1)))
                for a, b in steps
            ],
        }
    return found


def _loop(runtime: OnnxRuntime, asked: list[Prompt], feeding: str) -> list[np.ndarray]:
    """States (B, H) after the prompts and after each latent step."""
    states = [_start(runtime, asked)]
    marker = runtime.embed(np.full((len(asked), 1), runtime.processor.tokens.lvr, np.int64))[:, 0]
    feedback: Callable[[np.ndarray], np.ndarray] = (
        (lambda _: marker) if runtime.latent.feedback == "token" else runtime.latent.fed
    )
    following = np.array([p.positions.max() + 2 for p in asked])
    for step in range(LATENT_STEPS):
        fed = feedback(states[-1]) if feeding == "fed_back" else marker
        states.append(np.array(runtime.step(np.array(fed), following + step)))
    return states


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(
        (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)
    )


def _apart(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def draw(
    measured: dict[str, dict[str, Any]] | dict[str, Any], path: Path, precision: str | None = None
) -> None:
    """A figure (PNG) of drift by latent step. measured: what `measure` found for `precision`, or
    {precision: that} of several.
    """
    found = {precision: measured} if precision is not None else measured
    found = {name: one for name, one in found.items() if one["decoder"]}
    if not found:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, LATENT_STEPS + 1)
    for name, one in found.items():
        (line,) = left.plot(
            steps,
            [100 * e for e in one["decoder"]["fed_back"]["relative"]],
            marker="o",
            label=f"{name}, fed back",
        )
        left.plot(
            steps,
            [100 * e for e in one["decoder"]["token_fed"]["relative"]],
            "--",
            color=line.get_color(),
            label=f"{name}, token fed",
        )
        right.plot(
            steps,
            one["decoder"]["fed_back"]["cosine"],
            marker="o",
            color=line.get_color(),
            label=name,
        )
    left.set(xlabel="latent step", ylabel="error of the state, % of fp32", ylim=(0, None))
    right.set(xlabel="latent step", ylabel="cosine to fp32, fed back", ylim=(None, 1))
    left.legend(frameon=False, fontsize=7, ncols=2)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
