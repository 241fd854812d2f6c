"""Dense maps that average to what the model says of the spots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import grids, tl
from sthisto.tl._spot_means import match_spot_means

PITCH, DIAMETER = 10.0, 5.5


def array(factor, size=4, g=3, random_state=0):
    """Spots of a hexagonal array, a refined lattice over them, and random values at both."""
    lattice, random = grids.Lattice.hexagonal(PITCH), np.random.default_rng(random_state)
    spots = lattice.points(np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1).reshape(-1, 2))
    fine = lattice.refine(factor)
    points = fine.points(fine.cover(spots, 0.7 * PITCH))
    values = random.gamma(0.5, size=(len(points), g)) * (random.uniform(size=(len(points), g)) < 0.6)
    return spots, points, values.astype(np.float32), random.gamma(0.5, size=(len(spots), g)).astype(np.float32)


def averages(values, points, spots):
    """By hand: the mean over the points that lie in each disc."""
    inside = np.linalg.norm(points[:, None] - spots[None], axis=2) <= DIAMETER / 2
    return np.stack([values[rows].astype(float).mean(axis=0) for rows in inside.T])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 999), st.sampled_from([0.0, 0.3, 1.0, 40.0]))
def test_footprints_average_to_what_is_believed(factor, random_state, times):
    spots, points, values, believed = array(factor, random_state=random_state)
    made = match_spot_means(values, points, believed * np.float32(times), spots, pitch=PITCH, diameter=DIAMETER)
    assert made.dtype == np.float32
    assert (made >= 0).all()
    assert_allclose(averages(made, points, spots), believed * times, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 8), st.integers(0, 99), st.floats(-0.5, 3))
def test_what_all_spots_need_is_the_same_everywhere(factor, random_state, more):
    spots, points, values, _ = array(factor, random_state=random_state)
    values += 1
    wanted = (averages(values, points, spots) + more).astype(np.float32)
    made = match_spot_means(values, points, wanted, spots, pitch=PITCH, diameter=DIAMETER)
    assert_allclose(made - values, more, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.permutations(range(16)))
def test_the_order_of_spots_and_points_does_not_matter(random_state, order):
    spots, points, values, believed = array(5, random_state=random_state)
    shuffled = np.random.default_rng(random_state).permutation(len(points))
    plain = match_spot_means(values, points, believed, spots, pitch=PITCH, diameter=DIAMETER)
    again = match_spot_means(
        values[shuffled], points[shuffled], believed[order], spots[order], pitch=PITCH, diameter=DIAMETER
    )
    assert_allclose(again, plain[shuffled], atol=1e-5)


def test_what_is_conserved_stays_as_it_is():
    spots, points, values, _ = array(6)
    wanted = averages(values, points, spots).astype(np.float32)
    assert_allclose(match_spot_means(values, points, wanted, spots, pitch=PITCH, diameter=DIAMETER), values, atol=1e-6)


def test_the_correction_has_no_steps():
    """Along a line over two spots, neighboring points are corrected alike; scaling each footprint would jump."""
    spots = np.array([[0.0, 0.0], [PITCH, 0.0]])
    x = np.linspace(-4, 14, 361)
    points, flat = np.stack([x, 0 * x], axis=1), np.full((361, 1), 2, np.float32)
    made = match_spot_means(flat, points, np.array([[1.5], [3.0]], np.float32), spots, pitch=PITCH, diameter=DIAMETER)
    change = (made - flat).ravel()
    assert np.abs(np.diff(change)).max() < 0.03
    assert change[0] == pytest.approx(-0.5, abs=0.2)
    assert change[x == 5].item() == pytest.approx(0.25, abs=0.02)


def test_footprints_without_points_ask_for_nothing():
    spots, points, values, believed = array(4)
    near = np.linalg.norm(points - spots[0], axis=1) < 0.5 * PITCH
    made = match_spot_means(values[near], points[near], believed, spots, pitch=PITCH, diameter=DIAMETER)
    assert_allclose(averages(made, points[near], spots[:1]), believed[:1], rtol=1e-5, atol=1e-5)
    nowhere = points[near] + 1000
    assert_array_equal(
        match_spot_means(values[near], nowhere, believed, spots, pitch=PITCH, diameter=DIAMETER), values[near]
    )


def test_upsample_conserves_what_predict_says(section, encoder):
    tl.fit(section)
    tl.predict(section)
    diameter = next(iter(section.uns["spatial"].values()))["scalefactors"]["spot_diameter_fullres"]
    spots, wanted = section.obsm["spatial"], section.layers["sthisto"]
    made = {option: tl.upsample(section, 4, encoder=encoder, match_spot_means=option) for option in (False, True)}
    inside = np.linalg.norm(made[True].obsm["spatial"][:, None] - spots[None], axis=2) <= diameter / 2 * (1 + 1e-9)
    assert (inside.sum(axis=0) > 3).all()
    error = {
        option: np.abs(np.stack([dense.X[rows].mean(axis=0, dtype=float) for rows in inside.T]) - wanted).max()
        for option, dense in made.items()
    }
    assert error[True] < 1e-5
    assert error[False] > 1e-3
    assert (made[True].X >= 0).all()
    assert np.corrcoef(made[True].X.ravel(), made[False].X.ravel())[0, 1] > 0.98
    assert_array_equal(made[True].obs["extrapolated"], made[False].obs["extrapolated"])


def test_several_sections_are_conserved_apart(sections, encoder):
    tl.fit(sections, "idw", library_key="library")
    dense = tl.upsample(sections, 3, match_spot_means=True)
    tl.predict(sections)
    for name in sections.obs["library"].unique():
        own, spots = dense[dense.obs["library"] == name], sections[sections.obs["library"] == name]
        diameter = sections.uns["spatial"][name]["scalefactors"]["spot_diameter_fullres"]
        near = np.linalg.norm(own.obsm["spatial"][:, None] - spots.obsm["spatial"][None], axis=2) <= diameter / 2
        found = np.stack([own.X[rows].mean(axis=0) for rows in near.T])
        assert_allclose(found, spots.layers["sthisto"], atol=1e-5)
