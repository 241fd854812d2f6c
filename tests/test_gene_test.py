"""Test of genes: planted ones are called, smooth patterns without a relation to the image are not."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import false_discovery_control, kstest

from sthisto import grids, pl, tl
from sthisto._crossfit import block_folds
from sthisto.datasets import synthetic
from sthisto.models import Section
from sthisto.tl import _gene_test
from sthisto.uncertainty import SurrogateTest, p_values
from sthisto.uncertainty._surrogates import _hat, _modes

COLUMNS = ["sthisto_pearson", "sthisto_pearson_std", "sthisto_pvalue", "sthisto_qvalue"]


def lattice(side=15):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


def smooth(xy, n, *, length, random_state):
    """Gaussian fields (n_spots, n) of an exponential-like kernel, by Cholesky."""
    away = np.linalg.norm(xy[:, None] - xy[None], axis=2) * np.sqrt(3) / length
    root = np.linalg.cholesky((1 + away) * np.exp(-away) + 1e-6 * np.eye(len(xy)))
    return root @ np.random.default_rng(random_state).normal(size=(len(xy), n))


def blocks(xy, side=4):
    cell = np.floor(xy / side).astype(int)
    return (cell[:, 0] + 2 * cell[:, 1]) % 5


@pytest.fixture(scope="module")
def tissue():
    """A lattice and smooth features on it."""
    xy = lattice()
    return xy, smooth(xy, 4, length=5, random_state=0).astype(np.float32)


def p_of(tissue, expression):
    xy, look = tissue
    return p_values(
        [SurrogateTest.of(xy, look, expression.astype(np.float32), blocks(xy), random_state=0, n_surrogates=499)]
    )


@pytest.mark.parametrize("length", [2, 5])
def test_smooth_genes_of_their_own_have_even_p_values(tissue, length):
    """Poisson counts of smooth rates: predictable from neighbors, not from image features."""
    rate = np.exp(0.7 * smooth(tissue[0], 400, length=length, random_state=1))
    p = p_of(tissue, np.log1p(np.random.default_rng(2).poisson(rate)))
    assert (p < 0.05).mean() < 0.085
    assert kstest(p, "uniform").statistic < 0.09
    assert (false_discovery_control(p) < 0.05).mean() < 0.01


def test_permuted_spots_would_call_such_genes_significant(tissue):
    """Why the null keeps the autocorrelation: the naive one fails by far."""
    xy, look = tissue
    y = smooth(xy, 200, length=5, random_state=1)
    hat, random = _hat(look, blocks(xy)), np.random.default_rng(3)

    def r(values):
        predicted = hat @ (values - values.mean(axis=0))
        return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(predicted.T, values.T, strict=True)])

    naive = np.mean([r(random.permuted(y, axis=0)) >= r(y) for _ in range(40)], axis=0)
    assert (naive < 0.05).mean() > 0.25
    assert (p_of(tissue, y) < 0.05).mean() < 0.09


def test_genes_that_depend_on_the_features_are_found_among_those_that_do_not(tissue):
    xy, look = tissue
    random = np.random.default_rng(4)
    follow = 0.6 * look @ random.normal(size=(4, 60)) + random.normal(size=(len(xy), 60))
    unrelated = smooth(xy, 240, length=4, random_state=5)
    q = false_discovery_control(p_of(tissue, np.concatenate([follow, unrelated], axis=1)))
    assert (q[:60] < 0.05).mean() > 0.6
    assert (q[60:] < 0.05).sum() <= 0.1 * (q < 0.05).sum()


def test_the_statistic_is_the_correlation_with_what_other_blocks_predict(tissue):
    """Block by block with scikit-learn's kernel ridge regression."""
    from sklearn.kernel_ridge import KernelRidge  # noqa: PLC0415

    xy, look = tissue
    y = look[:, :2] + np.random.default_rng(0).normal(size=(len(xy), 2)).astype(np.float32)
    standard = ((look - look.mean(axis=0)) / look.std(axis=0)).astype(float)
    away = np.linalg.norm(standard[:, None] - standard[None], axis=2)
    gamma = 0.5 / np.median(away[np.triu_indices(len(away), 1)]) ** 2
    centred, predicted = y - y.mean(axis=0), np.zeros(y.shape)
    for each in range(5):
        out = blocks(xy) == each
        level = centred[~out].mean(axis=0)
        for alpha in (1.0, 10.0):
            ridge = KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma).fit(standard[~out], np.eye((~out).sum()))
            weight = ridge.predict(standard[out])
            predicted[out] += weight @ (centred[~out] - level) / 2
    expected = [np.corrcoef(predicted[:, gene], y[:, gene])[0, 1] for gene in range(2)]
    found = SurrogateTest.of(xy, look, y, blocks(xy), random_state=0, n_surrogates=3).r
    assert_allclose(found, expected, atol=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(9, 80), st.integers(0, 99))
def test_modes_are_orthonormal_without_a_mean_and_bands_hold_them_all(n, random_state):
    modes, starts = _modes(np.random.default_rng(random_state).uniform(0, 9, (n, 2)))
    assert_allclose(modes.T @ modes, np.eye(n - 1), atol=1e-8)
    assert_allclose(modes.sum(axis=0), 0, atol=1e-7)
    assert starts[0] == 0
    assert (np.diff([*starts, n - 1]) > 0).all()


def test_a_surrogate_has_the_autocorrelation_of_its_gene(tissue):
    """The null is that of patterns made one by one, with the same Moran's I as the gene."""
    xy, look = tissue
    y = smooth(xy, 1, length=4, random_state=8)
    y -= y.mean()
    modes, starts = _modes(xy)
    near = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    neighbors = ((near > 0) & (near < 1.1)).astype(float)
    moran = lambda v: v @ neighbors @ v / (v @ v)  # noqa: E731
    random, ends, strength = np.random.default_rng(0), [*starts[1:], len(xy) - 1], modes.T @ y[:, 0]
    made = []
    for _ in range(100):
        turned = random.normal(size=len(strength))
        for start, end in zip(starts, ends, strict=True):
            turned[start:end] *= np.linalg.norm(strength[start:end]) / np.linalg.norm(turned[start:end])
        made.append(modes @ turned)
    assert np.mean([moran(each) for each in made]) == pytest.approx(moran(y[:, 0]), rel=0.05)
    predicted = [_hat(look, blocks(xy)) @ each for each in made]
    by_hand = [np.corrcoef(a, b)[0, 1] for a, b in zip(predicted, made, strict=True)]
    null = SurrogateTest.of(xy, look, y.astype(np.float32), blocks(xy), random_state=1, n_surrogates=400).null[:, 0]
    assert null.mean() == pytest.approx(np.mean(by_hand), abs=0.05)
    assert null.std() == pytest.approx(np.std(by_hand), rel=0.3)


def test_sections_are_averaged_by_their_spots():
    one = SurrogateTest(np.array([0.4]), np.array([[0.0], [0.5]]), 30)
    other = SurrogateTest(np.array([0.0]), np.array([[0.3], [0.5]]), 10)
    assert p_values([one, other]) == pytest.approx(2 / 3)  # .3 against .075 and .5
    assert p_values([other]) == pytest.approx(1)


def test_constant_genes_are_not_significant(tissue):
    assert_array_equal(p_of(tissue, np.ones((len(tissue[0]), 2))), [1, 1])


# --- in fit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _tested():
    """A synthetic section, most of whose genes were fitted and tested."""
    from sthisto import pp  # noqa: PLC0415

    adata = synthetic(200, n_genes=30, random_state=3)
    pp.extract_features(adata)
    tl.fit(adata, "ridge", genes=adata.var_names[:24])
    tl.test_genes(adata)
    return adata


@pytest.fixture
def tested(_tested):
    return _tested.copy()


def test_columns_of_genes_are_written(tested):
    table = tested.var[COLUMNS]
    assert table[:24].notna().all().all()
    assert table[24:].isna().all().all()
    assert table["sthisto_pearson"].between(-1, 1)[:24].all()
    assert_allclose(table["sthisto_qvalue"][:24], false_discovery_control(table["sthisto_pvalue"][:24]))
    region = [name for name in tested.var_names[:24] if name.startswith("region")]
    noise = [name for name in tested.var_names[:24] if name.startswith("noise")]
    assert (table.loc[region, "sthisto_qvalue"] < 0.1).mean() > 0.7
    assert not noise or (table.loc[noise, "sthisto_qvalue"] < 0.05).mean() <= 0.2
    assert table.loc[region, "sthisto_pearson"].mean() > 0.3


def test_it_is_not_done_unless_requested(section):
    tl.fit(section, "ridge")
    assert not set(COLUMNS) & set(section.var)


def test_the_fit_itself_is_the_same(tested):
    tl.fit(tested, "ridge", genes=tested.var_names[:24], key_added="plain")
    fits = tested.uns["sthisto"]["fit"]
    assert fits["plain"]["sha256"] == fits["sthisto"]["sha256"]


def test_dense_maps_and_pictures_know_of_it(tested):
    dense = tl.upsample(tested, 2)
    assert_allclose(dense.var["sthisto_qvalue"], tested.var["sthisto_qvalue"][:24])
    order = tested.var["sthisto_qvalue"][:24].sort_values().index
    tested.var.loc[order[0], "sthisto_pearson"] = 0.5
    tested.var.loc[order[-1], "sthisto_qvalue"] = 0.7
    good, bad = pl.genes(tested, [order[0], order[-1]], dense=dense, panels=["dense"], show=False)
    assert "held-out r 0.50" in good.get_title("left")
    assert good.get_title("left").count("\n") == 1
    assert re.search("no significant link to the image|poorly predicted", bad.get_title("left").replace("\n", " "))


def test_blocks_are_held_out_whole():
    section = Section(name="a", xy=lattice(20), expression=np.ones((400, 1), np.float32))
    [fold] = block_folds([section], 5, 4.0, random_state=0, min_spots=20)
    assert set(fold) == set(range(5))
    assert np.bincount(fold).min() > 40
    same = np.mean([fold[i] == fold[i + 1] for i in range(399) if section.xy[i, 1] == section.xy[i + 1, 1]])
    assert same > 0.7  # three of four neighbors in a row are in the same block


def test_predictions_are_of_spots_that_were_not_fitted_on():
    seen = []

    class Recorder:
        def predict(self, points):
            assert not set(map(tuple, points.xy)) & seen[-1]
            return values[grids.nearest(points.xy, section.xy)[1][:, 0]] * 2 + 1

    def refit(parts):
        seen.append({tuple(place) for part in parts for place in part.xy})
        return Recorder()

    random = np.random.default_rng(0)
    values, look = random.uniform(size=(400, 3)).astype(np.float32), random.normal(size=(400, 4)).astype(np.float32)
    section = Section(name="a", xy=lattice(20), expression=values, features=look)
    folds = block_folds([section], 5, 4.0, random_state=0, min_spots=20)
    columns = _gene_test.scores_and_p_values([section], [section], folds, refit, 0)
    assert len(seen) == 5
    assert_allclose(columns["pearson"], 1)
    assert_allclose(columns["pearson_std"], 0, atol=1e-6)
    assert [f"sthisto_{name}" for name in columns] == COLUMNS


def test_models_that_read_no_features_need_them_here(section, refuses):
    tl.fit(section, "idw")
    tl.test_genes(section, random_state=np.int64(0))
    assert isinstance(section.var["sthisto_qvalue"], pd.Series)
    del section.obsm["X_histo"]
    with refuses(section, KeyError, "no image features 'X_histo'"):
        tl.test_genes(section)


def test_sections_that_are_too_small_are_refused(refuses):
    tiny = synthetic(25, n_genes=10)
    tiny.obsm["X_histo"] = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)
    tl.fit(tiny, "ridge")
    with refuses(tiny, ValueError, "too few spots to test genes|too small to hold out"):
        tl.test_genes(tiny)


def test_a_refit_removes_the_results_of_the_former_model(tested):
    tl.fit(tested, "idw")
    assert not set(COLUMNS) & set(tested.var)
