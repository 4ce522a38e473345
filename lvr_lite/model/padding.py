"""Rows of different lengths as one batch. May import: numpy.

A row is laid out by the columns that its ids take; three ways are in use (p is padding):

    pad_right               pad_left, aligned          pad_between, aligned
    q q q a a p p           p q q q a a p              q q q p a a p
    q q q q a a a           q q q q a a a              q q q q a a a
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts, or prompts with their answers, side by side.

    ids: (B, S) int64.
    positions: (3, B, S) int64, 0 where padded.
    mask: (B, S) int64, 1 where a row has an id and 0 where it is padded.
    columns: B arrays (n,), the columns that each row's ids take.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    columns: list[np.ndarray]

    @classmethod
    def of(
        cls,
        ids: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        filler: int,
        columns: list[np.ndarray] | None = None,
    ) -> PaddedBatch:
        """Rows of ids (n,) and positions (3, n).

        filler: the id of padding, which must stand neither for a visual token nor for a latent.
        columns: as `pad_left` or `pad_between` gives them; padded on the right by default.
        """
        if columns is None:
            columns = pad_right(map(len, ids))
        present = [np.ones(len(row), np.int64) for row in ids]
        return cls(
            ids=spread(ids, columns, filler),
            positions=spread(positions, columns, 0),
            mask=spread(present, columns, 0),
            columns=columns,
        )

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each row (B,) int64."""
        lengths = [len(own) for own in self.columns]
        return np.array(lengths, np.int64)


def pad_right(lengths: Iterable[int]) -> list[np.ndarray]:
    """Columns of rows that all begin in the first one."""
    return [np.arange(length) for length in lengths]


def pad_left(lengths: Sequence[int], leads: Sequence[int]) -> list[np.ndarray]:
    """Columns of rows whose parts after the first `lead` ids begin in one column, max(leads).

    lengths, leads: one a row.
    """
    start = max(leads)
    columns = pad_right(lengths)
    for own, lead in zip(columns, leads, strict=True):
        own += start - lead
    return columns


def pad_between(lengths: Sequence[int], leads: Sequence[int]) -> list[np.ndarray]:
    """As `pad_left`, but all rows begin in the first column, and padding follows their leads."""
    start = max(leads)
    columns = pad_right(lengths)
    for own, lead in zip(columns, leads, strict=True):
        own[lead:] += start - lead
    return columns


def spread(rows: Sequence[np.ndarray], columns: Sequence[np.ndarray], filler: int) -> np.ndarray:
    """Rows (…, n) in their columns of one array (…, B, S), `filler` everywhere else."""
    last = max(int(own[-1]) for own in columns)
    leading = rows[0].shape[:-1]
    shape = (*leading, len(rows), last + 1)
    batch = np.full(shape, filler, rows[0].dtype)
    for number, row in enumerate(rows):
        own = columns[number]
        batch[..., number, own] = row
    return batch
