"""Whether a bundle computes what torch computes: graphs and whole decodings, side by side.

May import: numpy, Pillow, model/, generate/.

Both sides are Runtimes, so what is compared is what runs: padded batches, the shared K/V buffer,
the latent loop. `lvr_lite.export.apart` compares a model that is too large for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from lvr_lite.errors import LvrError
from lvr_lite.files import JsonObject
from lvr_lite.generate.ask import prepare_prompt
from lvr_lite.generate.decode import Options, Result, decode
from lvr_lite.generate.runtime import Runtime
from lvr_lite.model.processor import Pixels, Processor

# Relative difference at most; float32 graphs are at about 1e-6, a wrong mask or position at more
# than 1e-1.
TOLERANCE = 1e-3
# (width, height) in pixels of the pictures that the vision graph is compared on, a call a row.
VISION_SIZES = ([(28, 28)], [(140, 84)], [(280, 168)], [(84, 112), (196, 140)])
# Of the pictures that are decoded.
DECODING_SIZES = ((64, 64), (120, 80), (90, 170))
# Rows' lengths of the decoder's calls, and the steps after each.
LENGTHS = ([13], [11, 6], [1, 9, 4])
STEPS = 4
# Positions of a prefill lie below this one, those of the steps from it on.
FIRST_STEP = 40


@dataclass(frozen=True)
class Difference:
    """How far `got` is from `want`.

    cases: over how many pairs of arrays the numbers are the largest.
    max_abs, mean_abs: the largest and the mean absolute difference.
    relative: norm(got - want) / norm(want).
    """

    cases: int
    max_abs: float
    mean_abs: float
    relative: float


def worst(differences: Sequence[Difference]) -> Difference:
    """The largest of each number."""
    return Difference(
        cases=len(differences),
        max_abs=max(d.max_abs for d in differences),
        mean_abs=max(d.mean_abs for d in differences),
        relative=max(d.relative for d in differences),
    )


@dataclass(frozen=True)
class DecodingParity:
    """Whole decodings: the same tokens, and hidden states that differ by no more than `worst`.

    latent_steps, text_tokens: of each of the prompts.
    """

    prompts: int
    latent_steps: int
    text_tokens: int
    worst: Difference

    def to_json(self) -> JsonObject:
        data = asdict(self)
        worst: JsonObject = data.pop("worst")
        return data | worst


@dataclass(frozen=True)
class Parity:
    """What the gate measured: the manifest's `parity` block.

    graphs: {graph: its worst difference}.
    layers: the relative difference of each decoder layer.
    decoding: None where the model is too large to decode beside torch's.
    """

    graphs: dict[str, Difference]
    layers: list[float]
    decoding: DecodingParity | None

    def to_json(self) -> JsonObject:
        return {
            "tolerance": TOLERANCE,
            "graphs": {name: asdict(gap) for name, gap in self.graphs.items()},
            "layers": self.layers,
            "decoding": None if self.decoding is None else self.decoding.to_json(),
        }


def difference(got: np.ndarray, want: np.ndarray) -> Difference:
    gap = got.astype(np.float64) - want.astype(np.float64)
    norm = float(np.linalg.norm(want.astype(np.float64)))
    return Difference(
        cases=1,
        max_abs=float(np.abs(gap).max()),
        mean_abs=float(np.abs(gap).mean()),
        relative=float(np.linalg.norm(gap)) / max(norm, 1e-30),
    )


def compare(
    name: str,
    got: np.ndarray,
    want: np.ndarray,
    tolerance: float = TOLERANCE,
) -> Difference:
    """The difference of two arrays. Raises LvrError with the numbers where shapes differ or the
    relative difference exceeds `tolerance` (or is not a number).
    """
    if got.shape != want.shape:
        raise LvrError(f"parity: {name} has shape {got.shape}, torch has {want.shape}")
    gap = difference(got, want)
    # Not `>`, so that NaN fails.
    if not gap.relative <= tolerance:
        raise LvrError(
            f"parity: {name} differs from torch: max {gap.max_abs:.3g}, mean {gap.mean_abs:.3g}, "
            f"relative {gap.relative:.3g} (tolerance {tolerance:g})"
        )
    return gap


def check_graphs(
    got: Runtime,
    want: Runtime,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Difference]:
    """{graph: worst difference over its cases}. Raises LvrError naming the graph that is out of
    tolerance.
    """
    rng = np.random.default_rng(seed)
    checks = {
        "vision_encoder": _check_vision,
        "embed_tokens": _check_embedding,
        "decoder": _check_decoder,
        "lm_head": _check_head,
    }
    return {n: worst(list(check(got, want, tolerance, rng))) for n, check in checks.items()}


def vision_cases(processor: Processor, rng: np.random.Generator) -> Iterator[Pixels]:
    """Pictures of noise as the vision graph reads them, a case a row of VISION_SIZES."""
    for sizes in VISION_SIZES:
        noise = [
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes
        ]
        yield processor.see([Image.fromarray(pixels) for pixels in noise])


def prefill_positions(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Positions (3, B, S) below FIRST_STEP, the three axes apart, as inside a picture."""
    return np.sort(rng.integers(0, FIRST_STEP, (3, batch, length)), axis=-1)


def _check_vision(
    got: Runtime,
    want: Runtime,
    tolerance: float,
    rng: np.random.Generator,
) -> Iterator[Difference]:
    for pixels in vision_cases(want.processor, rng):
        mine = got.encode(pixels.patches, pixels.grids)
        reference = want.encode(pixels.patches, pixels.grids)
        yield compare(f"vision_encoder {pixels.grids}", mine, reference, tolerance)


def _random_ids(rng: np.random.Generator, runtime: Runtime, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, runtime.processor.tokenizer.get_vocab_size(), shape, np.int64)


def _check_embedding(
    got: Runtime,
    want: Runtime,
    tolerance: float,
    rng: np.random.Generator,
) -> Iterator[Difference]:
    for shape in ((1, 1), (2, 9)):
        ids = _random_ids(rng, want, shape)
        yield compare("embed_tokens", got.embed(ids), want.embed(ids), tolerance)


def _check_head(
    got: Runtime,
    want: Runtime,
    tolerance: float,
    rng: np.random.Generator,
) -> Iterator[Difference]:
    for rows in (1, 3):
        hidden = rng.standard_normal((rows, want.hidden_size)).astype(np.float32)
        yield compare("lm_head", got.head(hidden), want.head(hidden), tolerance)


def _check_decoder(
    got: Runtime,
    want: Runtime,
    tolerance: float,
    rng: np.random.Generator,
) -> Iterator[Difference]:
    """Prefill of padded rows, then steps fed with torch's own hidden states, so that each step is
    compared on the same input.
    """
    for rows in LENGTHS:
        lengths = np.array(rows)
        batch = len(lengths)
        longest = int(lengths.max())
        embeds = want.embed(_random_ids(rng, want, (batch, longest)))
        positions = prefill_positions(rng, batch, longest)
        for runtime in (got, want):
            runtime.start(batch, longest + STEPS)
        mine = got.prefill(embeds, positions, lengths)
        reference = want.prefill(embeds, positions, lengths)
        yield compare(f"decoder prefill of {rows}", mine, reference, tolerance)
        for step in range(STEPS):
            hidden = np.array(reference)
            following = FIRST_STEP + step + np.arange(batch)
            mine = got.step(hidden, following)
            reference = want.step(hidden, following)
            yield compare(f"decoder step {step + 1} after {rows}", mine, reference, tolerance)


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
    got: Runtime,
    want: Runtime,
    tolerance: float = TOLERANCE,
    latents: int = 4,
    tokens: int = 6,
) -> DecodingParity:
    """Whole decodings of a few pictures, alone and as one batch: the same tokens, and hidden states
    within `tolerance` at every step.

    Raises LvrError naming the first place where the two part.
    """
    options = Options(max_tokens=tokens, min_tokens=tokens, keep_hidden=True)
    shown = pictures()
    groups = [*([picture] for picture in shown), shown]
    differences: list[Difference] = []
    for group in groups:
        mine = _decode(got, group, latents, options)
        reference = _decode(want, group, latents, options)
        for a, b in zip(mine, reference, strict=True):
            _check_tokens(a.tokens, b.tokens)
            for i, (x, y) in enumerate(zip(a.hidden, b.hidden, strict=True)):
                differences.append(compare(f"decoding, hidden state {i}", x, y, tolerance))
    return DecodingParity(
        prompts=sum(len(group) for group in groups),
        latent_steps=latents,
        text_tokens=tokens,
        worst=worst(differences),
    )


def _check_tokens(got: Sequence[int], want: Sequence[int]) -> None:
    for i, (mine, reference) in enumerate(zip(got, want, strict=True)):
        if mine != reference:
            raise LvrError(
                f"parity: decoding parts from torch at text token {i + 1}: {mine}, "
                f"torch {reference}"
            )


def _decode(
    runtime: Runtime,
    pictures: list[Image.Image],
    latents: int,
    options: Options,
) -> list[Result]:
    prompts = [prepare_prompt(runtime, [picture], "What is here?")[0] for picture in pictures]
    return decode(StartsWithLatents(runtime, latents), prompts, options)


def pictures() -> list[Image.Image]:
    """Coloured noise over a gradient, the same every time."""
    rng = np.random.default_rng(7)
    noisy = []
    for width, height in DECODING_SIZES:
        slope = np.linspace(0, 255, width * height).reshape(height, width, 1)
        noise = rng.integers(0, 256, (height, width, 3))
        noisy.append(Image.fromarray(((slope + noise) / 2).astype(np.uint8)))
    return noisy
