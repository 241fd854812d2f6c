import contextlib
import csv
import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from sthisto.grids import Lattice, hold_out, nearest, spacing, within

DATA = Path(__file__).parents[2] / "shared" / "data"
few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def turn(degrees):
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


@st.composite
def lattices(draw):
    """Hexagonal and square lattices, a little stretched, at any angle and place."""
    made = draw(st.sampled_from([Lattice.square, Lattice.hexagonal]))(draw(st.floats(0.5, 300)))
    basis = made.basis @ np.diag([draw(st.floats(0.95, 1.05)), 1.0]) @ turn(draw(st.floats(0, 360)))
    return Lattice(np.array([draw(st.floats(-1e4, 1e4)), draw(st.floats(-1e4, 1e4))]), basis)


@st.composite
def skewed_and_short(draw):
    """One lattice by a basis of long vectors at a narrow angle, and by one of its shortest."""
    short = draw(lattices())
    skew = np.array([[1, 0], [draw(st.integers(-3, 3)), 1]]) @ np.array([[1, draw(st.integers(-3, 3))], [0, 1]])
    return Lattice(short.origin, skew @ short.basis), short


def square_of_sites(side):
    return np.indices((side, side)).reshape(2, -1).T


def spots_on(lattice, index, *, keep=1.0, jitter=0.0, random_state=0):
    """Spots near some of the sites, in random order, with the index of each; none strays out of its site's cell."""
    random = np.random.default_rng(random_state)
    index = random.permutation(index)[: round(keep * len(index))]
    stray = random.normal(0, jitter, index.shape)
    stray /= np.maximum(1, np.linalg.norm(stray, axis=1, keepdims=True) / 0.45)
    return lattice.points(index) + stray * lattice.pitch, index


def assert_same_lattice(found, true, tolerance=1e-6):
    change = found.basis @ np.linalg.inv(true.basis)
    np.testing.assert_allclose(change, np.rint(change), atol=tolerance)
    assert abs(np.linalg.det(change)) == pytest.approx(1, abs=4 * tolerance)
    shift = (found.origin - true.origin) @ np.linalg.inv(true.basis)
    np.testing.assert_allclose(shift, np.rint(shift), atol=tolerance)


def assert_same_index(found, true):
    """The two count the same sites, from another origin along other vectors."""
    table = np.c_[true, np.ones(len(true))]
    change, *_ = np.linalg.lstsq(table, found, rcond=None)
    np.testing.assert_allclose(table @ change, found, atol=1e-6)
    np.testing.assert_allclose(change, np.rint(change), atol=1e-6)
    assert abs(np.linalg.det(change[:2])) == pytest.approx(1)


# --- fit ---------------------------------------------------------------------------------------------------------


@few
@given(lattices(), st.floats(0.4, 1), st.floats(0, 0.12), seeds)
def test_fit_finds_a_lattice_with_gaps_and_jitter(lattice, keep, jitter, random_state):
    spots, index = spots_on(lattice, square_of_sites(14), keep=keep, jitter=jitter, random_state=random_state)
    found = Lattice.fit(spots)
    assert_same_index(found.index(spots), index)
    assert found.kind == lattice.kind
    assert found.pitch == pytest.approx(lattice.pitch, rel=0.02)
    assert (found.index(spots).min(axis=0) == 0).all()


@few
@given(lattices(), seeds)
def test_fit_counts_across_the_gaps_between_pieces_of_tissue(lattice, random_state):
    pieces = np.random.default_rng(random_state).integers(-60, 60, (5, 1, 2)) + square_of_sites(12)
    spots, index = spots_on(
        lattice, np.unique(pieces.reshape(-1, 2), axis=0), keep=0.5, jitter=0.12, random_state=random_state
    )
    assert_same_index(Lattice.fit(spots).index(spots), index)


@pytest.mark.parametrize("made", [Lattice.square, Lattice.hexagonal])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 12), (3, 3)])
@pytest.mark.parametrize("degrees", [0, 17, 45, 90, 250])
def test_fit_of_a_handful_of_spots(made, shape, degrees):
    index = np.indices(shape).reshape(2, -1).T
    true = Lattice(np.array([7.0, -3.0]), made(140.0).basis @ turn(degrees))
    found = Lattice.fit(true.points(index))
    assert_same_lattice(found, true)
    assert found.kind == made(1.0).kind


def test_fit_does_not_miscount_over_a_quarter_of_a_million_bins():
    true = Lattice(np.array([1e4, -500.0]), Lattice.square(7.3).basis @ turn(1.7))
    spots, index = spots_on(true, square_of_sites(500), jitter=0.1)
    found = Lattice.fit(spots)
    assert_same_index(found.index(spots), index)
    assert found.pitch == pytest.approx(7.3, rel=1e-5)


def test_fit_where_one_site_in_fifty_is_taken():
    true = Lattice(np.zeros(2), Lattice.hexagonal(137.0).basis @ turn(11))
    spots, index = spots_on(true, square_of_sites(70), keep=0.02, jitter=0.002)
    assert_same_index(Lattice.fit(spots).index(spots), index)


def test_fit_follows_an_array_that_bends():
    spots, index = spots_on(Lattice.hexagonal(100.0), square_of_sites(50), keep=0.7, jitter=0.05)
    bent = spots + 20 * np.sin(spots[:, ::-1] / 1500)
    assert_same_index(Lattice.fit(bent).index(bent), index)


@few
@given(lattices(), st.floats(0, 360), st.floats(0.01, 100), st.floats(-1e5, 1e5), seeds)
def test_fit_commutes_with_turning_scaling_and_moving(lattice, degrees, scale, move, random_state):
    spots, _ = spots_on(lattice, square_of_sites(8), keep=0.8, jitter=0.05, random_state=random_state)
    found, moved = Lattice.fit(spots), Lattice.fit(scale * spots @ turn(degrees) + move)
    assert_same_lattice(
        moved, Lattice(scale * found.origin @ turn(degrees) + move, scale * found.basis @ turn(degrees))
    )
    assert moved.pitch == pytest.approx(scale * found.pitch)


@pytest.mark.parametrize(("made", "apart", "turns"), [(Lattice.square, 90, (0, 45)), (Lattice.hexagonal, 60, (0, 30))])
def test_refits_of_an_array_have_the_same_basis_at_the_usual_angles(made, apart, turns):
    for degrees in turns:
        true = Lattice(np.zeros(2), made(50.0).basis @ turn(degrees))
        for wobble, random_state in zip((-3, 0, 3), (1, 2, 3), strict=True):
            spots, _ = spots_on(true, square_of_sites(12), keep=0.6, jitter=0.05, random_state=random_state)
            a, b = Lattice.fit(spots @ turn(wobble)).basis
            direction = np.rad2deg([np.arctan2(v[1], v[0]) for v in (a, b)])
            np.testing.assert_allclose(direction, [degrees + wobble, degrees + wobble + apart], atol=1.5)


def test_fit_does_not_depend_on_the_order_of_the_spots():
    spots, _ = spots_on(Lattice.hexagonal(9.0), square_of_sites(40), jitter=0.1)
    one, other = Lattice.fit(spots), Lattice.fit(spots[::-1])
    np.testing.assert_allclose(other.basis, one.basis, rtol=1e-9)
    np.testing.assert_allclose(other.origin, one.origin, rtol=1e-9)


@pytest.mark.parametrize(
    ("spots", "message"),
    [
        (np.eye(2), "at least 5 spots; there are 2"),
        ([], "there are 0"),
        (np.zeros((9, 3)), r"shape is \(9, 3\)"),
        (np.r_[square_of_sites(4), [[np.nan, 0], [0, np.inf]]], "2 of 18 rows of xy are NaN or infinite"),
        (np.r_[square_of_sites(4), square_of_sites(4)[:3]], "3 of 19 spots are where another spot is"),
        (np.c_[np.arange(30), 2 * np.arange(30)], "one line"),
        (np.c_[np.arange(30), 0.01 * np.random.default_rng(0).normal(size=30)], "one line"),
        (np.random.default_rng(0).uniform(size=(400, 2)), "form no lattice"),
    ],
)
def test_fit_refuses_what_is_no_lattice(spots, message):
    with pytest.raises(ValueError, match=message):
        Lattice.fit(spots)


def test_fit_seldom_sees_a_lattice_in_a_few_random_spots():
    random, refused = np.random.default_rng(0), 0
    for _ in range(60):
        with contextlib.suppress(ValueError):
            Lattice.fit(random.uniform(size=(12, 2)))
            continue
        refused += 1
    assert refused >= 54


# --- the lattice itself ------------------------------------------------------------------------------------------


@few
@given(skewed_and_short(), seeds)
def test_index_inverts_points(pair, random_state):
    lattice, _ = pair
    index = np.random.default_rng(random_state).integers(-1000, 1000, (50, 2))
    found = lattice.index(lattice.points(index))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, index)


@few
@given(skewed_and_short(), seeds)
def test_index_is_that_of_the_nearest_site(pair, random_state):
    lattice, short = pair
    sites = short.points(square_of_sites(41) - 20)
    xy = short.origin + np.random.default_rng(random_state).uniform(-8, 8, (200, 2)) * short.pitch
    apart = np.linalg.norm(xy - lattice.points(lattice.index(xy)), axis=1)
    np.testing.assert_allclose(apart, cdist(xy, sites).min(axis=1), atol=1e-7)
    assert apart.max() <= lattice.reach * (1 + 1e-9)


def test_plain_rounding_would_miss_the_nearest_hexagonal_site():
    lattice, xy = Lattice.hexagonal(1.0), np.random.default_rng(0).uniform(-9, 9, (500, 2))
    rounded = np.rint(xy @ np.linalg.inv(lattice.basis))
    assert (rounded != lattice.index(xy)).any()


@few
@given(skewed_and_short())
def test_reach_is_the_distance_of_the_place_that_is_furthest_from_all_sites(pair):
    lattice, short = pair
    part = np.stack(np.meshgrid(*[np.linspace(0, 1, 60)] * 2), axis=-1).reshape(-1, 2)
    xy = short.origin + part @ short.basis
    furthest = np.linalg.norm(xy - lattice.points(lattice.index(xy)), axis=1).max()
    assert furthest <= lattice.reach * (1 + 1e-9)
    assert furthest >= lattice.reach * 0.97
    assert (lattice.kind, lattice.pitch) == (short.kind, pytest.approx(short.pitch))


def test_pitch_reach_and_kind_by_hand():
    hexagonal, square = Lattice.hexagonal(6.0), Lattice.square(6.0)
    oblique = Lattice(np.zeros(2), np.array([[1.0, 0.0], [0.0, 2.0]]))
    assert [lattice.kind for lattice in (hexagonal, square, oblique)] == ["hexagonal", "square", "oblique"]
    assert [lattice.pitch for lattice in (hexagonal, square, oblique)] == pytest.approx([6, 6, 1])
    assert hexagonal.reach == pytest.approx(6 / np.sqrt(3))
    assert square.reach == pytest.approx(6 / np.sqrt(2))
    assert oblique.reach == pytest.approx(np.sqrt(5) / 2)


@few
@given(lattices(), st.integers(1, 5), seeds)
def test_refine_keeps_the_old_sites_and_multiplies_the_density(lattice, factor, random_state):
    index = np.random.default_rng(random_state).integers(-100, 100, (30, 2))
    fine = lattice.refine(factor)
    np.testing.assert_allclose(fine.points(factor * index), lattice.points(index), rtol=1e-9, atol=1e-6)
    assert np.linalg.det(lattice.basis) / np.linalg.det(fine.basis) == pytest.approx(factor**2)
    centre, radius = [lattice.origin], 25 * lattice.reach
    assert len(fine.cover(centre, radius)) == pytest.approx(factor**2 * len(lattice.cover(centre, radius)), rel=0.1)
    assert (fine.kind, fine.pitch) == (lattice.kind, pytest.approx(lattice.pitch / factor))


@few
@given(lattices(), st.integers(1, 4), st.floats(0, 360), st.floats(-1e3, 1e3))
def test_refine_commutes_with_turning_and_moving(lattice, factor, degrees, move):
    moved = Lattice(lattice.origin @ turn(degrees) + move, lattice.basis @ turn(degrees))
    index = square_of_sites(5)
    turned = lattice.refine(factor).points(index) @ turn(degrees) + move
    np.testing.assert_allclose(moved.refine(factor).points(index), turned, atol=1e-6)


@pytest.mark.parametrize("factor", [0, -2, 2.0, 1.5, True, "2", None])
def test_refine_refuses_what_would_move_the_old_sites(factor):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Lattice.square(1.0).refine(factor)


@few
@given(skewed_and_short(), st.floats(0, 4), seeds)
def test_cover_is_all_sites_near_a_spot(pair, pitches, random_state):
    lattice, short = pair
    spots = short.origin + np.random.default_rng(random_state).uniform(-4, 4, (6, 2)) * short.pitch
    found = lattice.cover(spots, pitches * short.pitch)
    sites = short.points(square_of_sites(41) - 20)
    want = lattice.index(sites[cdist(sites, spots).min(axis=1) <= pitches * short.pitch])
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, want[np.lexsort(want.T[::-1])])


def test_cover_agrees_with_within_where_sites_lie_just_at_the_distance():
    lattice = Lattice(np.array([0.1, 0.2]), Lattice.hexagonal(0.7).basis @ turn(12.3))
    spots, index = lattice.points(square_of_sites(9)), square_of_sites(15) - 3
    for distance in (0.7, 1.4, 0.7 * np.sqrt(3)):
        near = within(lattice.points(index), spots, distance)
        np.testing.assert_array_equal(lattice.cover(spots, distance), index[near])


def test_cover_looks_at_the_tissue_only():
    lattice = Lattice.square(1.0)
    found = lattice.cover([[0.0, 0.0], [1e8, 3e8]], 1.0)
    want = np.array([[-1, 0], [0, -1], [0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(found, np.r_[want, np.add(want, [100_000_000, 300_000_000])])


def test_cover_in_several_batches(monkeypatch):
    spots, lattice = np.random.default_rng(0).uniform(0, 60, (200, 2)), Lattice.hexagonal(1.0)
    whole = lattice.cover(spots, 2.5)
    monkeypatch.setattr("sthisto.grids._lattice.BATCH", 100)
    np.testing.assert_array_equal(lattice.cover(spots, 2.5), whole)
    assert lattice.cover([], 2.5).shape == (0, 2)


@pytest.mark.parametrize("distance", [-1.0, np.nan, np.inf])
def test_distances_have_to_be_lengths(distance):
    with pytest.raises(ValueError, match="max_distance should be a finite length or 0"):
        Lattice.square(1.0).cover([[0.0, 0.0]], distance)
    with pytest.raises(ValueError, match="max_distance should be a finite length or 0"):
        within([[0.0, 0.0]], [[0.0, 0.0]], distance)


def test_a_lattice_is_checked_and_stays_as_it_is():
    with pytest.raises(ValueError, match="one line"):
        Lattice(np.zeros(2), np.array([[1.0, 2.0], [2.0, 4.0]]))
    with pytest.raises(ValueError, match=r"origin should hold finite numbers of shape \(2,\)"):
        Lattice(np.array([0.0, np.nan]), np.eye(2))
    with pytest.raises(ValueError, match="pitch should be a finite length above 0; got -3"):
        Lattice.hexagonal(-3)
    basis = np.eye(2)
    lattice = Lattice(np.zeros(2), basis)
    basis[:] = 0
    assert lattice.pitch == 1
    with pytest.raises(ValueError, match="read-only"):
        lattice.basis[0, 0] = 2


# --- nearest, within, spacing ------------------------------------------------------------------------------------


@few
@given(st.integers(1, 30), st.integers(1, 12), seeds)
def test_nearest_is_what_sorting_all_distances_gives(n, k, random_state):
    random = np.random.default_rng(random_state)
    spots, points, k = random.normal(size=(n, 2)), random.normal(size=(7, 2)), min(k, n)
    distance, row = nearest(points, spots, k)
    table = cdist(points, spots)
    np.testing.assert_allclose(distance, np.sort(table, axis=1)[:, :k])
    np.testing.assert_array_equal(row, np.argsort(table, axis=1)[:, :k])
    assert (distance.dtype, row.dtype) == (np.float64, np.intp)


@few
@given(st.integers(1, 9), seeds)
def test_ties_are_broken_the_same_way_in_any_order(k, random_state):
    random = np.random.default_rng(random_state)
    spots, points = square_of_sites(6).astype(float), Lattice.square(0.5).points(square_of_sites(11))
    distance, row = nearest(points, spots, k)
    spot_order, point_order = random.permutation(len(spots)), random.permutation(len(points))
    again, other = nearest(points[point_order], spots[spot_order], k)
    np.testing.assert_array_equal(again, distance[point_order])
    np.testing.assert_array_equal(spots[spot_order][other], spots[row[point_order]])
    alone = np.concatenate([nearest(points[[i]], spots, k)[1] for i in range(len(points))])
    np.testing.assert_array_equal(alone, row)


@pytest.mark.parametrize("k", [0, 4])
def test_nearest_refuses_more_spots_than_there_are(k):
    with pytest.raises(ValueError, match=f"from 1 to the number of spots, 3; got {k}"):
        nearest([[0.0, 0.0]], square_of_sites(2)[:3], k=k)


@few
@given(st.integers(0, 20), st.floats(0, 3), st.floats(0, 3), seeds)
def test_within_is_monotone_and_equals_brute_force(n, one, other, random_state):
    random = np.random.default_rng(random_state)
    spots, points = random.normal(size=(n, 2)), random.normal(size=(40, 2))
    small, large = (within(points, spots, distance) for distance in sorted((one, other)))
    assert (large | ~small).all()
    apart = np.array([[np.hypot(*(p - s)) for s in spots] for p in points]).reshape(40, n)
    np.testing.assert_array_equal(small, (apart <= min(one, other)).any(axis=1))


def test_within_counts_what_lies_just_at_the_distance():
    assert within([[0.0, 5.0], [3.0, 4.0], [5.0, 1.0]], [[0.0, 0.0]], 5.0).tolist() == [True, True, False]
    assert within([[1.0, 1.0]], [[1.0, 1.0]], 0.0).all()


def test_spacing_is_the_pitch_where_neighbors_are_too_near_or_missing():
    jittered, _ = spots_on(Lattice.square(200.0), square_of_sites(20), jitter=0.1)
    sparse, _ = spots_on(Lattice.hexagonal(7.0), square_of_sites(30), keep=0.15)
    assert spacing(jittered) == pytest.approx(200, rel=0.01)
    assert np.median(nearest(jittered, jittered, 2)[0][:, 1]) < 190
    assert spacing(sparse) == pytest.approx(7)


def test_spacing_of_cells_is_their_median_distance_and_says_so(caplog):
    cells = np.random.default_rng(0).uniform(size=(300, 2))
    with caplog.at_level(logging.INFO, logger="sthisto"):
        found = spacing(np.r_[cells, cells[:5]])
    reference = NearestNeighbors(n_neighbors=2).fit(cells).kneighbors(cells)[0][:, 1]
    assert found == pytest.approx(np.median(reference))
    assert "form no lattice" in caplog.text


def test_spacing_needs_two_positions():
    with pytest.raises(ValueError, match="at least two different positions; there are 1"):
        spacing([[3.0, 4.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match="1 of 2 rows"):
        spacing([[3.0, 4.0], [3.0, np.nan]])


# --- hold_out ----------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 300), st.floats(0.01, 0.99), seeds)
def test_hold_out_hides_exactly_the_fraction_and_repeats_itself(n, fraction, random_state):
    spots = np.random.default_rng(0).uniform(size=(n, 2))
    before = np.random.get_state()[1].copy()  # noqa: NPY002  the global state is what must not move
    hidden = hold_out(spots, fraction, random_state=random_state)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert hidden.dtype == bool
    assert hidden.sum() == round(fraction * n)
    np.testing.assert_array_equal(hold_out(spots, fraction, random_state=random_state), hidden)
    assert (
        n < 50 or not 0.2 < fraction < 0.8 or (hidden != hold_out(spots, fraction, random_state=random_state + 1)).any()
    )


@few
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(0.05, 0.6), seeds)
def test_hold_out_hides_whole_blocks_close_to_the_fraction(n, fraction, block, random_state):
    spots = np.r_[np.random.default_rng(random_state).uniform(size=(n - 1, 2)) * [0.5, 1], [[1.0, 0.0]]]
    hidden = hold_out(spots, fraction, block=block, random_state=random_state)
    cell = np.floor((spots - spots.min(axis=0)) / block)
    _, member, size = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    share = np.bincount(member.ravel(), weights=hidden) / size
    assert set(share) == {0.0, 1.0}  # blocks are whole, some hidden and some left
    missed, largest = abs(hidden.sum() - fraction * n), size.max()
    assert missed <= largest / 2 or hidden.sum() in (size[share == 1].max(), n - size[share == 0].max())
    np.testing.assert_array_equal(hold_out(spots, fraction, block=block, random_state=random_state), hidden)


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 4), (0.5, 4), (0.99, 8)])
def test_hold_out_hides_at_least_one_block_and_leaves_one(fraction, count):
    spots = np.concatenate([[10, 0] * np.ones(2) * i + square_of_sites(2) for i in range(3)])
    assert hold_out(spots, fraction, block=5, random_state=0).sum() == count


def test_held_out_blocks_keep_neighbors_from_telling():
    spots = square_of_sites(40).astype(float)
    single, blocks = hold_out(spots, 0.3, random_state=0), hold_out(spots, 0.3, block=10.0, random_state=0)
    extrapolated = [nearest(spots[hidden], spots[~hidden])[0].mean() for hidden in (single, blocks)]
    assert extrapolated[1] > 2 * extrapolated[0]
    assert (blocks != hold_out(spots, 0.3, block=10.0, random_state=1)).any()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, np.nan])
def test_hold_out_refuses_to_hide_all_or_none(fraction):
    with pytest.raises(ValueError, match="fraction should be between 0 and 1"):
        hold_out(square_of_sites(4), fraction, random_state=0)


def test_hold_out_refuses_blocks_that_cannot_split():
    with pytest.raises(ValueError, match=r"one block of side 9 holds all 16 spots, 3 wide and 3 high"):
        hold_out(square_of_sites(4), block=9, random_state=0)
    with pytest.raises(ValueError, match="block should be a finite length above 0; got 0"):
        hold_out(square_of_sites(4), block=0, random_state=0)


# --- real sections -----------------------------------------------------------------------------------------------


def read_h5ad(path):
    with h5py.File(path) as file:
        place = np.c_[file["obs/array_row"][:], file["obs/array_col"][:]]
        return file["obsm/spatial"][:].astype(float), place.astype(float)


def read_space_ranger(folder, *, filtered):
    """Positions and array places; of the spots that the matrix holds, or of all on the slide."""
    (path,) = (folder / "spatial").glob("tissue_positions*.csv")
    with path.open() as file:
        rows = [row for row in csv.reader(file) if row[1] != "in_tissue"]
    if filtered and folder.name == "visium_v1_tiny":
        with h5py.File(folder / "filtered_feature_bc_matrix.h5") as matrix:
            kept = {barcode.decode() for barcode in matrix["matrix/barcodes"][:]}
        rows = [row for row in rows if row[0] in kept]
    elif filtered:
        rows = [row for row in rows if row[1] == "1"]
    table = np.array([row[2:6] for row in rows], dtype=float)
    return table[:, [3, 2]], table[:, :2]


# the pitch of MOB is stated as the median nearest-neighbor distance, 2 % below the lattice's own
@pytest.mark.parametrize(
    ("name", "kind", "pitch", "tolerance"),
    [
        ("her2st/B4.h5ad", "square", 291, 0.01),
        ("her2st/C2.h5ad", "square", 291, 0.01),
        ("her2st/C3.h5ad", "square", 291, 0.01),
        ("mob/MOB1.h5ad", "square", 31.7, 0.025),
        ("mob/MOB2.h5ad", "square", 31.7, 0.025),
        ("dlpfc/151673.h5ad", "hexagonal", 137, 0.01),
        ("visium_v1_tiny", "hexagonal", 137.9, 0.01),
        ("visium_v1_tiny all", "hexagonal", 137.9, 0.01),
        ("visium_v2_cytassist", "hexagonal", 21.4, 0.01),
        ("visium_v2_cytassist all", "hexagonal", 21.4, 0.01),
    ],
)
def test_fit_on_real_sections(name, kind, pitch, tolerance):
    path = DATA / name.removesuffix(" all")
    if not path.exists():
        pytest.skip(f"no {path.name} in shared/data")
    spots, place = read_h5ad(path) if path.is_file() else read_space_ranger(path, filtered=not name.endswith(" all"))
    lattice = Lattice.fit(spots)
    index = lattice.index(spots)
    assert lattice.kind == kind
    assert lattice.pitch == pytest.approx(pitch, rel=tolerance)
    assert np.median(np.linalg.norm(spots - lattice.points(index), axis=1)) < 0.08 * lattice.pitch
    # the table's own rows and columns are a whole-numbered affine map of the index, for every spot
    table = np.c_[index, np.ones(len(index))]
    change, *_ = np.linalg.lstsq(table, place, rcond=None)
    np.testing.assert_allclose(table @ change, place, atol=1e-6)
    np.testing.assert_allclose(change, np.rint(change), atol=1e-6)
    # and the lattice is the one that least squares on them gives
    (origin, down, across) = np.linalg.lstsq(np.c_[np.ones(len(place)), place], spots, rcond=None)[0]
    np.testing.assert_allclose(lattice.points(index), origin + place @ [down, across], atol=1e-6 * pitch)
