"""Whether a bundle of any size computes what torch computes: one graph and one layer at a time.

May import: numpy, torch, transformers, model/, generate/.

Of torch's model, too, no more than one part has its weights at a time (`filled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lvr_lite.errors import LvrError
from lvr_lite.export.layers import DecoderLayers, LayerCall
from lvr_lite.export.parity import (
    FIRST_STEP,
    TOLERANCE,
    Difference,
    compare,
    prefill_positions,
    vision_cases,
    worst,
)
from lvr_lite.export.weights import (
    TransformersModule,
    Weights,
    empty_model,
    loaded_by_transformers,
)
from lvr_lite.generate.onnx import open_session
from lvr_lite.generate.torch import language_model, read, visual_tokens
from lvr_lite.model.bundle import Bundle
from lvr_lite.model.checkpoint import Checkpoint
from lvr_lite.model.processor_files import read_json
from lvr_lite.model.weight_files import StoredTensor, stored_tensors
from lvr_lite.terminal import bar

# Values of weights that are compared at a time.
PART = 1 << 26
# True lengths of the two rows that layers are compared on.
LENGTHS = np.array([11, 6])


def check_graphs_apart(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Weights,
    tolerance: float = TOLERANCE,
) -> dict[str, Difference]:
    """As `parity.check_graphs`, one graph at a time; the decoder is left to `check_layers`.

    weights: the merged model's.
    """
    rng = np.random.default_rng(0)
    family = checkpoint.processor.family
    model = empty_model(checkpoint.config, family)
    vision = _check_vision(bundle, checkpoint, weights, model, tolerance, rng)
    table = weights[f"model.{family.language_model}.embed_tokens.weight"]
    ids = rng.integers(0, len(table), (2, 9), np.int64)
    (got,) = open_session(bundle.path("embed_tokens")).run(None, {"input_ids": ids})
    want = table[torch.from_numpy(ids)].numpy()
    embedding = compare("embed_tokens", got, want, tolerance)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    matrix = table
    if not tied:
        matrix = weights["lm_head.weight"]
    hidden = rng.standard_normal((3, 1, matrix.shape[1])).astype(np.float32)
    (got,) = open_session(bundle.path("lm_head")).run(None, {"last_hidden_state": hidden})
    product = torch.from_numpy(hidden) @ matrix.T
    head = compare("lm_head", got, product.numpy(), tolerance)
    return {
        "vision_encoder": worst(vision),
        "embed_tokens": embedding,
        "lm_head": head,
    }


def _check_vision(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Weights,
    model: TransformersModule,
    tolerance: float,
    rng: np.random.Generator,
) -> list[Difference]:
    processor = checkpoint.processor
    others = (f"model.{processor.family.language_model}.", "lm_head.")
    names = {n: n for n, _ in model.named_parameters() if not n.startswith(others)}
    session = open_session(bundle.path("vision_encoder"))
    differences = []
    with filled(model, weights, names), torch.inference_mode():
        for pixels in vision_cases(processor, rng):
            grids = torch.tensor([[1, *grid] for grid in pixels.grids])
            want = visual_tokens(model, torch.from_numpy(pixels.patches), grids).numpy()
            inputs = processor.vision_inputs(pixels.grids)
            (got,) = session.run(None, {"pixel_values": pixels.patches, **inputs})
            differences.append(compare(f"vision_encoder {pixels.grids}", got, want, tolerance))
    return differences


def check_layers(
    bundle: Bundle,
    checkpoint: Checkpoint,
    weights: Weights,
    tolerance: float = TOLERANCE,
    steps: int = 2,
) -> list[float]:
    """The relative difference of each decoder layer from transformers' on the same input, over
    padded rows and `steps` further positions.

    One layer at a time is in memory. Each reads what transformers' layer before it wrote. Raises
    LvrError naming the layer that differs.
    """
    family = checkpoint.processor.family
    model = _one_layer_model(checkpoint)
    prefix = f"model.{family.language_model}.layers"
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.0.")]
    layers = DecoderLayers(bundle)
    deepstack = len(family.deepstack(checkpoint.config["vision_config"]))
    rng = np.random.default_rng(0)
    calls = _calls(rng, bundle.manifest.decoder.hidden_size, steps)
    relative = []
    for index in bar(range(bundle.manifest.decoder.layers), "parity of layers"):
        shape = calls[0].hidden.shape
        added = None
        if index < deepstack:
            added = rng.standard_normal(shape).astype(np.float32)
        calls[0] = replace(calls[0], added=added)
        own = {name: name.replace(f"{prefix}.0.", f"{prefix}.{index}.") for name in names}
        with filled(model, weights, own), torch.inference_mode():
            want = _run_torch(model, calls)
        got = layers.run(index, calls)
        differences = [
            compare(f"decoder layer {index}", mine[real], reference[real], tolerance)
            for mine, reference, real in zip(got, want, map(_real, calls), strict=True)
        ]
        relative.append(max(gap.relative for gap in differences))
        calls = [replace(call, hidden=states) for call, states in zip(calls, want, strict=True)]
    return relative


def check_reading(checkpoint: Checkpoint, base: Weights) -> int:
    """Whether the base's weights are those that transformers' own loading makes of its files, value
    for value: what graphs are compared with, `weights`, is this project's reading. A few at a time.

    base: the weights without an adapter.

    Returns how many were compared. Raises LvrError naming the first that differs, or that no file
    gave.
    """
    # As published: files lack the rows of markers that a full vocabulary grows by.
    config = read_json(checkpoint.base / "config.json")
    model = empty_model(config, checkpoint.processor.family)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[str, int] = {}
    for part in bar(_parts(checkpoint), "parity of reading"):
        for name, value in loaded_by_transformers(model, part).items():
            if not torch.equal(base[name][: len(value)], value):
                raise LvrError(f"parity: {name} is read as something else than transformers reads")
            seen[name] = id(parameters[name])
    # Of tied parameters, files hold one.
    for name, parameter in parameters.items():
        if id(parameter) not in seen.values():
            raise LvrError(f"parity: transformers reads no {name} from {checkpoint.base}")
        if name not in seen:
            twin = next(other for other, tied in seen.items() if tied == id(parameter))
            if not torch.equal(base[name], base[twin]):
                raise LvrError(f"parity: {name} is tied to {twin} and is read as something else")
    return len(parameters)


def _parts(checkpoint: Checkpoint) -> list[list[StoredTensor]]:
    """The tensors of the base's files in parts of PART values or little more."""
    parts: list[list[StoredTensor]] = [[]]
    values = 0
    for tensor in stored_tensors(checkpoint.base).values():
        if values > PART:
            parts.append([])
            values = 0
        parts[-1].append(tensor)
        values += math.prod(tensor.shape)
    return parts


def _one_layer_model(checkpoint: Checkpoint) -> TransformersModule:
    """The empty model with one decoder layer and no norm after it."""
    text = checkpoint.config.get("text_config", checkpoint.config)
    one = text | {"num_hidden_layers": 1}
    if text.get("layer_types"):
        one["layer_types"] = text["layer_types"][:1]
    config = checkpoint.config | {"text_config": one}
    model = empty_model(config, checkpoint.processor.family)
    language_model(model).norm = nn.Identity()
    return model


def _calls(rng: np.random.Generator, width: int, steps: int) -> list[LayerCall]:
    """A prefill of padded rows, then steps."""
    batch = len(LENGTHS)
    longest = int(LENGTHS.max())
    positions = prefill_positions(rng, batch, longest)
    hidden = rng.standard_normal((batch, longest, width)).astype(np.float32)
    calls = [LayerCall(hidden, positions, LENGTHS)]
    for i in range(steps):
        hidden = rng.standard_normal((batch, 1, width)).astype(np.float32)
        positions = np.full((3, batch, 1), FIRST_STEP + i)
        calls.append(LayerCall(hidden, positions, LENGTHS + 1 + i))
    return calls


def _real(call: LayerCall) -> np.ndarray:
    """Which positions (B, S) of a call are no padding: a prefill is padded, a step is not."""
    batch, width = call.hidden.shape[:2]
    if width == 1:
        return np.ones((batch, 1), bool)
    places = np.arange(width)
    return places[None] < call.totals[:, None]


def _run_torch(model: TransformersModule, calls: list[LayerCall]) -> list[np.ndarray]:
    """Hidden states after transformers' layer, of several calls, one after another."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    mask = torch.zeros(len(LENGTHS), 0, dtype=torch.long)
    states = []
    for call in calls:
        real = _real(call).astype(np.int64)
        mask = torch.cat([mask, torch.from_numpy(real)], 1)
        embeds = call.hidden
        if call.added is not None:
            embeds = np.concatenate([embeds, call.added], -1)
        after = read(
            model,
            torch.from_numpy(embeds),
            torch.from_numpy(call.positions),
            mask,
            cache,
        )
        states.append(after.numpy())
    return states


@contextmanager
def filled(model: TransformersModule, weights: Weights, names: Mapping[str, str]) -> Iterator[None]:
    """Gives an empty model some of its parameters, {its own name: its name in `weights`}, and takes
    them away again.
    """
    empty = {}
    for own, name in names.items():
        path, _, part = own.rpartition(".")
        module = model.get_submodule(path)
        empty[own] = getattr(module, part)
        setattr(module, part, nn.Parameter(weights[name], requires_grad=False))
    try:
        yield
    finally:
        for own, parameter in empty.items():
            path, _, part = own.rpartition(".")
            setattr(model.get_submodule(path), part, parameter)
