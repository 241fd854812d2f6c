"""The spread of a new measurement, on simulated data whose spread is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sthisto.uncertainty import MeanVarianceTrend


def simulated(n=600, g=30, *, sd=lambda mean: 0.2 + 0.3 * mean, factor=1.0, random_state=0):
    """Means (n, g), measurements about them and their true standard deviations."""
    random = np.random.default_rng(random_state)
    mean = random.uniform(0, 3, (n, g)).astype(np.float32)
    true = sd(mean) * np.broadcast_to(factor, g)
    return mean, (mean + true * random.normal(size=(n, g))).astype(np.float32), true


@pytest.mark.parametrize("sd", [lambda m: 0.5 + 0 * m, lambda m: 0.2 + 0.3 * m, lambda m: 0.9 - 0.2 * m])
def test_nine_of_ten_new_measurements_lie_within_1_64_deviations(sd):
    spread = MeanVarianceTrend.fit(*simulated(sd=sd)[1::-1])
    mean, measured, _ = simulated(sd=sd, random_state=1)
    std = spread(mean)
    within = np.abs(measured - mean) < 1.645 * std
    assert within.mean() == pytest.approx(0.9, abs=0.01)
    for low, high in [(0, 1), (1, 2), (2, 3)]:  # at every level, not only on the whole
        assert within[(low < mean) & (mean < high)].mean() == pytest.approx(0.9, abs=0.025)


def test_it_is_the_true_deviation():
    mean, measured, true = simulated(n=2000)
    assert_allclose(MeanVarianceTrend.fit(measured, mean)(mean), true, rtol=0.15)


def test_each_gene_has_its_own_factor():
    factor = np.linspace(0.5, 2, 30)
    mean, measured, _ = simulated(sd=lambda m: 0.5 + 0 * m, factor=factor)
    spread = MeanVarianceTrend.fit(measured, mean)
    assert np.corrcoef(np.sqrt(spread.factor), factor)[0, 1] > 0.99
    fresh, again, _ = simulated(sd=lambda m: 0.5 + 0 * m, factor=factor, random_state=1)
    within = (np.abs(again - fresh) < 1.645 * spread(fresh)).mean(axis=0)
    assert_allclose(within, 0.9, atol=0.06)


def test_few_spots_share_the_trend():
    """With as few as four spots a gene's own residuals count little."""
    factor = np.where(np.arange(30) < 15, 0.2, 2.0)
    ratio = {}
    for n in (4, 2000):
        mean, measured, _ = simulated(n=n, factor=factor)
        own = np.sqrt(MeanVarianceTrend.fit(measured, mean).factor)
        ratio[n] = own[15:].mean() / own[:15].mean()
    assert ratio[4] < 0.35 * ratio[2000]
    assert ratio[2000] == pytest.approx(10, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.floats(1.0, 20.0), st.integers(0, 99))
def test_it_grows_with_the_residuals(times, random_state):
    mean, measured, _ = simulated(n=40, g=5, random_state=random_state)
    wider = mean + np.float32(times) * (measured - mean)
    assert_allclose(
        MeanVarianceTrend.fit(wider, mean)(mean), times * MeanVarianceTrend.fit(measured, mean)(mean), rtol=1e-3
    )


def test_spots_that_were_not_held_out_do_not_count():
    mean, measured, _ = simulated(n=50)
    held_out = mean.copy()
    held_out[20:] = np.nan
    some, alone = MeanVarianceTrend.fit(measured, held_out), MeanVarianceTrend.fit(measured[:20], mean[:20])
    for name, value in alone.state().items():
        assert_array_equal(some.state()[name], value)


@pytest.mark.parametrize("seen", [0, 1])
def test_too_few_held_out_spots(seen):
    mean, measured, _ = simulated(n=5)
    mean[seen:] = np.nan
    with pytest.raises(ValueError, match=f"{seen} spots with a held-out prediction; a variance needs at least 2"):
        MeanVarianceTrend.fit(measured, mean)


def test_restored_it_gives_the_same_bits():
    mean, measured, _ = simulated(n=9000, g=3)  # more rows than are done at once
    spread = MeanVarianceTrend.fit(measured, mean)
    again = MeanVarianceTrend.restore({**spread.state(), "other": np.zeros(3)})
    assert_array_equal(again(mean), spread(mean), strict=True)
    assert_array_equal(spread(mean)[4000:5000], spread(mean[4000:5000]))


def test_beyond_the_levels_seen_it_stays_as_at_the_last():
    mean, measured, _ = simulated()
    spread = MeanVarianceTrend.fit(measured, mean)
    edge = np.tile(np.float32([[spread.level[0]], [spread.level[-1]]]), 30)
    beyond = np.tile(np.float32([[-5], [50]]), 30)
    assert_allclose(spread(beyond), spread(edge), rtol=1e-6)


def test_a_gene_without_any_counts():
    mean, measured, _ = simulated(g=4)
    mean[:, 0] = measured[:, 0] = 0
    std = MeanVarianceTrend.fit(measured, mean)(mean)
    assert np.isfinite(std).all()
    assert std[:, 0].max() < 0.05
    assert np.median(std[:, 1:]) > 0.5


def test_perfect_predictions_have_no_spread():
    mean, _, _ = simulated(n=10, g=3)
    assert_allclose(MeanVarianceTrend.fit(mean, mean)(mean), 0, atol=1e-6)
