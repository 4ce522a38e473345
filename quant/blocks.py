"""Block-wise integer weights: how a matrix is cut into blocks, rounded, packed. May import: numpy,
torch and what stands above `quant`.

A block of consecutive values shares a scale and, where asymmetric, a zero point: value = (q - zero)
* scale, q in 0 … 2**bits - 1. ONNX Runtime's packing: two 4-bit values a byte, the earlier one low
(MatMulNBits, GatherBlockQuantized).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from lvr_lite.quant.schemes import Scheme
from lvr_lite.system import usable_cores

# Values rounded together: every intermediate of so many stays in the processor's cache.
CHUNK = 1 << 18
# Part of the mean power that is added to every column's, so that GPTQ's matrix can be inverted.
DAMPING = 0.01
# Columns whose errors reach those after them in one product.
LAZY = 128
# Largest value of a weight: its scale must fit float16.
LARGEST = 2.0**18
# Scales tried, as a part of the one that reaches the largest value.
SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix (rows, columns), blocks along the columns.

    values: (rows, blocks, block) uint8, unpacked, the last block padded with the zero point.
    scales: (rows, blocks) float32, each a value that float16 holds, since it is stored so.
    zeros: (rows, blocks) uint8; None where symmetric: 2**(bits - 1) everywhere.
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
        q = self.values.astype(np.float32)
        whole = (q - self.zero_points()[..., None]) * self.scales[..., None]
        return np.asarray(whole.reshape(len(whole), -1)[:, : self.columns])

    def zero_points(self) -> np.ndarray:
        """(rows, blocks) float32, of symmetric blocks too."""
        if self.zeros is None:
            return np.full(self.scales.shape, 1 << (self.bits - 1), np.float32)
        return self.zeros.astype(np.float32)


def quantize(
    matrix: np.ndarray,
    scheme: Scheme,
    importance: np.ndarray | None = None,
) -> Blocks:
    """Round a float32 matrix (rows, columns): each block gets the scale, of those tried, with the
    least squared error.

    importance (columns,): how much a squared error in each column counts, such as the mean square
    of what it is multiplied with.
    """
    rows, columns = matrix.shape
    count = -(-columns // scheme.block)
    weight = None
    if importance is not None:
        # None of padding, and a little of columns without any importance.
        weight = _cut(importance[None], scheme.block)[0]
        weight += 1e-6 * float(importance.max() or 1)
    values = np.zeros((rows, count, scheme.block), np.uint8)
    scales = np.zeros((rows, count), np.float32)
    zeros = np.zeros((rows, count), np.uint8)
    step = max(1, CHUNK // (count * scheme.block))

    def round_rows(first: int) -> None:
        part = slice(first, first + step)
        rounded = _round(matrix[part], scheme, weight)
        values[part], scales[part], zeros[part] = rounded

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(round_rows, range(0, rows, step)))
    return Blocks(
        values=values,
        scales=scales,
        zeros=None if scheme.symmetric else zeros,
        bits=scheme.bits,
        columns=columns,
    )


def storable(scale: np.ndarray) -> np.ndarray:
    """The nearest scale that float16 holds; none becomes 0, which has no sign and divides by 0."""
    stored = scale.astype(np.float16).astype(np.float32)
    return np.where(stored == 0, np.copysign(np.float32(2**-24), scale), stored)


# q, scales and zero points of blocks; q (rows, blocks, block), the others (rows, blocks).
Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]


def _round(matrix: np.ndarray, scheme: Scheme, weight: np.ndarray | None) -> Rounded:
    x = _cut(matrix, scheme.block)
    best = _round_once(x, scheme, SHRINK[0], weight)
    least = _squared_error(x, best, weight)
    # At 8 bits clipping never pays.
    for shrink in SHRINK[1:] if scheme.bits < 8 else ():
        candidate = _round_once(x, scheme, shrink, weight)
        error = _squared_error(x, candidate, weight)
        better = error < least
        least[better] = error[better]
        for part, new in zip(best, candidate, strict=True):
            part[better] = new[better]
    q, scale, zero = best
    return q.astype(np.uint8), scale, zero.astype(np.uint8)


def _cut(matrix: np.ndarray, block: int) -> np.ndarray:
    """(rows, blocks, block), the last block padded with 0."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    x = np.zeros((rows, count * block), np.float32)
    x[:, :columns] = matrix
    return x.reshape(rows, count, block)


def _squared_error(x: np.ndarray, rounded: Rounded, weight: np.ndarray | None) -> np.ndarray:
    """(rows, blocks), of each block."""
    q, scale, zero = rounded
    rounded_x = (q - zero[..., None]) * scale[..., None]
    square = np.square(rounded_x - x)
    if weight is not None:
        square = square * weight
    return np.asarray(square.sum(-1))


def gptq(matrix: np.ndarray, products: np.ndarray, scheme: Scheme) -> Blocks:
    """Round a float32 matrix (rows, columns) so that its *products* stay close (GPTQ, arXiv
    2210.17323): columns that are not rounded yet make up for the error of each one that is. Columns
    of large inputs come first; scales are those that `quantize` finds beforehand.

    products (columns, columns): the sum of x xᵀ over inputs x.
    """
    columns = matrix.shape[1]
    power = np.diagonal(products).astype(np.float32)
    rounded = quantize(matrix, scheme, power)
    zeros = rounded.zero_points()
    top = (1 << scheme.bits) - 1
    order = np.argsort(-power, kind="stable")
    upper = _factor(products[np.ix_(order, order)])
    # (columns, rows): what is still to be rounded.
    rest = np.ascontiguousarray(matrix[:, order].T)
    for begin in range(0, columns, LAZY):
        end = min(begin + LAZY, columns)
        errors = np.zeros((end - begin, len(matrix)), np.float32)
        for i in range(begin, end):
            at, place = divmod(int(order[i]), scheme.block)
            scale = rounded.scales[:, at]
            zero = zeros[:, at]
            q = np.clip(np.rint(rest[i] / scale) + zero, 0, top)
            rounded.values[:, at, place] = q.astype(np.uint8)
            error = (rest[i] - (q - zero) * scale) / upper[i, i]
            errors[i - begin] = error
            rest[i + 1 : end] -= upper[i, i + 1 : end, None] * error
        rest[end:] -= upper[begin:end, end:].T @ errors
    return rounded


def _factor(products: np.ndarray) -> np.ndarray:
    """Upper triangular U, Uᵀ U the inverse of `products`, damped: from the Cholesky factor of the
    reversed matrix, without inverting.
    """
    damped = torch.from_numpy(np.array(products[::-1, ::-1], np.float64))
    damped.diagonal().add_(DAMPING * max(float(damped.diagonal().mean()), 1e-10))
    lower = torch.linalg.cholesky(damped)
    identity = torch.eye(len(damped), dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return np.ascontiguousarray(inverse.numpy()[::-1, ::-1], np.float32)


def _round_once(
    x: np.ndarray,
    scheme: Scheme,
    shrink: np.float32,
    weight: np.ndarray | None,
) -> Rounded:
    """With scales that reach the part `shrink` of the largest values, refitted."""
    top = (1 << scheme.bits) - 1
    low = x.min(-1)
    high = x.max(-1)
    if scheme.symmetric:
        half = 1 << (scheme.bits - 1)
        # The sign of the value furthest from 0 decides the scale's: q has one step more below.
        extreme = np.where(-low > high, low, high)
        scale = _nonzero(extreme * shrink / -half)
        zero = np.full(scale.shape, half, np.float32)
    else:
        low = np.minimum(low, 0) * shrink
        high = np.maximum(high, 0) * shrink
        scale = _nonzero((high - low) / top)
        zero = np.clip(np.rint(-low / scale), 0, top)
    zeros = zero[..., None]
    q = np.clip(np.rint(x / scale[..., None]) + zeros, 0, top)
    return q, _refit(x, q - zeros, scale, weight), zero


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _refit(
    x: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray | None,
) -> np.ndarray:
    """The scale with the least squared error for these integers; `scale` where all are 0."""
    weighed = q if weight is None else q * weight
    square = (weighed * q).sum(-1)
    used = square > 0
    fitted = (weighed * x).sum(-1) / np.where(used, square, 1)
    return storable(np.where(used, fitted, scale).astype(np.float32))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values (…, n) as bytes: as they are at 8 bits; at 4, two a byte, and a last one of an
    odd number with 0.
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        last = np.zeros((*values.shape[:-1], 1), np.uint8)
        values = np.concatenate([values, last], -1)
    low = values[..., ::2]
    high = values[..., 1::2]
    return np.asarray(low | (high << 4))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """What `pack` made as uint8 values; of 4 bits always two a byte."""
    if bits == 8:
        return packed
    pairs = np.stack((packed & 15, packed >> 4), -1)
    return pairs.reshape(*packed.shape[:-1], -1)
