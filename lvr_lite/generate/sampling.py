"""Choosing the next token: pure functions on logits (V,). May import: numpy."""

from __future__ import annotations

import numpy as np


def greedy(logits: np.ndarray) -> int:
    """The most likely id; the lowest one among equals."""
    return int(logits.argmax())


def probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Softmax at `temperature` > 0, cut to the smallest set of tokens whose probability reaches
    `top_p` in (0, 1]; sums to 1.
    """
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if top_p < 1.0:
        order = np.argsort(-p, kind="stable")
        likely_first = p[order]
        before = np.cumsum(likely_first) - likely_first
        unlikely = order[before >= top_p]
        p[unlikely] = 0.0
        p /= p.sum()
    return np.asarray(p)


def log_probability(logits: np.ndarray, temperature: float, token: int) -> float:
    """Of an id at `temperature` > 0, among all ids."""
    scaled = logits.astype(np.float64) / temperature
    most = scaled.max()
    total = np.log(np.exp(scaled - most).sum())
    return float(scaled[token] - most - total)


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
