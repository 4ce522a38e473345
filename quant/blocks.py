"""Block-wise integer weights: how a matrix is cut into blocks, rounded, packed. May import: numpy,
torch, the core.

A block of consecutive values shares a scale (and, where asymmetric, a zero point): value = (q -
zero) * scale, q in 0 … 2**bits - 1. ONNX Runtime's packing: two 4-bit values a byte, the earlier
one low (MatMulNBits, GatherBlockQuantized).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from lvr_lite.system import usable_cores

CHUNK = 1 << 18  # values rounded together
DAMPING = 0.01  # of the mean power, added to every column's
LAZY = 128  # columns whose errors reach those after them in one product
LARGEST = 2.0**18  # of a value; its scale must fit float16
SHRINK = np.linspace(
    1.0, 0.7, 13, dtype=np.float32
)  # scales tried, as a part of the one that reaches the largest value


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix (rows, columns), blocks along the columns.

    values: (rows, blocks, block) uint8, unpacked, the last block padded with the zero point.
    scales: (rows, blocks) float32, every one of them a value that float16 holds, since that is how
    it is stored. zeros: (rows, blocks) uint8, or None where symmetric: then the zero point is
    2**(bits - 1) everywhere.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    columns: int

    def rows(self, part: slice) -> Blocks:
        return replace(
            self,
            values=self.values[part],
            scales=self.scales[part],
            zeros=None if self.zeros is None else self.zeros[part],
        )

    def dense(self) -> np.ndarray:
        """The matrix (rows, columns) float32 that the integers stand for."""
        zero = (
            np.float32(1 << (self.bits - 1))
            if self.zeros is None
            else self.zeros[..., None].astype(np.float32)
        )
        whole = (self.values.astype(np.float32) - zero) * self.scales[..., None]
        return np.asarray(whole.reshape(len(whole), -1)[:, : self.columns])


def quantize(
    matrix: np.ndarray, bits: int, block: int, symmetric: bool, importance: np.ndarray | None = None
) -> Blocks:
    """Round a float32 matrix (rows, columns), of the scales tried keeping the one with the least
    squared error in each block.

    importance (columns,): how much a squared error in each column counts, such as the mean square
    of what it is multiplied with.
    """
    rows, columns = matrix.shape
    count = -(-columns // block)
    values = np.zeros((rows, count, block), np.uint8)
    scales, zeros = np.zeros((rows, count), np.float32), np.zeros((rows, count), np.uint8)
    weight = None
    if importance is not None:
        padded = np.zeros(count * block, np.float32)
        padded[:columns] = importance
        weight = padded.reshape(count, block) + 1e-6 * float(importance.max() or 1)

    def some(first: int) -> None:
        part = slice(first, first + step)
        x = np.zeros((len(matrix[part]), count * block), np.float32)
        x[:, :columns] = matrix[part]
        values[part], scales[part], zeros[part] = _round(
            x.reshape(-1, count, block), bits, symmetric, weight
        )

    step = max(1, CHUNK // (count * block))  # rows whose every intermediate stays in the cache
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(some, range(0, rows, step)))
    return Blocks(values, scales, None if symmetric else zeros, bits, columns)


def storable(scale: np.ndarray) -> np.ndarray:
    """The nearest scale that float16 holds; none becomes 0, which would forget a sign and be
    divided by.
    """
    held = scale.astype(np.float16).astype(np.float32)
    return np.where(held == 0, np.copysign(np.float32(2**-24), scale), held)


def _round(
    x: np.ndarray, bits: int, symmetric: bool, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    find = _symmetric if symmetric else _asymmetric
    best: tuple[np.ndarray, ...] | None = None
    for shrink in SHRINK if bits < 8 else SHRINK[:1]:  # at 8 bits clipping never pays
        q, scale, zero = find(x, bits, shrink, weight)
        gap = np.square((q - zero[..., None]) * scale[..., None] - x)
        error = (gap if weight is None else gap * weight).sum(-1)
        if best is None:
            best = (error, q, scale, zero)
            continue
        better = error < best[0]
        for kept, new in zip(best, (error, q, scale, zero), strict=True):
            kept[better] = new[better]
    assert best is not None
    return best[1].astype(np.uint8), best[2], best[3].astype(np.uint8)


def gptq(
    matrix: np.ndarray, products: np.ndarray, bits: int, block: int, symmetric: bool
) -> Blocks:
    """Round a float32 matrix (rows, columns) so that its *products* stay close: the error of each
    column is made up for by those not rounded yet (GPTQ, arXiv 2210.17323), columns of large inputs
    first; scales are `quantize`'s, found beforehand.

    products (columns, columns): the sum of x xᵀ over inputs x.
    """
    columns = matrix.shape[1]
    power = np.diagonal(products).astype(np.float32)
    found = quantize(matrix, bits, block, symmetric, power)
    order = np.argsort(-power, kind="stable")
    upper = _factor(products[np.ix_(order, order)])
    left = np.ascontiguousarray(matrix[:, order].T)  # (columns, rows): what is still to be rounded
    zero = (
        np.full(found.scales.shape, 1 << (bits - 1), np.float32)
        if found.zeros is None
        else found.zeros.astype(np.float32)
    )
    top = (1 << bits) - 1
    for begin in range(0, columns, LAZY):
        end = min(begin + LAZY, columns)
        errors = np.zeros((end - begin, len(matrix)), np.float32)
        for i in range(begin, end):
            at, place = divmod(int(order[i]), block)
            scale = found.scales[:, at]
            q = np.clip(np.rint(left[i] / scale) + zero[:, at], 0, top)
            found.values[:, at, place] = q.astype(np.uint8)
            errors[i - begin] = (left[i] - (q - zero[:, at]) * scale) / upper[i, i]
            left[i + 1 : end] -= upper[i, i + 1 : end, None] * errors[i - begin]
        left[end:] -= upper[begin:end, end:].T @ errors
    return found


def _factor(products: np.ndarray) -> np.ndarray:
    """Upper triangular U, Uᵀ U the inverse of `products`, damped: from the Cholesky factor of the
    reversed matrix, without inverting.
    """
    damped = torch.from_numpy(np.array(products[::-1, ::-1], np.float64))
    damped.diagonal().add_(DAMPING * max(float(damped.diagonal().mean()), 1e-10))
    lower = torch.linalg.cholesky(damped)
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(damped), dtype=torch.float64), upper=False
    )
    return np.ascontiguousarray(inverse.numpy()[::-1, ::-1], np.float32)


Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def _symmetric(x: np.ndarray, bits: int, shrink: np.float32, weight: np.ndarray | None) -> Found:
    half = 1 << (bits - 1)
    low, high = x.min(-1), x.max(-1)
    extreme = np.where(
        -low > high, low, high
    )  # its sign decides the scale's: q has one step more below zero than above
    scale = _nonzero(extreme * shrink / -half)
    q = np.clip(np.rint(x / scale[..., None]), -half, half - 1)
    scale = _refit(x, q, scale, weight)
    return q + half, scale, np.full(scale.shape, half, np.float32)


def _asymmetric(x: np.ndarray, bits: int, shrink: np.float32, weight: np.ndarray | None) -> Found:
    top = (1 << bits) - 1
    low, high = np.minimum(x.min(-1), 0) * shrink, np.maximum(x.max(-1), 0) * shrink
    scale = _nonzero((high - low) / top)
    zero = np.clip(np.rint(-low / scale), 0, top)
    q = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, top)
    return q, _refit(x, q - zero[..., None], scale, weight), zero


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _refit(
    x: np.ndarray, q: np.ndarray, scale: np.ndarray, weight: np.ndarray | None
) -> np.ndarray:
    """The scale with the least squared error for these integers; `scale` where all are 0."""
    counted = q if weight is None else q * weight
    square = (counted * q).sum(-1)
    return storable(
        np.where(square > 0, (counted * x).sum(-1) / np.where(square > 0, square, 1), scale).astype(
            np.float32
        )
    )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values (…, n) -> bytes: as they are at 8 bits; at 4, two a byte, an odd one at the end
    alone.
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return np.asarray(values[..., ::2] | (values[..., 1::2] << 4))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """What `pack` made -> uint8 values; of 4 bits always two a byte."""
    return (
        packed
        if bits == 8
        else np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    )
