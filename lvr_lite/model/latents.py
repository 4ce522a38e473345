"""Nearness of latents to visual tokens, and the second reading: arithmetic on indices.

May import: numpy, lvr_lite.model.spec.

In a bottleneck a prompt is read a second time, with its K latents for its picture. Each latent
takes the place of the visual token that it is nearest to; latents in one place become their mean:

    prompt            is  the  [v0 v1 v2 v3 v4 v5]  star  red
    nearest tokens of four latents: v4, v1, v4, v0
    second reading    is  the  [mean(z0, z2) z1 z3]  star  red
    positions         as before; those of the latents are those of v4, v1, v0

Decoding, training, scoring (GRPO), `--look` and `probe` all call this module. `likeness`, `near`,
`means` take arrays of numpy or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lvr_lite.model.spec import TokenIds

# An array of numpy or torch: this module also runs where torch is not installed.
Array = Any

# A visual token whose distance from the mean is at most this part of the mean's length differs
# from it by rounding alone.
_SAME = 1e-4


def likeness(latents: Array, features: Array, mean: Array | None = None) -> Array:
    """Cosine (K, T) of each latent to each visual token less the mean token.

    Visual tokens share a large part, which tells none of them apart, so their mean is taken off.
    A token that differs from the mean by rounding alone is like no latent: 0. So are all tokens of
    a picture of one colour, and all tokens for a latent of zeros.

    latents: (K, H).
    features: (T, H); of wider ones the first H numbers count, those that stand in the prompt.
    mean: (H,), what the tokens share; that of `features` by default.
    """
    features = features[:, : latents.shape[-1]]
    if mean is None:
        mean = features.mean(0)
    apart = features - mean
    squares = (apart * apart).sum(axis=-1)
    differs = squares > (_SAME * _SAME) * (mean * mean).sum()
    apart = apart * differs[:, None]
    lengths = (latents * latents).sum(axis=-1)[:, None] * squares[None]
    return (latents @ apart.T) / (lengths + 1e-30) ** 0.5


def near(latents: Array, features: Array, mean: Array | None = None) -> Array:
    """The visual token (K,) that each latent is most like; the first one among equals."""
    return likeness(latents, features, mean).argmax(-1)


def means(nearest: Array) -> tuple[Array, Array]:
    """How latents that are nearest to one visual token become one latent, their mean.

    nearest: (K,), as `near` gives it.

    Returns (weights, first).
    weights: (K, K); row k times the latents is the mean of those that share the token of latent k.
    first: (K,) bool, whether no latent before k shares its token; these stand for all.
    """
    alike = nearest[:, None] == nearest[None]
    first = alike.cumsum(-1).diagonal() == 1
    return alike / alike.sum(axis=-1, keepdims=True), first


def columns_read_again(is_image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which columns of a prompt are read again, in order: the text, and some visual tokens.

    is_image: (S,) bool, where the prompt's visual tokens are; at least one.
    places: (N,), which of these are read, latents in their place; all where the first one stood.
    """
    text = np.flatnonzero(~is_image)
    image = np.flatnonzero(is_image)
    before = int(is_image.argmax())
    return np.concatenate([text[:before], image[places], text[before:]])


@dataclass(frozen=True)
class SecondReading:
    """A prompt with N latents for its visual tokens.

    ids: (S,) int64, <|lvr|> in the places of the latents.
    positions: (3, S) int64.
    shares: (N, K) float32; what stands in the places of the latents is shares @ latents.
    """

    ids: np.ndarray
    positions: np.ndarray
    shares: np.ndarray


def second_reading(
    ids: np.ndarray,
    positions: np.ndarray,
    features: np.ndarray,
    latents: np.ndarray,
    tokens: TokenIds,
) -> SecondReading:
    """A prompt as it is read after its latents are known.

    Without a picture the latents come last, all K of them.

    ids, positions: of the prompt, (S,) and (3, S).
    features: (T, H), or wider, its visual tokens.
    latents: (K, H).
    """
    is_image = ids == tokens.image
    if not is_image.any():
        count = len(latents)
        following = positions.max() + 1 + np.broadcast_to(np.arange(count), (3, count))
        return SecondReading(
            np.concatenate([ids, np.full(count, tokens.lvr)]),
            np.concatenate([positions, following], 1),
            np.eye(count, dtype=np.float32),
        )
    nearest = near(latents, features)
    weights, first = means(nearest)
    columns = columns_read_again(is_image, nearest[first])
    return SecondReading(
        np.where(is_image, tokens.lvr, ids)[columns],
        positions[:, columns],
        weights[first].astype(np.float32),
    )
