"""Nearness of latents to visual tokens. May import: the standard library."""

from __future__ import annotations

from typing import Any

_SAME = 1e-4  # tokens that differ from their mean by this part of it differ by rounding alone


def likeness(latents: Any, features: Any) -> Any:
    """Cosine (K, T) of latents (K, H) to the visual tokens (T, H) of a picture less their mean;
    arrays of numpy or torch. Of wider tokens the first H numbers are compared, those that stand in
    the prompt.

    Tokens share a large part, which tells none of them apart. One that differs from the mean by
    rounding alone (all of a picture of one colour), and a latent of zeros, is like none: 0.
    """
    features = features[:, : latents.shape[-1]]
    mean = features.mean(0)
    apart = features - mean
    squares = (apart * apart).sum(axis=-1)
    apart = apart * (squares > (_SAME * _SAME) * (mean * mean).sum())[:, None]
    lengths = (latents * latents).sum(axis=-1)[:, None] * squares[None]
    return (latents @ apart.T) / (lengths + 1e-30) ** 0.5
