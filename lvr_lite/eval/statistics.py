"""Statistics of the probe: paired comparisons of right and wrong answers, and the shape of sets of
vectors. May import: numpy.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test (Fay 2010, "exact McNemar"): how likely a fair coin
    splits `lost + gained` discordant pairs at least so unevenly. 1.0 where there are none.

    lost: items that are right before and wrong after.
    gained: items that are wrong before and right after.
    """
    n = lost + gained
    # Ways of choosing k of n, and their sum so far: whole numbers, exact at any size.
    ways = 1
    tail = 1
    for k in range(min(lost, gained)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return float(min(1.0, 2 * tail / 2**n))


def bootstrap_mean(
    values: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of values (n,), n >= 1. With paired
    differences as values it is the paired bootstrap.

    Drawing n items with replacement is drawing how often each distinct value comes, so a resample
    is one multinomial: exact, and small in memory.
    """
    distinct, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(
        n,
        counts / n,
        size=resamples,
    )
    low, high = np.percentile(draws @ distinct / n, [2.5, 97.5])
    return float(low), float(high)


def grouped(values: np.ndarray, groups: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values (n,) over each group (G,), and the groups' sizes (G,). groups: a name for each
    value.
    """
    _, places = np.unique(groups, return_inverse=True)
    return np.bincount(places, weights=values), np.bincount(places)


def bootstrap_ratio(
    sums: np.ndarray, sizes: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over items in G groups, of which whole ones
    are drawn.

    sums, sizes: of the groups (G,), as `grouped` gives them.
    """
    count = len(sums)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(
        count,
        np.full(count, 1 / count),
        size=resamples,
    )
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (…, H) at length 1; a vector of zeros stays one."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(
        np.divide(
            vectors,
            norms,
            out=np.zeros_like(vectors),
            where=norms > 0,
        )
    )


def participation_ratio(vectors: np.ndarray) -> float | None:
    """Number of directions that vectors (N, H) use: (Σλ)² / Σλ² over the eigenvalues λ of their
    covariance, 1 to min(N - 1, H). None where the vectors do not vary.

    It is computed from the trace of the covariance and of its square, without eigenvalues.
    """
    mean = np.mean(vectors, axis=0, dtype=np.float64)
    centred = np.asarray(vectors, np.float64) - mean
    trace = float((centred**2).sum())
    negligible = 1e-5 * np.linalg.norm(vectors)
    if trace <= negligible**2:
        return None
    count, width = centred.shape
    # Both products have the same eigenvalues but zeros; the smaller one is computed.
    gram = centred @ centred.T if count < width else centred.T @ centred
    return trace**2 / float((gram**2).sum())


def mean_cosine(vectors: np.ndarray) -> float | None:
    """Mean cosine between different ones of N vectors (N, H). Vectors of zeros count as 0. None for
    fewer than two.
    """
    n = len(vectors)
    if n < 2:
        return None
    directions = unit(np.asarray(vectors, np.float64))
    # The square of the sum has every pair twice, and each vector with itself.
    with_itself = (directions**2).sum()
    every_pair = (directions.sum(0) ** 2).sum()
    pairs = n * (n - 1)
    return float((every_pair - with_itself) / pairs)
