"""Rounding that knows what a matrix is multiplied with: the products' error is what falls."""

from __future__ import annotations

import numpy as np
import pytest

from lvr_lite.quant import blocks
from lvr_lite.quant.schemes import Scheme


def correlated(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Inputs (rows, columns) that depend on each other, some columns much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, columns)) @ rng.standard_normal((columns, columns)) ** 3
    return np.asarray(mixed / mixed.std(), np.float32)


def weight(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((rows, columns)).astype(np.float32)


def product_error(x: np.ndarray, matrix: np.ndarray, found: blocks.Blocks) -> float:
    return float(np.linalg.norm(x @ (found.dense() - matrix).T) / np.linalg.norm(x @ matrix.T))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "columns", [192, 160, 70]
)  # more than are made up for at once, one block that is padded, and few
def test_gptq_keeps_products_closer_than_rounding_does(columns: int, symmetric: bool) -> None:
    x, matrix = correlated(900, columns), weight(48, columns)
    products = x.T @ x
    plain = blocks.quantize(matrix, Scheme(4, 64, symmetric))
    found = blocks.gptq(matrix, products, Scheme(4, 64, symmetric))
    assert found.values.min() >= 0
    assert found.values.max() <= 15
    assert found.values.dtype == np.uint8
    assert found.values.shape == plain.values.shape
    assert product_error(x, matrix, found) < 0.8 * product_error(x, matrix, plain)


def test_gptq_with_unrelated_inputs_of_one_size_is_rounding_to_the_nearest() -> None:
    matrix = weight(8, 128)
    found = blocks.gptq(matrix, np.eye(128) * 50, Scheme(4, 64, symmetric=False))
    plain = blocks.quantize(matrix, Scheme(4, 64, symmetric=False))
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-5)
    assert (
        found.values != plain.values
    ).mean() < 0.01  # those that the refitted scale brings nearer to another step
    assert np.linalg.norm(found.dense() - matrix) <= np.linalg.norm(plain.dense() - matrix)


def test_gptq_takes_inputs_that_never_vary() -> None:
    """Columns that are always 0, and fewer inputs than columns: products that cannot be inverted as
    they are.
    """
    x = correlated(20, 128)
    x[:, 30:50] = 0
    matrix = weight(16, 128)
    for products in (x.T @ x, np.zeros((128, 128))):
        found = blocks.gptq(matrix, products, Scheme(4, 64, symmetric=False))
        assert np.isfinite(found.dense()).all()
        assert np.linalg.norm(found.dense() - matrix) / np.linalg.norm(matrix) < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_lowers_the_error_that_it_weighs(symmetric: bool) -> None:
    matrix, importance = (
        weight(64, 256),
        np.random.default_rng(2).exponential(1, 256).astype(np.float32) ** 4,
    )

    def error(found: blocks.Blocks) -> float:
        return float((np.square(found.dense() - matrix) * importance).sum())

    plain, weighed = (
        blocks.quantize(matrix, Scheme(4, 64, symmetric), given) for given in (None, importance)
    )
    assert error(weighed) < 0.9 * error(plain)


def test_importance_of_a_padded_column_is_none() -> None:
    matrix = weight(16, 70)
    even = blocks.quantize(matrix, Scheme(4, 64, False), np.ones(70, np.float32)).dense()
    plain = blocks.quantize(matrix, Scheme(4, 64, False)).dense()
    np.testing.assert_allclose(
        np.linalg.norm(even - matrix), np.linalg.norm(plain - matrix), rtol=0.02
    )
