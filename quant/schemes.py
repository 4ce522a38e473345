"""How the weights of a bundle are rounded: bits, blocks, zero points. May import: numpy and the
core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lvr_lite.errors import UsageError
from lvr_lite.model import bundle

SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Scheme:
    """How one matrix is rounded.

    bits: 4 or 8 a weight.
    block: values of a row that share a scale.
    symmetric: True for no zero points.
    """

    bits: int
    block: int
    symmetric: bool

    def fit(self, columns: int) -> Scheme:
        """This scheme for a matrix of so many columns: with its block, half of it or a quarter,
        whichever is the largest that divides them.

        A block that is padded would waste bytes, and could not be shared with a Gather. It stays
        where nothing divides the columns.
        """
        for block in (self.block, self.block // 2, self.block // 4):
            if columns % block == 0 and block >= SMALLEST_BLOCK:
                return replace(self, block=block)
        return self

    def __str__(self) -> str:
        zeros = "" if self.symmetric else ", zero points"
        return f"{self.bits} bits, block {self.block}{zeros}"


# Measured on real weights (docs/results/quant.md): small blocks with zero points keep a perplexity
# within 0.3 %, large ones within 1.1 %.
INT8 = Scheme(bits=8, block=32, symmetric=False)
# What stays in 8 bits beside 4.
COMPACT = Scheme(bits=8, block=128, symmetric=True)
# Rounded with GPTQ, zero points and blocks of 64 are no better; without them a product takes 12 %
# less (docs/results/runtime.md).
INT4 = Scheme(bits=4, block=128, symmetric=True)

# {precision: {graph: scheme}}. The decoder's weights are read at every step, so they are worth 4
# bits; vision runs once, and the head decides near ties.
SCHEMES = {
    "int8": dict.fromkeys(bundle.GRAPHS, INT8),
    "int4": dict.fromkeys(bundle.GRAPHS, COMPACT) | {"decoder": INT4},
}


@dataclass(frozen=True)
class RoundingPlan:
    """How each weight of a bundle is rounded.

    by_graph: {graph: scheme}.
    by_weight: {"graph/weight": scheme} where it is another.
    products: {"graph/weight": sum of x xᵀ over its inputs x}; these weights are rounded with GPTQ.
    cache: folder of what GPTQ has rounded, from which a second bundle of the same products takes
        it; None rounds anew.
    """

    by_graph: dict[str, Scheme]
    by_weight: dict[str, Scheme] = field(default_factory=dict)
    products: Mapping[str, np.ndarray] = field(default_factory=dict)
    cache: Path | None = None

    def scheme(self, graph: str, weight: str, columns: int) -> Scheme:
        scheme = self.by_weight.get(f"{graph}/{weight}", self.by_graph[graph])
        return scheme.fit(columns)


def plan_of(precision: str, block: int | None = None) -> RoundingPlan:
    """The plan of "int8" or "int4"; block: values that share a scale where weights have 4 bits.

    Raises UsageError for a block that the kernels do not have.
    """
    if block is None:
        return RoundingPlan(SCHEMES[precision])
    if block < SMALLEST_BLOCK or block & (block - 1):
        raise UsageError(f"block {block}: must be a power of two, {SMALLEST_BLOCK} or more")
    schemes = {}
    for graph, scheme in SCHEMES[precision].items():
        schemes[graph] = replace(scheme, block=block) if scheme.bits == 4 else scheme
    return RoundingPlan(schemes)
