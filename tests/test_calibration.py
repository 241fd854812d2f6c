"""Intervals, probabilities and growth of the spread, on simulated data whose distribution is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from sthisto._statistics import FeatureStatistics
from sthisto.uncertainty import (
    Calibration,
    Covariates,
    DistanceInflation,
    HeldOutPredictions,
    MeanVarianceTrend,
    NoveltyDetector,
    PredictiveDistribution,
)


def typical(n, distance=1.0, novelty=1.0):
    return Covariates(np.broadcast_to(float(distance), n).copy(), np.broadcast_to(float(novelty), n).copy())


def counts(n=400, g=40, *, random_state=0, low=0.05, high=3.0):
    """Log-normalised Poisson counts and the means that they are about: most are 0 for rare genes."""
    random = np.random.default_rng(random_state)
    rate = np.geomspace(low, high, g) * random.uniform(0.5, 2, (n, 1)) * random.uniform(0.7, 1.4, (n, g))
    many = np.log1p(random.poisson(rate[None], (500, n, g))).mean(axis=0)
    return np.log1p(random.poisson(rate)).astype(np.float32), many.astype(np.float32)


@pytest.fixture(scope="module")
def calibration():
    return Calibration.fit(HeldOutPredictions(*counts(), typical(400)))


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("genes", [slice(0, 20), slice(20, 40)], ids=["rare", "common"])
def test_the_randomised_transform_is_covered_as_often_as_said(calibration, level, genes):
    measured, mean = counts(random_state=1)
    less, up_to = calibration.cumulative(measured, mean, typical(400))
    assert (less <= up_to).all()
    even = (less + (up_to - less) * np.random.default_rng(2).uniform(size=less.shape))[:, genes]
    assert (np.abs(even - 0.5) < level / 2).mean() == pytest.approx(level, abs=0.015)


def test_bounds_hold_at_least_as_often_as_said_and_are_the_quantiles(calibration):
    measured, mean = counts(random_state=1)
    low, high = calibration.interval(mean, typical(400), 0.9)
    assert low.dtype == high.dtype == np.float32
    assert (low >= 0).all()
    assert (low <= high).all()
    assert ((low <= measured) & (measured <= high)).mean() > 0.89  # zeros are held whole: more than .9 of rare genes
    common = (low > 0) & (high < 2)
    below, _ = calibration.cumulative(low, mean, typical(400))
    assert_allclose(below[common], 0.05, atol=5e-3)  # bounds are float32, the distribution is steep


def test_a_gene_that_is_mostly_zero_has_zero_as_lower_bound(calibration):
    _, mean = counts()
    low, high = calibration.interval(mean, typical(400), 0.8)
    assert (low[:, :10] == 0).all()
    assert high[:, 0].mean() < high[:, -1].mean()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.9), st.floats(0.01, 0.09), st.floats(1, 9), st.floats(0, 2))
def test_wider_levels_hold_narrower_ones(calibration, level, more, distance, mean):
    means, where = np.full((3, 40), mean, np.float32), typical(3, distance)
    inner, outer = (calibration.interval(means, where, each) for each in (level, level + more))
    assert (outer[0] <= inner[0]).all()
    assert (outer[1] >= inner[1]).all()


@pytest.mark.parametrize("level", [0, 1, -0.5, 90, 0.9999])
def test_levels_that_are_no_probability(calibration, level):
    with pytest.raises(ValueError, match=f"interval={level}: expected a probability above 0 and up to 0.998"):
        calibration.interval(np.ones((1, 40), np.float32), typical(1), level)


def test_rows_are_told_apart_however_many_there_are(calibration):
    _, mean = counts(random_state=3)
    many, where = np.tile(mean, (7, 1)), Covariates(np.linspace(0, 9, 2800), np.ones(2800))
    whole = calibration.std(many, where)
    assert_array_equal(calibration.std(many[2040:2060], where[np.arange(2040, 2060)]), whole[2040:2060])


def test_restored_it_gives_the_same_bits(calibration):
    _, mean = counts(random_state=3)
    again = Calibration.restore({**calibration.state(), "other": np.zeros(3)})
    where = Covariates(np.linspace(0, 9, 400), np.linspace(0.5, 3, 400))
    assert_array_equal(again.std(mean, where), calibration.std(mean, where), strict=True)
    for found, expected in zip(again.interval(mean, where, 0.9), calibration.interval(mean, where, 0.9), strict=True):
        assert_array_equal(found, expected, strict=True)
    assert all(value.dtype.kind in "fi" for value in calibration.state().values())


def kriged(n, g, distance, *, random_state=0, novelty=None, look=0.0):
    """Residuals whose variance grows from 1 towards that of the gene, 4, with a length of 2 pitches."""
    random = np.random.default_rng(random_state)
    novelty = np.ones(n) if novelty is None else novelty
    variance = 1 + 3 * (1 - np.exp(-(distance - 1) / 2)) + look * (novelty - 1)
    mean = np.full((n, g), 5.0, np.float32)
    return HeldOutPredictions(
        (mean + np.sqrt(variance)[:, None] * random.normal(size=(n, g))).astype(np.float32), mean, None
    )


def with_looks(held_out, distance, novelty):
    return HeldOutPredictions(held_out.measured, held_out.predicted, Covariates(distance, novelty))


def test_the_spread_grows_with_distance_as_it_does():
    random, n, g = np.random.default_rng(0), 1500, 30
    near, away = np.ones(n), random.uniform(1, 6, n)
    left_out = with_looks(kriged(n, g, near), near, np.ones(n))
    signal = np.sqrt(3) * random.normal(size=(n, g)).astype(np.float32)  # what the model explains near spots
    left_out = HeldOutPredictions(
        left_out.measured + signal + 20, left_out.predicted + signal + 20, left_out.covariates
    )
    blocks = with_looks(kriged(n, g, away, random_state=1), away, np.ones(n))
    blocks = HeldOutPredictions(blocks.measured + 20, blocks.predicted + 20, blocks.covariates)
    calibration = Calibration.fit(left_out, blocks)
    distance = np.array([0, 1.0, 2.0, 4.0, 6.0])
    std = calibration.std(np.full((5, g), 25, np.float32), Covariates(distance, np.ones(5))).mean(axis=1)
    assert_allclose(std, np.sqrt(1 + 3 * (1 - np.exp(-np.maximum(distance - 1, 0) / 2))), rtol=0.08)
    extrapolated = calibration.std(np.full((1, g), 25, np.float32), typical(1, np.inf)).mean()
    assert extrapolated == pytest.approx(2, rel=0.15)  # a section without measured spots: the gene's own deviation
    assert calibration.inflation.max_tested_distance == away.max()


def test_without_blocks_it_does_not_grow():
    calibration = Calibration.fit(HeldOutPredictions(*counts(), typical(400)))
    _, mean = counts()
    assert_array_equal(calibration.std(mean, typical(400, 50)), calibration.std(mean, typical(400)))
    assert calibration.inflation.max_tested_distance == 1


def test_the_spread_grows_on_unusual_tissue():
    random, n = np.random.default_rng(0), 1500
    novelty = random.uniform(0.5, 3, n)
    held_out = with_looks(kriged(n, 30, np.ones(n), novelty=np.maximum(novelty, 1), look=0.8), np.ones(n), novelty)
    reach = Calibration.fit(held_out).inflation
    factor = reach(np.ones(3), np.array([0.5, 1.0, 2.0])).mean(axis=1)
    assert factor[0] == factor[1]
    assert factor[2] / factor[1] == pytest.approx(1.8, abs=0.12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 30), min_size=2, max_size=8), st.integers(0, 20))
def test_variance_never_shrinks_with_distance(distances, random_state):
    random = np.random.default_rng(random_state)
    reach = DistanceInflation.fit(
        random.chisquare(1, (60, 5)), random.uniform(1, 5, 60), random.uniform(0.5, 3, 60), random.uniform(0, 3, 5), 1.0
    )
    factor = reach(np.sort(distances), np.ones(len(distances)))
    assert (np.diff(factor, axis=0) >= 0).all()
    assert (factor > 0).all()
    assert np.isfinite(reach(np.array([np.inf]), np.ones(1))).all()


def test_the_distribution_of_normal_values_is_normal():
    """Where nothing is 0 the bounds are those of the normal distribution: an independent reference."""
    random = np.random.default_rng(0)
    mean = random.uniform(8, 12, (3000, 10))
    distribution = PredictiveDistribution.fit(mean + 0.7 * random.normal(size=mean.shape), mean, np.ones(mean.shape))
    points, wider = np.full((1, 10), 10.0), np.ones((1, 10))
    for p in (0.05, 0.5, 0.9):
        assert_allclose(distribution.quantile(p, points, wider).mean(), stats.norm(10, 0.7).ppf(p), atol=0.06)
        assert_allclose(distribution.quantile(p, points, 2 * wider).mean(), stats.norm(10, 1.4).ppf(p), atol=0.12)


def test_zeros_are_as_many_as_a_poisson_count_has():
    random = np.random.default_rng(0)
    rate = random.uniform(0.2, 3, (4000, 10))
    distribution = PredictiveDistribution.fit(random.poisson(rate).astype(float), rate, np.ones(rate.shape))
    points = np.array([[0.3], [1.0], [2.5]]) * np.ones(10)
    _, zero = distribution.cumulative(np.zeros((3, 10)), points, np.ones((3, 10)))
    assert_allclose(zero.mean(axis=1), np.exp([-0.3, -1, -2.5]), atol=0.04)


def test_genes_without_any_counts_or_without_zeros():
    random = np.random.default_rng(0)
    measured = random.uniform(1, 2, (50, 3)).astype(np.float32)
    measured[:, 0] = 0
    mean = np.tile(measured.mean(axis=0), (50, 1))
    calibration = Calibration.fit(HeldOutPredictions(measured, mean, typical(50)))
    low, high = calibration.interval(mean, typical(50), 0.9)
    assert np.isfinite(low).all()
    assert high[:, 0].max() == 0
    assert (low[:, 1:] > 0.9).all()


@pytest.mark.parametrize("gene", [0, 20])
def test_one_gene_without_held_out_counts_changes_no_other(gene):
    """A log ratio to its mean of 0 once overturned the shared power and curves."""
    measured, mean = counts()
    empty = measured.copy()
    empty[:, gene] = 0
    found, expected = (Calibration.fit(HeldOutPredictions(each, mean, typical(400))) for each in (empty, measured))
    assert found.distribution.power == expected.distribution.power
    assert np.abs(found.distribution.location[0]).max() < 10
    others = np.arange(40) != gene
    for one, other in zip(*(each.interval(mean, typical(400), 0.9) for each in (found, expected)), strict=True):
        assert np.abs(one - other)[:, others].mean() < 0.02
        assert np.isfinite(one).all()


def test_spots_that_were_not_held_out_do_not_count():
    measured, mean = counts(n=60)
    some = mean.copy()
    some[30:] = np.nan
    partly = Calibration.fit(HeldOutPredictions(measured, some, typical(60))).state()
    for name, value in Calibration.fit(HeldOutPredictions(measured[:30], mean[:30], typical(30))).state().items():
        assert_array_equal(partly[name], value)


def test_near_spots_it_is_the_plain_spread(calibration):
    measured, mean = counts()
    plain = MeanVarianceTrend.fit(measured, mean)(mean)
    ratio = calibration.std(mean, typical(400)) / plain
    assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert ratio[0, 0] == pytest.approx(1, abs=0.05)


# --- unusual tissue --------------------------------------------------------------------------------------------------


def test_one_in_a_hundred_typical_points_is_novel_and_other_tissue_is():
    random = np.random.default_rng(0)
    known = NoveltyDetector.fit([random.normal(size=(1500, 6)).astype(np.float32)], random_state=0)
    fresh = random.normal(size=(4000, 6)).astype(np.float32)
    novelty = known(fresh, 0)
    assert np.median(novelty) == pytest.approx(1, abs=0.05)
    assert known.is_novel(novelty).mean() == pytest.approx(0.01, abs=0.008)
    assert known.is_novel(known(fresh + 12, 0)).all()


def test_gaps_between_kinds_of_tissue_are_unusual():
    random = np.random.default_rng(0)
    kinds = np.repeat([[-5.0], [5.0]], 100, axis=0) + 0.3 * random.normal(size=(200, 4))
    known = NoveltyDetector.fit([kinds.astype(np.float32)], random_state=0)
    assert known.is_novel(known(np.zeros((1, 4), np.float32), 0)).all()  # it is the very mean


def test_stains_differ_by_section():
    random = np.random.default_rng(0)
    one = random.normal(size=(200, 4)).astype(np.float32)
    known = NoveltyDetector.fit([one, 3 * one + 40], random_state=0)
    assert_allclose(known(3 * one[:20] + 40, 1), known(one[:20], 0), rtol=1e-3)
    assert known.is_novel(known(3 * one[:20] + 40, 0)).all()
    assert not known.is_novel(known(3 * one + 40, -1)).all()  # a new section is standardised by itself
    statistics = FeatureStatistics.of(5 * one - 7)  # or by the statistics of its spots, whichever points are given
    assert_allclose(known(5 * one[:20] - 7, -1, statistics=statistics), known(one[:20], 0), rtol=1e-3)


def test_a_training_spot_is_looked_up_without_itself():
    random = np.random.default_rng(0)
    features = random.normal(size=(300, 4)).astype(np.float32)
    features[7] = 9
    known = NoveltyDetector.fit([features], random_state=0)
    seen = known(features, 0, training=True)
    assert seen.argmax() == 7
    assert np.median(seen) == pytest.approx(1, rel=1e-6)
    assert (known(features, 0) < seen).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9), st.integers(6, 60))
def test_files_keep_the_detector(d, random_state, n):
    features = np.random.default_rng(random_state).normal(size=(n, d)).astype(np.float32)
    known = NoveltyDetector.fit([features], random_state=random_state)
    again = NoveltyDetector.restore({name: np.array(value) for name, value in known.state().items()})
    assert_array_equal(again(features, 0), known(features, 0))
    assert again.limit == known.limit
    assert NoveltyDetector.restore({}) is None
