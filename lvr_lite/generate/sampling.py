"""Choosing the next token: pure functions on logits (V,). May import: numpy and what stands above
`generate`.
"""

from __future__ import annotations

import numpy as np

from lvr_lite.errors import NotFiniteError


def greedy(logits: np.ndarray) -> int:
    """The most likely id; the lowest one among equals. Raises NotFiniteError for NaN."""
    # To numpy a NaN is the largest of all.
    most_likely = int(logits.argmax())
    if np.isnan(logits[most_likely]):
        raise not_finite(logits[most_likely])
    return most_likely


def not_finite(value: float) -> NotFiniteError:
    """The error of logits of which the largest is this value."""
    return NotFiniteError(
        f"the model's logits are not finite ({value}): its weights are damaged, or its numbers "
        "overflow in this precision; take fp32, or another checkpoint"
    )


def _scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logits (V,) over the temperature, in float64, the largest of them 0."""
    most = float(logits[greedy(logits)])
    if not np.isfinite(most):
        raise not_finite(most)
    # Before the division, which overflows at the lowest temperatures.
    below = logits.astype(np.float64) - most
    with np.errstate(over="ignore"):
        return np.asarray(below / temperature)


def probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Softmax at `temperature` > 0, cut to the smallest set of tokens whose probability reaches
    `top_p` in (0, 1]; sums to 1. Raises NotFiniteError where the largest is not
    finite.
    """
    p = np.exp(_scaled(logits, temperature))
    p /= p.sum()
    if top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        likely_first = p[order]
        before = np.cumsum(likely_first) - likely_first
        unlikely = order[before >= top_p]
        p[unlikely] = 0.0
        p /= p.sum()
    return np.asarray(p)


def sample(
    logits: np.ndarray,
    temperature: float,
    top_p: float,
    rng: np.random.Generator,
) -> int:
    """An id drawn from `probabilities`; temperature 0 is greedy."""
    if temperature == 0:
        return greedy(logits)
    p = probabilities(logits, temperature, top_p)
    choice = rng.choice(len(logits), p=p)
    return int(choice)
