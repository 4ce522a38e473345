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
        zeros = None
        if self.zeros is not None:
            zeros = self.zeros[part]
        return replace(
            self,
            values=self.values[part],
            scales=self.scales[part],
            zeros=zeros,
        )

    def dense(self) -> np.ndarray:
        """The matrix (rows, columns) float32 that the integers stand for."""
        blocks = _values((self.values.astype(np.float32), self.scales, self.zero_points()))
        matrix = blocks.reshape(len(blocks), -1)
        # without the padding of the last block
        return matrix[:, : self.columns]

    def zero_points(self) -> np.ndarray:
        """(rows, blocks) float32, of symmetric blocks too."""
        if self.zeros is not None:
            return self.zeros.astype(np.float32)
        middle = 1 << (self.bits - 1)
        return np.full(self.scales.shape, middle, np.float32)


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
        largest = float(importance.max() or 1)
        weight += 1e-6 * largest
    values = np.zeros((rows, count, scheme.block), np.uint8)
    scales = np.zeros((rows, count), np.float32)
    zeros = np.zeros((rows, count), np.uint8)
    values_of_row = count * scheme.block
    step = max(1, CHUNK // values_of_row)

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
    smallest = np.float32(2**-24)
    return np.where(
        stored == 0,
        np.copysign(smallest, scale),
        stored,
    )


# q, scales and zero points of blocks; q (rows, blocks, block), the others (rows, blocks).
Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]


def _round(matrix: np.ndarray, scheme: Scheme, weight: np.ndarray | None) -> Rounded:
    x = _cut(matrix, scheme.block)
    best = _round_once(x, scheme, SHRINK[0], weight)
    least = _squared_error(x, best, weight)
    # At 8 bits clipping never pays.
    others = SHRINK[1:] if scheme.bits < 8 else ()
    for shrink in others:
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


def _values(rounded: Rounded) -> np.ndarray:
    """(rows, blocks, block) that the integers stand for."""
    q, scale, zero = rounded
    centred = q - zero[..., None]
    return np.asarray(centred * scale[..., None])


def _squared_error(x: np.ndarray, rounded: Rounded, weight: np.ndarray | None) -> np.ndarray:
    """(rows, blocks), of each block."""
    square = np.square(_values(rounded) - x)
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
    ordered_products = products[np.ix_(order, order)]
    upper = _factor(ordered_products)
    # (columns, rows): what is still to be rounded.
    rest = np.ascontiguousarray(matrix[:, order].T)
    for begin in range(0, columns, LAZY):
        end = min(begin + LAZY, columns)
        errors = np.zeros((end - begin, len(matrix)), np.float32)
        for i in range(begin, end):
            column = int(order[i])
            block, place = divmod(column, scheme.block)
            scale = rounded.scales[:, block]
            zero = zeros[:, block]
            q = np.rint(rest[i] / scale) + zero
            q = np.clip(q, 0, top)
            rounded.values[:, block, place] = q.astype(np.uint8)
            difference = rest[i] - (q - zero) * scale
            error = difference / upper[i, i]
            errors[i - begin] = error
            rest[i + 1 : end] -= upper[i, i + 1 : end, None] * error
        rest[end:] -= upper[begin:end, end:].T @ errors
    return rounded


def _factor(products: np.ndarray) -> np.ndarray:
    """Upper triangular U, Uᵀ U the inverse of `products`, damped: from the Cholesky factor of the
    reversed matrix, without inverting.
    """
    reversed_products = np.array(products[::-1, ::-1], np.float64)
    damped = torch.from_numpy(reversed_products)
    diagonal = damped.diagonal()
    mean = max(float(diagonal.mean()), 1e-10)
    diagonal.add_(DAMPING * mean)
    lower = torch.linalg.cholesky(damped)
    identity = torch.eye(len(damped), dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper = inverse.numpy()[::-1, ::-1]
    return np.ascontiguousarray(upper, np.float32)


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
        zero = np.rint(-low / scale)
        zero = np.clip(zero, 0, top)
    zeros = zero[..., None]
    q = np.rint(x / scale[..., None]) + zeros
    q = np.clip(q, 0, top)
    fitted = _refit(x, q - zeros, scale, weight)
    return q, fitted, zero


def _nonzero(scale: np.ndarray) -> np.ndarray:
    filled = np.where(scale == 0, np.float32(1), scale)
    return filled.astype(np.float32)


def _refit(
    x: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    weight: np.ndarray | None,
) -> np.ndarray:
    """The scale with the least squared error for these integers; `scale` where all are 0."""
    weighed = q
    if weight is not None:
        weighed = q * weight
    square = (weighed * q).sum(-1)
    product = (weighed * x).sum(-1)
    used = square > 0
    fitted = product / np.where(used, square, 1)
    chosen = np.where(used, fitted, scale)
    return storable(chosen.astype(np.float32))


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values (…, n) as bytes: as they are at 8 bits; at 4, two a byte, and a last one of an
    odd number with 0.
    """
    if bits == 8:
        return values
    *others, count = values.shape
    if count % 2:
        last = np.zeros((*others, 1), np.uint8)
        values = np.concatenate([values, last], -1)
    low = values[..., ::2]
    high = values[..., 1::2]
    return np.asarray(low | (high << 4))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """What `pack` made as uint8 values; of 4 bits always two a byte."""
    if bits == 8:
        return packed
    low = packed & 15
    high = packed >> 4
    pairs = np.stack((low, high), -1)
    *others, _ = packed.shape
    return pairs.reshape(*others, -1)
