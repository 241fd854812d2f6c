"""Inverse-distance weighting against the formula by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import KNeighborsRegressor

from sthisto.models import Section
from sthisto.models.idw import Idw

RUN = {"random_state": 0, "device": "cpu", "progress": False}


def spots(random_state: int = 0, n: int = 60, g: int = 4, name: str = "a") -> Section:
    rng = np.random.default_rng(random_state)
    return Section(name=name, xy=rng.uniform(0, 10, (n, 2)), expression=rng.random((n, g), dtype=np.float32))


def points(random_state: int = 1, m: int = 25, name: str = "a") -> Section:
    return Section(name=name, xy=np.random.default_rng(random_state).uniform(-2, 12, (m, 2)))


def by_hand(point, xy, expression, k, power):
    distance = np.hypot(*(xy - point).T)
    near = np.argsort(distance)[:k]
    return np.average(expression[near], axis=0, weights=distance[near] ** -power)


@pytest.mark.parametrize(("k", "power"), [(1, 2), (5, 2), (16, 1), (16, 3.5)])
def test_points_take_the_weighted_average(k, power):
    section, there = spots(), points()
    model = Idw(n_neighbors=k, power=power)
    model.fit([section], **RUN)
    expected = [by_hand(p, section.xy, section.expression, k, power) for p in there.xy]
    assert_allclose(model.predict(there), expected, rtol=1e-5)


def test_agrees_with_scikit_learn():
    section, there = spots(), points()
    model = Idw()
    model.fit([section], **RUN)
    neighbors = KNeighborsRegressor(16, weights=lambda d: d**-2.0).fit(section.xy, section.expression)
    assert_allclose(model.predict(there), neighbors.predict(there.xy), rtol=1e-5)


def test_held_out_spots_are_predicted_by_the_others():
    section = spots(n=30)
    held_out = Idw(n_neighbors=7).fit([section], **RUN)[0]
    for i in range(len(section)):
        others = np.arange(len(section)) != i
        expected = by_hand(section.xy[i], section.xy[others], section.expression[others], 7, 2)
        assert_allclose(held_out[i], expected, rtol=1e-5)


def test_a_point_on_a_spot_takes_its_value():
    section = spots()
    model = Idw()
    model.fit([section], **RUN)
    assert_array_equal(model.predict(section), section.expression)


def test_spots_that_share_a_place_are_averaged_there_and_speak_for_each_other():
    xy = np.array([[0.0, 0], [0, 0], [1, 0], [2, 0]])
    section = Section(name="a", xy=xy, expression=np.array([[1], [3], [10], [20]], dtype=np.float32))
    model = Idw(n_neighbors=4)
    held_out = model.fit([section], **RUN)[0]
    assert_array_equal(model.predict(section)[:2], [[2], [2]])
    assert_array_equal(held_out[:2], [[3], [1]])


def test_few_spots():
    three = spots(n=3)
    model = Idw(n_neighbors=16)
    assert model.fit([three], **RUN)[0].shape == (3, 4)
    assert np.isfinite(model.predict(points())).all()
    lone = spots(n=1)
    assert np.isnan(model.fit([lone], **RUN)[0]).all()
    assert_array_equal(model.predict(points()), np.tile(lone.expression, (25, 1)))


def test_sections_do_not_mix():
    a, b = spots(0, name="a"), spots(7, n=40, name="b")
    alone, both = Idw(), Idw()
    (held_alone,) = alone.fit([b], **RUN)
    _, held_both = both.fit([a, b], **RUN)
    assert_array_equal(held_both, held_alone)
    assert_array_equal(both.predict(points(name="b")), alone.predict(points(name="b")))


def test_a_section_without_spots_is_refused():
    model = Idw()
    model.fit([spots()], **RUN)
    with pytest.raises(ValueError, match=r"none of 'new'.*'a'"):
        model.predict(points(name="new"))


def test_sections_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(ValueError, match="must differ"):
        Idw().fit([spots(), spots(1)], **RUN)
    with pytest.raises(ValueError, match="no measured expression"):
        Idw().fit([points()], **RUN)


def test_restored_state_predicts_the_same_bits():
    model, other = Idw(), Idw()
    model.fit([spots(), spots(1, name="β-2")], **RUN)
    state = model.state()
    assert all(value.dtype.kind in "iuf" for value in state.values())
    other.restore({key: value.copy() for key, value in state.items()})
    assert_array_equal(other.predict(points(name="β-2")), model.predict(points(name="β-2")))


@settings(deadline=None, max_examples=40)
@given(
    arrays(np.float64, (12, 2), elements=st.integers(-6, 6).map(float)),
    arrays(np.float64, (5, 2), elements=st.floats(-8, 8)),
    st.floats(0.5, 20),
    st.integers(1, 14),
)
def test_predictions_stay_within_the_measured_and_move_with_the_tissue(xy, there, power, k):
    expression = np.random.default_rng(0).random((12, 3), dtype=np.float32)
    model, moved = Idw(n_neighbors=k, power=power), Idw(n_neighbors=k, power=power)
    model.fit([Section(name="a", xy=xy, expression=expression)], **RUN)
    predicted = model.predict(Section(name="a", xy=there))
    assert (predicted >= expression.min(axis=0) - 1e-6).all()
    assert (predicted <= expression.max(axis=0) + 1e-6).all()
    order = np.random.default_rng(1).permutation(5)
    assert_array_equal(model.predict(Section(name="a", xy=there[order])), predicted[order])
    moved.fit([Section(name="a", xy=xy * 4, expression=expression)], **RUN)
    assert_allclose(moved.predict(Section(name="a", xy=there * 4)), predicted, rtol=1e-5)
