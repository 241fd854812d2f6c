"""Metrics against scipy and scikit-learn in loops, thinning and the ceiling against known rates."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse, stats
from sklearn.metrics import mean_absolute_error, mean_squared_error

from sthisto.metrics import lognorm, mae, mse, noise_ceiling, pearson, spearman, thin

ALL = [pearson, spearman, mse, mae]
REFERENCE = {
    pearson: lambda a, b: stats.pearsonr(a, b).statistic,
    spearman: lambda a, b: stats.spearmanr(a, b).statistic,
    mse: mean_squared_error,
    mae: mean_absolute_error,
}


def tables(random_state: int = 0, n: int = 40, g: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Expression-like pairs with many ties at zero."""
    rng = np.random.default_rng(random_state)
    truth = np.log1p(rng.poisson(1.0, (n, g))).astype(np.float32)
    return truth, (truth + rng.normal(size=(n, g))).clip(min=0).astype(np.float32)


@pytest.mark.parametrize("metric", ALL)
def test_every_gene_agrees_with_the_reference(metric):
    truth, predicted = tables()
    expected = [REFERENCE[metric](a.astype(float), b.astype(float)) for a, b in zip(truth.T, predicted.T, strict=True)]
    assert_allclose(metric(truth, predicted), expected, rtol=1e-12)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_constant_genes_have_no_correlation(metric):
    truth, predicted = (table.astype(float) for table in tables(g=4))
    truth[:, 0] = 0.1
    assert truth.var(axis=0)[0] > 0  # rounding noise, by which a constant cannot be told
    predicted[:, 1] = 1e6
    truth[:, 2] = predicted[:, 2] = 3
    assert_array_equal(np.isnan(metric(truth, predicted)), [True, True, True, False])


@pytest.mark.parametrize("metric", ALL)
def test_nan_marks_its_own_gene_only(metric):
    truth, predicted = tables(g=3)
    clean = metric(truth, predicted)
    predicted[5, 1] = np.nan
    assert_array_equal(metric(truth, predicted), [clean[0], np.nan, clean[2]])


def test_few_spots():
    one = np.ones((1, 2))
    for metric in (pearson, spearman):
        assert np.isnan(metric(one, one)).all()
        assert np.isnan(metric(one[:0], one[:0])).all()
    for metric in (mse, mae):
        assert_array_equal(metric(one, one + 2), [4, 4] if metric is mse else [2, 2])
        assert np.isnan(metric(one[:0], one[:0])).all()
    assert metric(np.empty((5, 0)), np.empty((5, 0))).shape == (0,)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("shapes", [((3, 2), (2, 3)), ((3,), (3,)), ((3, 1), (3, 2))])
def test_shapes_that_do_not_match_are_refused(metric, shapes):
    with pytest.raises(ValueError, match=r"one shape"):
        metric(*(np.zeros(shape) for shape in shapes))


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float64, (7, 2), elements=st.integers(-50, 50).map(float), unique=True),
    st.floats(0.01, 100),
    st.floats(-1e3, 1e3),
)
def test_correlations_forgive_scale_and_offset_and_change_sign(truth, scale, offset):
    rng = np.random.default_rng(0)
    predicted = rng.normal(size=truth.shape)
    for metric in (pearson, spearman):
        r = metric(truth, predicted)
        assert_allclose(metric(truth * scale + offset, predicted), r, atol=1e-7)
        assert_allclose(metric(truth, -predicted), -r, atol=1e-12)
        assert_allclose(metric(truth, truth), 1)
    assert_allclose(spearman(truth**3, predicted), spearman(truth, predicted))


def test_spots_far_from_zero_lose_no_precision():
    truth, predicted = tables()
    extrapolated = truth.astype(float) + 1e8
    assert_allclose(pearson(extrapolated, predicted), pearson(truth, predicted), rtol=1e-6)


def test_lognorm_is_scanpys():
    import scanpy as sc  # noqa: PLC0415
    from anndata import AnnData  # noqa: PLC0415

    counts = np.random.default_rng(0).poisson(1.0, (20, 30)).astype(np.float32)
    adata = AnnData(counts.copy())
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    assert_allclose(lognorm(counts), adata.X, rtol=1e-5)


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csr_matrix, sparse.csc_array])
def test_lognorm_of_sparse_counts_stays_sparse(kind):
    counts = np.random.default_rng(0).poisson(0.3, (20, 30))
    counts[3] = 0
    table = kind(counts)
    result = lognorm(table)
    assert sparse.issparse(result)
    assert result.dtype == np.float32
    assert_allclose(result.toarray(), lognorm(counts), rtol=1e-6)
    assert not result.toarray()[3].any()
    assert_array_equal(table.toarray(), counts)  # the input is left alone


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array, sparse.csr_matrix])
def test_thinning_shares_out_every_molecule(kind):
    counts = np.random.default_rng(0).poisson(5.0, (50, 40)).astype(np.float32)
    first, second = thin(kind(counts), 0.3, random_state=1)
    assert type(first) is type(second) is type(kind(counts))
    first, second = (part.toarray() if sparse.issparse(part) else part for part in (first, second))
    assert first.dtype == second.dtype == np.float32
    assert_array_equal(first + second, counts)
    assert (first >= 0).all()
    assert (second >= 0).all()
    assert_allclose(first.sum() / counts.sum(), 0.3, atol=0.02)
    again, other = thin(kind(counts), 0.3, random_state=1)[0], thin(kind(counts), 0.3, random_state=2)[0]
    again, other = (part.toarray() if sparse.issparse(part) else part for part in (again, other))
    assert_array_equal(first, again)
    assert (first != other).any()


def test_halves_of_poisson_counts_are_independent():
    first, second = thin(np.random.default_rng(0).poisson(20.0, (20_000, 1)), random_state=0)
    assert abs(pearson(first, second)[0]) < 0.03  # 4 standard errors; untouched copies would give 1


def test_thinning_refuses_what_are_no_counts():
    for bad in (np.array([[0.5]]), np.array([[-1.0]]), np.array([[np.nan]]), sparse.csr_array([[1.5, 0.0]])):
        with pytest.raises(ValueError, match="raw counts"):
            thin(bad, random_state=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        thin(np.array([[1]]), 1.5, random_state=0)


def test_ceiling_is_what_the_true_rate_reaches():
    rng = np.random.default_rng(0)
    rate = rng.gamma(2.0, 1.0, (3000, 5)) * [0.3, 1, 3, 10, 100]
    counts = rng.poisson(rate)
    ceiling = noise_ceiling(counts, random_state=0, transform=np.asarray)
    assert_allclose(ceiling, pearson(counts, rate), atol=0.03)
    assert ceiling[0] < 0.7
    assert ceiling[-1] > 0.99
    assert_allclose(noise_ceiling(sparse.csr_array(counts), random_state=0, transform=lambda x: x), ceiling, atol=0.02)


def test_ceiling_without_signal_is_nothing_and_of_a_constant_is_nan():
    rng = np.random.default_rng(1)
    lone = np.zeros(2000, dtype=int)
    lone[7] = 1  # one molecule: one of the halves is always constant
    counts = np.stack([rng.poisson(1.0, 2000), lone, np.zeros(2000, dtype=int)], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ceiling = noise_ceiling(counts, random_state=0, transform=np.asarray)
    assert ceiling[0] < 0.3
    assert ceiling[1] == 0
    assert np.isnan(ceiling[2])


def test_ceiling_repeats_with_its_seed():
    counts = np.random.default_rng(0).poisson(1.0, (50, 8))
    assert_array_equal(noise_ceiling(counts, random_state=3), noise_ceiling(counts, random_state=3))
    assert (noise_ceiling(counts, random_state=3) != noise_ceiling(counts, random_state=4)).any()
