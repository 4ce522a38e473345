"""Block-wise integer weights: how a matrix is cut into blocks, rounded, packed. May import: numpy.

A block of consecutive values shares a scale (and, where asymmetric, a zero point): value = (q - zero) * scale, q in 0 … 2**bits - 1.
ONNX Runtime's packing: two 4-bit values a byte, the earlier one low (MatMulNBits, GatherBlockQuantized).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHRINK = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # scales tried, as a part of the one that reaches the largest value


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix (rows, columns), blocks along the columns.

    values: (rows, blocks, block) uint8, unpacked, the last block padded with the zero point. scales: (rows, blocks) float32.
    zeros: (rows, blocks) uint8, or None where symmetric: then the zero point is 2**(bits - 1) everywhere.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    columns: int

    def dense(self) -> np.ndarray:
        """The matrix (rows, columns) float32 that the integers stand for."""
        zero = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[..., None].astype(np.float32)
        whole = (self.values.astype(np.float32) - zero) * self.scales[..., None]
        return np.asarray(whole.reshape(len(whole), -1)[:, : self.columns])


def quantize(matrix: np.ndarray, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round a float32 matrix (rows, columns), of the scales tried keeping the one with the least squared error in each block."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    x = np.zeros((rows, count * block), np.float32)
    x[:, :columns] = matrix
    x = x.reshape(rows, count, block)
    find = _symmetric if symmetric else _asymmetric
    best_error = np.full((rows, count), np.inf, np.float32)
    values = np.zeros(x.shape, np.uint8)
    scales, zeros = np.zeros((rows, count), np.float32), np.zeros((rows, count), np.uint8)
    for shrink in SHRINK if bits < 8 else SHRINK[:1]:  # at 8 bits clipping never pays
        q, scale, zero = find(x, bits, shrink)
        error = np.square((q - zero[..., None]) * scale[..., None] - x).sum(-1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        values[better], scales[better], zeros[better] = q[better], scale[better], zero[better]
    return Blocks(values, scales, None if symmetric else zeros, bits, columns)


def _symmetric(x: np.ndarray, bits: int, shrink: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    half = 1 << (bits - 1)
    low, high = x.min(-1), x.max(-1)
    extreme = np.where(-low > high, low, high)  # its sign decides the scale's: q has one step more below zero than above
    scale = _nonzero(extreme * shrink / -half)
    q = np.clip(np.rint(x / scale[..., None]), -half, half - 1)
    scale = _refit(x, q, scale)
    return q + half, scale, np.full(scale.shape, half, np.float32)


def _asymmetric(x: np.ndarray, bits: int, shrink: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    top = (1 << bits) - 1
    low, high = np.minimum(x.min(-1), 0) * shrink, np.maximum(x.max(-1), 0) * shrink
    scale = _nonzero((high - low) / top)
    zero = np.clip(np.rint(-low / scale), 0, top)
    q = np.clip(np.rint(x / scale[..., None]) + zero[..., None], 0, top)
    return q, _refit(x, q - zero[..., None], scale), zero


def _nonzero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _refit(x: np.ndarray, q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The scale with the least squared error for these integers; `scale` where all are 0."""
    square = np.square(q).sum(-1)
    return np.where(square > 0, (q * x).sum(-1) / np.maximum(square, 1), scale).astype(np.float32)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values (…, n) -> bytes: as they are at 8 bits; at 4, two a byte, an odd one at the end alone."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return np.asarray(values[..., ::2] | (values[..., 1::2] << 4))
