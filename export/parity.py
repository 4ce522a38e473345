"""The gate that a bundle passes before it gets its name: graphs and whole decodings against torch.
May import: numpy, Pillow, torch, the core.

Both sides are Runtimes, so what is compared is what runs: padded batches, the shared K/V buffer,
the latent loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvr_lite.errors import LvrError
from lvr_lite.export.onnxfile import DecoderLayers, LayerCall
from lvr_lite.export.weights import empty_model
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, decode
from lvr_lite.generate.onnx import open_session
from lvr_lite.generate.runtime import Runtime
from lvr_lite.generate.torch import language_model, read, visual_tokens
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.terminal import bar

TOLERANCE = (
    1e-3  # relative; float32 graphs are at about 1e-6, a wrong mask or position at more than 1e-1
)
SEEN = (
    [(28, 28)],
    [(140, 84)],
    [(280, 168)],
    [(84, 112), (196, 140)],
)  # sizes of pictures for the vision graph, width and height
SIZES = ((64, 64), (120, 80), (90, 170))  # of pictures to decode with, width and height in pixels


@dataclass(frozen=True)
class Difference:
    """How far `got` is from `want`: largest absolute difference, mean absolute difference, and
    norm(got - want) / norm(want).
    """

    max_abs: float
    mean_abs: float
    relative: float


def difference(got: np.ndarray, want: np.ndarray) -> Difference:
    gap = got.astype(np.float64) - want.astype(np.float64)
    norm = float(np.linalg.norm(want.astype(np.float64)))
    return Difference(
        float(np.abs(gap).max()),
        float(np.abs(gap).mean()),
        float(np.linalg.norm(gap)) / max(norm, 1e-30),
    )


def compare(
    name: str, got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE
) -> Difference:
    """The difference of two arrays. Raises LvrError with the numbers where shapes differ or the
    relative difference exceeds `tolerance` (or is not a number).
    """
    if got.shape != want.shape:
        raise LvrError(f"parity: {name} has shape {got.shape}, torch has {want.shape}")
    found = difference(got, want)
    if not found.relative <= tolerance:  # so that NaN fails
        raise LvrError(
            f"parity: {name} differs from torch: max {found.max_abs:.3g}, mean {found.mean_abs:.3g}, relative {found.relative:.3g} "
            f"(tolerance {tolerance:g})"
        )
    return found


def _worst(found: list[Difference]) -> dict[str, Any]:
    return {
        "cases": len(found),
        **{key: max(asdict(d)[key] for d in found) for key in ("max_abs", "mean_abs", "relative")},
    }


def check_graphs(
    got: Runtime, want: Runtime, tolerance: float = TOLERANCE, seed: int = 0
) -> dict[str, Any]:
    """{graph: worst difference over its cases}. Raises LvrError naming the graph that is out of
    tolerance.
    """
    rng = np.random.default_rng(seed)
    return {
        "vision_encoder": _worst(_vision(got, want, tolerance, rng)),
        "embed_tokens": _worst(_embed(got, want, tolerance, rng)),
        "decoder": _worst(_decoder(got, want, tolerance, rng)),
        "lm_head": _worst(_head(got, want, tolerance, rng)),
    }


def check_graphs_apart(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Any,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """As `check_graphs`, for a model of any size: one graph at a time is in memory; the decoder is
    left to `check_layers`.

    weights: its parameters, with `model`, their empty model.
    """
    rng = np.random.default_rng(0)
    processor = checkpoint.processor
    model = empty_model(checkpoint.config, processor.family)
    text = f"model.{processor.family.language_model}."
    session = open_session(bundle.path("vision_encoder"))
    seen = []
    with (
        filled(
            model,
            weights,
            {n: n for n, _ in model.named_parameters() if not n.startswith((text, "lm_head."))},
        ),
        torch.inference_mode(),
    ):
        for sizes in SEEN:
            pictures = [
                Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes
            ]
            pixels = processor.see(pictures)
            inputs = processor.vision_inputs(pixels.grids)
            want = visual_tokens(
                model,
                torch.from_numpy(pixels.patches),
                torch.tensor([[1, *grid] for grid in pixels.grids]),
            )
            got = session.run(None, {"pixel_values": pixels.patches, **inputs})[0]
            seen.append(compare(f"vision_encoder {pixels.grids}", got, want.numpy(), tolerance))
    del session
    table = weights[f"{text}embed_tokens.weight"]
    ids = rng.integers(0, len(table), (2, 9), np.int64)
    got = open_session(bundle.path("embed_tokens")).run(None, {"input_ids": ids})[0]
    embedded = compare("embed_tokens", got, table[torch.from_numpy(ids)].numpy(), tolerance)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    head = table if tied else weights["lm_head.weight"]
    hidden = rng.standard_normal((3, 1, head.shape[1])).astype(np.float32)
    got = open_session(bundle.path("lm_head")).run(None, {"last_hidden_state": hidden})[0]
    said = compare("lm_head", got, (torch.from_numpy(hidden) @ head.T).numpy(), tolerance)
    return {
        "vision_encoder": _worst(seen),
        "embed_tokens": _worst([embedded]),
        "lm_head": _worst([said]),
    }


def check_layers(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Any,
    tolerance: float = TOLERANCE,
    steps: int = 2,
) -> list[float]:
    """The relative difference of each decoder layer from transformers' on the same input, over
    padded rows and `steps` further positions.

    One layer at a time is in memory. Each reads what transformers' layer before it wrote. Raises
    LvrError naming the layer that differs.
    """
    text = checkpoint.config.get("text_config", checkpoint.config)
    one = {"num_hidden_layers": 1} | (
        {"layer_types": text["layer_types"][:1]} if text.get("layer_types") else {}
    )
    model = empty_model(
        checkpoint.config | {"text_config": text | one}, checkpoint.processor.family
    )
    language = language_model(model)
    language.norm = torch.nn.Identity()
    prefix, layers = (
        f"model.{checkpoint.processor.family.language_model}.layers",
        DecoderLayers(bundle),
    )
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.0.")]
    rng, lengths, width = (
        np.random.default_rng(0),
        np.array([11, 6]),
        bundle.manifest.decoder.hidden_size,
    )
    deepstack = len(checkpoint.config["vision_config"].get("deepstack_visual_indexes") or ())
    calls = [_first_call(rng, lengths, width)]
    calls += [
        LayerCall(
            rng.standard_normal((2, 1, width)).astype(np.float32),
            np.full((3, 2, 1), 40 + i),
            lengths + 1 + i,
        )
        for i in range(steps)
    ]
    found = []
    for index in bar(range(bundle.manifest.decoder.layers), "parity of layers"):
        added = (
            rng.standard_normal(calls[0].hidden.shape).astype(np.float32)
            if index < deepstack
            else None
        )
        calls[0] = replace(calls[0], added=added)
        with (
            filled(
                model, weights, {n: n.replace(f"{prefix}.0.", f"{prefix}.{index}.") for n in names}
            ),
            torch.inference_mode(),
        ):
            want = _torch_layer(model, calls, lengths)
        differences = []
        for call, mine, reference in zip(calls, layers.run(index, calls), want, strict=True):
            real = (
                np.arange(call.hidden.shape[1])[None] < lengths[:, None]
                if call is calls[0]
                else np.ones((2, 1), bool)
            )
            differences.append(
                compare(f"decoder layer {index}", mine[real], reference[real], tolerance).relative
            )
        found.append(max(differences))
        calls = [
            replace(call, hidden=reference) for call, reference in zip(calls, want, strict=True)
        ]
    return found


def _first_call(rng: np.random.Generator, lengths: np.ndarray, width: int) -> LayerCall:
    longest = int(lengths.max())
    positions = np.sort(
        rng.integers(0, 40, (3, 2, longest)), axis=-1
    )  # the three axes apart, as inside a picture
    return LayerCall(
        rng.standard_normal((2, longest, width)).astype(np.float32), positions, lengths
    )


def _torch_layer(model: Any, calls: list[LayerCall], lengths: np.ndarray) -> list[np.ndarray]:
    from transformers import DynamicCache

    cache, out = DynamicCache(config=model.config.text_config), []
    mask = torch.zeros(len(lengths), 0, dtype=torch.long)
    for call in calls:
        width = call.hidden.shape[1]
        real = (
            np.arange(width)[None] < lengths[:, None]
            if width > 1
            else np.ones((len(lengths), 1), bool)
        )
        mask = torch.cat([mask, torch.from_numpy(real.astype(np.int64))], 1)
        fed = call.hidden if call.added is None else np.concatenate([call.hidden, call.added], -1)
        out.append(
            read(
                model, torch.from_numpy(fed), torch.from_numpy(call.positions), mask, cache
            ).numpy()
        )
    return out


@contextmanager
def filled(model: Any, weights: Any, names: dict[str, str]) -> Iterator[None]:
    """Gives an empty model some of its parameters, {its own name: its name in `weights`}, and takes
    them away again.
    """
    empty = {}
    for own, name in names.items():
        path, _, part = own.rpartition(".")
        module = model.get_submodule(path)
        empty[own] = getattr(module, part)
        setattr(module, part, torch.nn.Parameter(weights[name], requires_grad=False))
    try:
        yield
    finally:
        for own, parameter in empty.items():
            path, _, part = own.rpartition(".")
            setattr(model.get_submodule(path), part, parameter)


def _vision(
    got: Runtime, want: Runtime, tolerance: float, rng: np.random.Generator
) -> list[Difference]:
    found = []
    for sizes in SEEN:
        pictures = [
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes
        ]
        pixels = want.processor.see(pictures)
        found.append(
            compare(
                f"vision_encoder {pixels.grids}",
                got.encode(pixels.patches, pixels.grids),
                want.encode(pixels.patches, pixels.grids),
                tolerance,
            )
        )
    return found


def _ids(rng: np.random.Generator, runtime: Runtime, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, runtime.processor.tokenizer.get_vocab_size(), shape, np.int64)


def _embed(
    got: Runtime, want: Runtime, tolerance: float, rng: np.random.Generator
) -> list[Difference]:
    cases = [_ids(rng, want, (1, 1)), _ids(rng, want, (2, 9))]
    return [compare("embed_tokens", got.embed(ids), want.embed(ids), tolerance) for ids in cases]


def _head(
    got: Runtime, want: Runtime, tolerance: float, rng: np.random.Generator
) -> list[Difference]:
    cases = [rng.standard_normal((rows, want.hidden_size)).astype(np.float32) for rows in (1, 3)]
    return [compare("lm_head", got.head(hidden), want.head(hidden), tolerance) for hidden in cases]


def _decoder(
    got: Runtime, want: Runtime, tolerance: float, rng: np.random.Generator, steps: int = 4
) -> list[Difference]:
    """Prefill of padded rows, then steps fed with torch's own hidden states, so that each step is
    compared on the same input.
    """
    found = []
    for lengths in (np.array([13]), np.array([11, 6]), np.array([1, 9, 4])):
        batch, longest = len(lengths), int(lengths.max())
        embeds = want.embed(_ids(rng, want, (batch, longest)))
        positions = np.sort(
            rng.integers(0, 40, (3, batch, longest)), axis=-1
        )  # the three axes apart, as inside a picture
        for runtime in (got, want):
            runtime.start(batch, longest + steps)
        mine, reference = (runtime.prefill(embeds, positions, lengths) for runtime in (got, want))
        found.append(compare(f"decoder prefill of {lengths.tolist()}", mine, reference, tolerance))
        following = 40 + np.arange(batch)
        for step in range(steps):
            fed = np.array(reference)
            mine, reference = (runtime.step(fed, following + step) for runtime in (got, want))
            found.append(
                compare(
                    f"decoder step {step + 1} after {lengths.tolist()}", mine, reference, tolerance
                )
            )
    return found


class StartsWithLatents:
    """A runtime whose first choice is always <|lvr_start|>, so that any model, tuned or not, goes
    through the latent loop.
    """

    def __init__(self, runtime: Runtime, steps: int) -> None:
        self._runtime = runtime
        self.latent = replace(runtime.latent, steps=steps)
        self._first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def start(self, batch: int, capacity: int) -> None:
        self._first = True
        self._runtime.start(batch, capacity)

    def head(self, hidden: np.ndarray) -> np.ndarray:
        logits = np.array(self._runtime.head(hidden))
        if self._first:
            logits[:, self.processor.tokens.lvr_start] = np.inf
        self._first = False
        return logits


def check_decoding(
    got: Runtime, want: Runtime, tolerance: float = TOLERANCE, latents: int = 4, tokens: int = 6
) -> dict[str, Any]:
    """Whole decodings of a few pictures, alone and as one batch: the same tokens, and hidden states
    within `tolerance` at every step.

    Raises LvrError naming the first place where the two part.
    """
    options = Options(max_tokens=tokens, min_tokens=tokens, keep_hidden=True)
    groups = [[picture] for picture in _pictures()] + [_pictures()]
    found: list[Difference] = []
    for group in groups:
        mine, reference = (_decode(runtime, group, latents, options) for runtime in (got, want))
        for a, b in zip(mine, reference, strict=True):
            if a.tokens != b.tokens:
                at = next(
                    i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y
                )
                raise LvrError(
                    f"parity: decoding parts from torch at text token {at + 1}: {a.tokens[at]}, torch {b.tokens[at]}"
                )
            states = enumerate(zip(a.hidden, b.hidden, strict=True))
            found += [
                compare(f"decoding, hidden state {i}", x, y, tolerance) for i, (x, y) in states
            ]
    return {
        "prompts": sum(map(len, groups)),
        "latent_steps": latents,
        "text_tokens": tokens,
        **_worst(found),
    }


def _decode(
    runtime: Runtime, pictures: list[Image.Image], latents: int, options: Options
) -> list[Any]:
    prompts = [prepare_prompt(runtime, [picture], "What is here?")[0] for picture in pictures]
    return decode(StartsWithLatents(runtime, latents), prompts, options)


def _pictures() -> list[Image.Image]:
    """Coloured noise over a gradient, the same every time."""
    rng = np.random.default_rng(7)
    pictures = []
    for width, height in SIZES:
        slope = np.linspace(0, 255, width * height).reshape(height, width, 1)
        pictures.append(
            Image.fromarray(
                ((slope + rng.integers(0, 256, (height, width, 3))) / 2).astype(np.uint8)
            )
        )
    return pictures
