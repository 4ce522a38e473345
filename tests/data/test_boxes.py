"""Which visual tokens a box selects, and how they are grouped for K latent steps."""

from __future__ import annotations

import numpy as np
import pytest

from lvr_lite.data.boxes import pool_groups, pool_groups_of_boxes, tokens_in_box, tokens_in_boxes


def plain(groups: list[np.ndarray]) -> list[list[int]]:
    return [g.tolist() for g in groups]


@pytest.mark.parametrize(
    ("box", "tokens"),
    [
        ((0, 0, 1, 1), list(range(12))),
        ((0, 0, 0.25, 1 / 3), [0]),
        ((0.75, 2 / 3, 1, 1), [11]),
        ((0.25, 0, 0.75, 1 / 3), [1, 2]),
        ((0, 0, 0.25, 1), [0, 4, 8]),
        ((0, 0, 0.0625, 1 / 3), [0]),  # a quarter of a cell, away from its centre
        ((0, 0, 0.3125, 1 / 3), [0, 1]),  # all of one cell and a quarter of the next
        ((0, 0, 0.3, 1 / 3), [0]),  # a fifth of the next is too little
        ((0.12, 0.16, 0.13, 0.17), [0]),  # a sliver over the centre of a cell
        ((0.26, 0.01, 0.27, 0.02), [1]),  # too small for any cell: the one it lies in
        ((0.999, 0.999, 1, 1), [11]),
        ((0.2, 0.3, 0.3, 0.38), [5]),  # over a corner of four cells: the one of the box's centre
    ],
)
def test_a_box_selects_cells_whose_centre_or_quarter_it_covers(
    box: tuple[float, float, float, float], tokens: list[int]
) -> None:
    selected = tokens_in_box(box, rows=3, columns=4)
    assert selected.tolist() == tokens
    assert selected.dtype == np.int64


def test_every_box_selects_at_least_one_token_of_the_grid_in_ascending_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        (x0, x1), (y0, y1) = np.sort(rng.random(2)), np.sort(rng.random(2))
        rows, columns = (int(v) for v in rng.integers(1, 20, 2))
        selected = tokens_in_box((x0, y0, x1, y1), rows, columns)
        assert len(selected) > 0
        assert selected.min() >= 0
        assert selected.max() < rows * columns
        assert (np.diff(selected) > 0).all()


def test_a_larger_box_never_selects_fewer_tokens() -> None:
    for half in np.arange(0.1, 0.5, 0.01):
        inner, outer = (
            set(tokens_in_box((0.5 - h, 0.5 - h, 0.5 + h, 0.5 + h), 7, 5).tolist())
            for h in (half, half + 0.01)
        )
        assert inner <= outer


def test_boxes_keep_their_order() -> None:
    assert plain(tokens_in_boxes([(0.75, 0, 1, 1), (0, 0, 0.25, 1)], 1, 4)) == [[3], [0]]
    assert tokens_in_boxes([], 3, 3) == []


@pytest.mark.parametrize(
    ("n", "steps", "groups"),
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (3, 3, [[0], [1], [2]]),
        (1, 3, [[0], [0], [0]]),
        (2, 4, [[0], [0], [1], [1]]),
        (3, 4, [[0], [0], [1], [2]]),
    ],
)
def test_tokens_are_cut_into_exactly_as_many_runs_as_steps(
    n: int, steps: int, groups: list[list[int]]
) -> None:
    assert plain(pool_groups(np.arange(n), steps)) == groups


def test_groups_hold_every_token_in_order_and_are_as_equal_as_possible() -> None:
    for n in range(1, 30):
        for steps in range(1, 12):
            groups = pool_groups(np.arange(n) * 3, steps)
            sizes = [len(g) for g in groups]
            assert len(groups) == steps
            assert max(sizes) - min(sizes) <= 1
            flat = np.concatenate(groups)
            assert (np.diff(flat) >= 0).all()
            assert set(flat.tolist()) == set(range(0, 3 * n, 3))


def test_every_box_but_the_last_is_one_group_and_the_last_has_the_rest() -> None:
    small, large = np.array([7]), np.arange(20, 26)
    assert plain(pool_groups_of_boxes([small, large], 2)) == [[7], [20, 21, 22, 23, 24, 25]]
    assert plain(pool_groups_of_boxes([small, large], 4)) == [[7], [20, 21], [22, 23], [24, 25]]
    assert plain(pool_groups_of_boxes([large, small], 3)) == [[20, 21, 22, 23, 24, 25], [7], [7]]
    alike = [np.array([1, 2]), np.array([3, 4]), np.array([5, 6])]
    assert plain(pool_groups_of_boxes(alike, 3)) == [[1, 2], [3, 4], [5, 6]]
    assert plain(pool_groups_of_boxes(alike, 5)) == [[1, 2], [3, 4], [5], [5], [6]]


def test_which_box_a_latent_looks_at_does_not_hang_on_their_sizes() -> None:
    def looks(*sizes: int) -> list[int]:
        boxes = [np.arange(100 * i, 100 * i + n) for i, n in enumerate(sizes)]
        return [int(g[0]) // 100 for g in pool_groups_of_boxes(boxes, 5)]

    assert looks(1, 9, 4) == looks(9, 1, 1) == looks(2, 2, 30) == [0, 1, 2, 2, 2]


def test_boxes_over_the_same_tokens_each_keep_them() -> None:
    assert plain(pool_groups_of_boxes([np.array([1, 2]), np.array([2, 3])], 2)) == [[1, 2], [2, 3]]


def test_with_fewer_steps_than_boxes_the_union_is_cut() -> None:
    assert plain(pool_groups_of_boxes([np.array([5]), np.array([1, 5]), np.array([2])], 2)) == [
        [5],
        [1, 2],
    ]


def test_one_box_is_grouped_as_its_tokens_alone() -> None:
    assert plain(pool_groups_of_boxes([np.arange(5)], 2)) == plain(pool_groups(np.arange(5), 2))


def test_nothing_cannot_be_pooled() -> None:
    for call in (
        lambda: pool_groups(np.array([], np.int64), 2),
        lambda: pool_groups_of_boxes([], 2),
        lambda: pool_groups(np.arange(3), 0),
    ):
        with pytest.raises(ValueError, match=r"cannot be cut|nothing to pool"):
            call()
