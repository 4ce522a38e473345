"""Nearness of latents to visual tokens, and the second reading: arithmetic on indices.

May import: numpy, lvr_lite.model.spec; torch where it is given torch's arrays.

In a bottleneck a prompt is read a second time, with its K latents for its picture. Each latent
takes the place of the visual token that it is nearest to; latents in one place become their mean:

    prompt            is  the  [v0 v1 v2 v3 v4 v5]  star  red
    nearest tokens of four latents: v4, v1, v4, v0
    second reading    is  the  [mean(z0, z2) z1 z3]  star  red
    positions         as before; those of the latents are those of v4, v1, v0

The ids that are read are the prompt's and, where the model said some words before it looked, those
after it; without a picture the latents come last.

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

    Torch's are computed in float32 whatever they are, without autocast, as numpy's are.

    latents: (K, H).
    features: (T, H); of wider ones the first H numbers count, those that stand in the prompt.
    mean: (H,), what the tokens share; that of `features` by default.
    """
    if isinstance(latents, np.ndarray):
        return _likeness(latents, features, mean)
    import torch

    with torch.autocast(latents.device.type, enabled=False):
        return _likeness(latents.float(), features.float(), mean)


def _likeness(latents: Array, features: Array, mean: Array | None) -> Array:
    """`likeness` in the type of its arrays."""
    width = latents.shape[-1]
    features = features[:, :width]
    if mean is None:
        mean = features.mean(0)
    apart = features - mean
    token_squares = (apart * apart).sum(axis=-1)  # (T,)
    latent_squares = (latents * latents).sum(axis=-1)  # (K,)
    smallest = (_SAME * _SAME) * (mean * mean).sum()
    differs = token_squares > smallest
    apart = apart * differs[:, None]
    products = latents @ apart.T  # (K, T)
    squares = latent_squares[:, None] * token_squares[None]
    # No division by 0 for latents of zeros.
    return products / (squares + 1e-30) ** 0.5


def near(latents: Array, features: Array, mean: Array | None = None) -> Array:
    """The visual token (K,) that each latent is most like; the first one among equals."""
    cosines = likeness(latents, features, mean)
    return cosines.argmax(-1)


def means(nearest: Array) -> tuple[Array, Array]:
    """How latents that are nearest to one visual token become one latent, their mean.

    nearest: (K,), as `near` gives it.

    Returns (weights, first).
    weights: (K, K); row k times the latents is the mean of those that share the token of latent k.
    first: (K,) bool, whether no latent before k shares its token; these stand for all.
    """
    alike = nearest[:, None] == nearest[None]  # (K, K)
    # How many latents up to each one share its token, itself included.
    so_far = alike.cumsum(-1).diagonal()
    first = so_far == 1
    counts = alike.sum(axis=-1, keepdims=True)
    return alike / counts, first


def columns_read_again(is_image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which columns of a prompt are read again, in order: the text, and some visual tokens.

    is_image: (S,) bool, where the prompt's visual tokens are; at least one.
    places: (N,), which of these are read, latents in their place; all where the first one stood.
    """
    text = np.flatnonzero(~is_image)
    image = np.flatnonzero(is_image)
    # All ids before the first visual token are text.
    before = int(is_image.argmax())
    parts = [text[:before], image[places], text[before:]]
    return np.concatenate(parts)


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

    ids, positions: of the prompt and the words before the look, (S,) and (3, S).
    features: (T, H), or wider, its visual tokens.
    latents: (K, H).
    """
    is_image = ids == tokens.image
    if not is_image.any():
        count = len(latents)
        following = positions.max() + 1 + np.arange(count)
        on_all_axes = np.broadcast_to(following, (3, count))
        return SecondReading(
            ids=np.concatenate([ids, np.full(count, tokens.lvr)]),
            positions=np.concatenate([positions, on_all_axes], 1),
            shares=np.eye(count, dtype=np.float32),
        )
    nearest = near(latents, features)
    weights, first = means(nearest)
    columns = columns_read_again(is_image, nearest[first])
    with_latents = np.where(is_image, tokens.lvr, ids)
    return SecondReading(
        ids=with_latents[columns],
        positions=positions[:, columns],
        shares=weights[first].astype(np.float32),
    )
