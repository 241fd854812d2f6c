"""Factors of expression: weights of spots, shrinkage of loadings, and leave-one-out predictions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy.stats import norm

from sthisto._statistics import leading_components
from sthisto.models._factors import (
    EXTREME,
    Factors,
    leave_one_out_expression,
    normalized_variance,
    shrinkage_factors,
    spot_variance,
)


def weighted(n: int = 30, g: int = 9, random_state: int = 0) -> tuple[NDArray[np.float64], ...]:
    """Expression, and variances of its spots."""
    rng = np.random.default_rng(random_state)
    variance = rng.uniform(0.3, 3, n)
    y = rng.normal(size=(n, 2)) @ rng.normal(size=(2, g)) + np.sqrt(variance)[:, None] * rng.normal(size=(n, g))
    return y, variance


def rows_of(y: NDArray[np.float64]):
    return lambda rows: y[rows]


def test_a_noisy_spot_is_recognized_and_counts_less() -> None:
    rng = np.random.default_rng(1)
    xy = rng.uniform(0, 9, (120, 2))
    noisy = np.sin(xy[:, :1] + np.arange(8)) + 0.3 * rng.normal(size=(120, 8))
    noisy[7] += rng.normal(scale=6, size=8)
    variance = normalized_variance(spot_variance(xy, rows_of(noisy - noisy.mean(axis=0))))
    assert variance[7] == variance.max() == pytest.approx(EXTREME)
    assert np.median(variance) < 1.5


@pytest.mark.parametrize("cuts", [[], [11], [3, 4, 25]])
@pytest.mark.parametrize("d", [5, 40])
def test_leading_axes_are_singular_vectors_however_the_rows_come(cuts: list[int], d: int) -> None:
    y = np.random.default_rng(0).normal(size=(30, d)) * np.linspace(1, 3, d)
    axes = leading_components(np.split(y, cuts), 4)
    expected = np.linalg.svd(y, full_matrices=False)[2][:4].T
    np.testing.assert_allclose(np.abs((axes * expected).sum(axis=0)), 1, atol=1e-9)  # up to their sign
    assert leading_components([np.zeros((10, 3))], 2).shape == (3, 1)


def test_factors_are_the_leading_singular_vectors_of_weighted_spots():
    y, variance = weighted()
    factors = Factors.of(rows_of(y), variance, np.ones(30), 3)
    axes = np.linalg.svd(y / np.sqrt(variance)[:, None], full_matrices=False)[2][:3]
    scores = y @ axes.T
    assert_allclose((factors.z**2).mean(axis=0), 1)
    assert_allclose(factors.z @ factors.loadings, scores @ axes, atol=1e-9)


def test_loadings_are_a_regression_with_weights_and_their_errors_those_of_its_estimates():
    """Against the textbook's (X'WX)^-1, which for these factors is diagonal."""
    y, variance = weighted()
    similarity = np.where(np.arange(30) < 20, 1.0, 0.3)
    factors = Factors.of(rows_of(y), variance, similarity, 3)
    w = np.diag(similarity / variance)
    inverse = np.linalg.inv(factors.z.T @ w @ factors.z)
    assert_allclose(inverse @ factors.z.T @ w @ y, factors.loadings, atol=1e-9)
    rest = y - factors.z @ factors.loadings
    error = (w @ rest**2).sum(axis=0) / (similarity.sum() - 3)
    meat = factors.z.T @ w @ np.diag(variance) @ w @ factors.z
    spread = np.sqrt(np.diag(inverse @ meat @ inverse)[:, None] * error)
    assert_allclose(factors.shrinkage, shrinkage_factors(factors.loadings, spread), rtol=1e-6)


def test_a_spot_of_a_dissimilar_section_has_no_weight():
    y, variance = weighted()
    extreme = y.copy()
    extreme[20:] += 100
    similarity = np.where(np.arange(30) < 20, 1.0, 0.0)
    found, alone = (
        Factors.of(rows_of(extreme), variance, similarity, 3),
        Factors.of(rows_of(y[:20]), variance[:20], np.ones(20), 3),
    )
    scale = found.z[:20] @ found.loadings
    assert_allclose(scale, alone.z @ alone.loadings, atol=1e-6)
    assert_allclose(found.shrinkage, alone.shrinkage, rtol=1e-6)


def test_more_factors_than_there_are_stay_zero():
    y, variance = weighted(n=6)
    factors = Factors.of(rows_of(y - y.mean(axis=0)), variance, np.ones(6), 9)
    there = np.abs(factors.loadings).max(axis=1) > 0
    assert 5 <= there.sum() <= 6
    assert (factors.z[:, ~there] == 0).all()
    assert np.isfinite(factors.shrinkage).all()


def test_a_flat_expression_has_no_loadings():
    factors = Factors.of(rows_of(np.zeros((10, 4))), np.ones(10), np.ones(10), 2)
    assert (factors.loadings == 0).all()
    assert np.isfinite(factors.shrinkage).all()


@pytest.mark.parametrize("truth", ["sparse", "dense", "none"])
def test_shrunk_loadings_are_nearer_to_the_truth(truth):
    rng = np.random.default_rng(3)
    scale = {"sparse": np.where(rng.uniform(size=2000) < 0.1, 4.0, 0.0), "dense": np.ones(2000), "none": np.zeros(2000)}
    loadings = scale[truth] * rng.normal(size=2000)
    found = loadings + rng.normal(size=2000)
    missed = np.mean((shrinkage_factors(found[None], np.ones((1, 2000)))[0] * found - loadings) ** 2)
    density = {each: norm.pdf(found, scale=np.sqrt(1 + each**2)) for each in (0.0, 1.0, 4.0)}
    if truth == "sparse":  # the posterior mean of one who knows the mixture
        chance = 0.1 * density[4.0] / (0.1 * density[4.0] + 0.9 * density[0.0])
        best = chance * found * 16 / 17
    else:
        best = found * scale[truth] ** 2 / (1 + scale[truth] ** 2)
    assert missed < 1.1 * np.mean((best - loadings) ** 2) + 0.01
    assert missed < 0.6


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=20), st.floats(1e-3, 10))
def test_shrinkage_grows_with_the_evidence_and_has_no_unit(values, error):
    loadings = np.array([values])
    share = shrinkage_factors(loadings, np.full_like(loadings, error))
    assert ((share >= 0) & (share <= 1)).all()
    assert (np.diff(share[0][np.argsort(np.abs(values))]) >= -1e-9).all()
    assert_allclose(shrinkage_factors(7 * loadings, np.full_like(loadings, 7 * error)), share, atol=1e-6)
    assert_allclose(shrinkage_factors(-loadings, np.full_like(loadings, error)), share)


def test_loadings_without_error_are_shrinkage_factors():
    assert_allclose(shrinkage_factors(np.array([[3.0, -2.0]]), np.zeros((1, 2))), 1, atol=1e-6)


def test_leave_one_out_is_a_regression_without_the_spot():
    y, variance = weighted()
    factors = Factors.of(rows_of(y), variance, np.ones(30), 3)
    held_out = np.random.default_rng(1).normal(size=(30, 3))
    found = factors.leave_one_out(y, held_out, np.zeros((30, 1)))
    root = 1 / np.sqrt(variance)[:, None]
    for i in range(30):
        rest = np.arange(30) != i
        without = np.linalg.lstsq((root * factors.z)[rest], (root * y)[rest])[0]
        assert_allclose(found[i], held_out[i] @ (factors.shrinkage * without))


def test_the_mean_is_left_out_too():
    """Genes that no factor reaches are held out as the mean of the others."""
    y = np.random.default_rng(0).normal(size=(20, 4))
    y -= y.mean(axis=0)
    z, loadings, held_out = np.zeros((20, 1)), np.zeros((1, 4)), np.zeros((20, 1))
    found = leave_one_out_expression(y, z, loadings, held_out, np.full((20, 1), 1 / 20), influence=z)
    assert_allclose(found[5], np.delete(y, 5, axis=0).mean(axis=0))
