"""Rows of different lengths lie where their layout says, and nothing else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest

from lvr_lite.model.padding import PaddedBatch, pad_between, pad_left, pad_right, spread

FILLER = 9
IDS = [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8])]
LEADS = [1, 4]


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (pad_right([3, 5]), [[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]]),
        (pad_left([3, 5], LEADS), [[9, 9, 9, 1, 2, 3], [4, 5, 6, 7, 8, 9]]),
        (pad_between([3, 5], LEADS), [[1, 9, 9, 9, 2, 3], [4, 5, 6, 7, 8, 9]]),
    ],
    ids=["right", "left", "between"],
)
def test_a_batch_holds_each_row_in_its_columns(
    columns: list[np.ndarray], wanted: list[list[int]]
) -> None:
    positions = [np.stack([ids, 10 * ids, 100 * ids]) for ids in IDS]
    batch = PaddedBatch.of(IDS, positions, FILLER, columns)
    assert batch.ids.tolist() == wanted
    assert batch.mask.tolist() == [[int(i != FILLER) for i in row] for row in wanted]
    assert batch.lengths.tolist() == [3, 5]
    for axis, scale in enumerate((1, 10, 100)):
        expected = batch.ids * batch.mask * scale
        assert np.array_equal(batch.positions[axis], expected)


def test_rows_are_padded_on_the_right_by_default() -> None:
    batch = PaddedBatch.of(IDS, [np.stack([ids] * 3) for ids in IDS], FILLER)
    assert batch.ids.tolist() == [[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]]


def test_what_is_spread_keeps_its_dtype() -> None:
    rows = [np.array([True]), np.array([True, True])]
    assert spread(rows, pad_right([1, 2]), 0).tolist() == [[True, False], [True, True]]
