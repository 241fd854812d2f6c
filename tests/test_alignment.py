"""Registration: transformations, the statistic, and the check on sections whose true registration is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import pp, tl
from sthisto.alignment import (
    SYMMETRIES,
    FeatureRaster,
    HeldOutRidge,
    Similarity,
    Warp,
    check,
    fit_warp,
)
from sthisto.datasets import synthetic

PITCH = 50.0  # px, of synthetic sections

similarities = st.builds(
    Similarity.of,
    st.sampled_from(list(SYMMETRIES)),
    rotation=st.floats(-44, 44),
    scale=st.floats(0.5, 2),
    shift=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    center=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
)
POINTS = np.array([[0.0, 0.0], [10.0, 0.0], [3.0, -7.0]])


# --- transformations


@given(similarities, similarities)
def test_composition_applies_the_right_one_first(second, first):
    assert_allclose((second @ first)(POINTS), second(first(POINTS)), atol=1e-6)


@given(similarities)
def test_inverse_undoes(similarity):
    assert_allclose(similarity.inverse()(similarity(POINTS)), POINTS, atol=1e-6)
    assert_allclose((similarity @ similarity.inverse()).affine, np.eye(2, 3), atol=1e-6)


@given(similarities)
def test_lengths_are_multiplied_by_the_scale(similarity):
    before, after = (np.linalg.norm(np.diff(xy, axis=0), axis=1) for xy in (POINTS, similarity(POINTS)))
    assert_allclose(after, similarity.scale * before, rtol=1e-9)


@given(st.sampled_from(list(SYMMETRIES)), st.floats(-44, 44), st.floats(0.5, 2))
def test_parts_of_a_transformation_are_those_it_was_made_of(symmetry, rotation, scale):
    made = Similarity.of(symmetry, rotation=rotation, scale=scale)
    name, angle = made.parts
    assert (name, round(made.scale, 9)) == (symmetry, round(scale, 9))
    assert_allclose(angle, rotation, atol=1e-9)


def test_the_center_stays_where_it_is_but_for_the_shift():
    assert_allclose(Similarity.of("transposed", rotation=5, center=[3, 4], shift=[1, 2])([[3, 4]]), [[4, 6]])
    assert_array_equal(Similarity.of().affine, np.eye(2, 3))


@pytest.mark.parametrize("name", SYMMETRIES)
def test_symmetries_form_a_group(name):
    for other in SYMMETRIES.values():
        product = SYMMETRIES[name] @ other
        assert any((product == each).all() for each in SYMMETRIES.values())


# --- raster and statistic


def plane(points):
    """Features that are linear in the position."""
    return np.column_stack([points, points @ [1, 2]]).astype(np.float32)


@settings(max_examples=20)
@given(st.floats(0, 200), st.floats(0, 100))
def test_a_linear_feature_is_interpolated_exactly(x, y):
    raster = FeatureRaster.of(plane, (200.0, 100.0), 7.0, extent=20.0)
    assert_allclose(raster.at(np.array([[x, y]])), plane(np.array([[x, y]])), rtol=1e-4, atol=1e-3)


def test_beyond_the_raster_is_its_border():
    raster = FeatureRaster.of(plane, (200.0, 100.0), 7.0, extent=20.0)
    far, corner = raster.at(np.array([[-1e6, -1e6], raster.origin]))
    assert_allclose(far, corner)
    assert raster.inside(np.array([[0.0, 0.0], [-1.0, 5.0], [200.0, 100.0]])).tolist() == [True, False, True]


def test_only_points_near_tissue_are_encoded():
    asked = []

    def encode(points):
        asked.append(len(points))
        return plane(points)

    raster = FeatureRaster.of(encode, (1000.0, 1000.0), 10.0, extent=20.0, tissue=np.array([[500.0, 500.0]]))
    assert sum(asked) < 100 < raster.tissue.size
    assert raster.tissue.sum() == asked[0]
    assert_allclose(raster.tissue_center(), [500, 500], atol=5)


def test_the_raster_has_about_as_many_points_as_are_allowed():
    raster = FeatureRaster.of(plane, (1000.0, 500.0), 1.0, extent=20.0, max_points=1000)
    assert 800 < raster.tissue.size < 1300


def test_held_out_errors_are_those_of_the_predictions():
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    x = rng.normal(size=(3, 144, 5)).astype(np.float32)
    y = x[0] @ rng.normal(size=(5, 2)) + rng.normal(size=(144, 2))
    ridge = HeldOutRidge.of(xy, y.astype(np.float32))
    expected = ((ridge.predict(x) - ridge.factors) ** 2).sum(axis=1)
    assert_allclose(ridge.errors(x), expected, rtol=1e-4)
    assert_allclose(ridge.errors(x, np.stack([ridge.factors] * 3)), expected, rtol=1e-4)  # own factors for each
    assert_allclose(ridge.errors(x, np.hstack([ridge.factors] * 2)), np.hstack([expected] * 2), rtol=1e-4)
    assert ridge.errors(x)[0].sum() < 0.6 * (ridge.factors**2).sum() < ridge.errors(x)[1].sum()


def test_predictions_do_not_see_their_block():
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    x, y = rng.normal(size=(1, 144, 5)).astype(np.float32), rng.normal(size=(144, 2)).astype(np.float32)
    ridge = HeldOutRidge.of(xy, y)
    held = ridge.fold == 2
    changed = ridge.factors.copy()
    changed[held] += 10
    assert_allclose(HeldOutRidge(changed, ridge.fold).predict(x)[0, held], ridge.predict(x)[0, held], atol=1e-5)


def test_one_block_is_refused():
    with pytest.raises(ValueError, match="one block of 4 pitches holds all 9 spots"):
        HeldOutRidge.of(np.zeros((9, 2)) + np.arange(9)[:, None] * 0.01, np.ones((9, 1), np.float32), block=4.0)


# --- the check


@pytest.fixture(scope="module")
def tissue():
    """Raster of a synthetic image, true positions and expression."""
    adata = synthetic(260, n_genes=60, random_state=3)
    image = next(iter(adata.uns["spatial"].values()))["images"]["hires"]
    blurred = _pyramid(image)
    size = (float(image.shape[1]), float(image.shape[0]))
    raster = FeatureRaster.of(blurred, size, PITCH / 3, extent=100.0)
    return raster, adata.obsm["spatial"], adata.X.toarray()


def _pyramid(image):
    """Encoder by colors around points: cheap, and blurred over a pitch."""
    from scipy.ndimage import gaussian_filter  # noqa: PLC0415

    maps = np.concatenate([gaussian_filter(image.astype(np.float32), (s, s, 0)) for s in (6, 12, 24)], axis=2)

    def encode(points):
        x, y = np.clip(points.round().astype(int), 0, np.array(image.shape[1::-1]) - 1).T
        return maps[y, x]

    return encode


def rms(a, b):
    return np.sqrt(((a - b) ** 2).sum(axis=1).mean()) / PITCH


def test_a_section_as_it_is_is_aligned(tissue):
    raster, xy, expression = tissue
    result = check(raster, xy, expression, pitch=PITCH)
    assert result.verdict == "aligned", result.evidence
    assert result.displacement < 0.35
    assert result.statistic > max(value for name, value in result.symmetries.items() if name != "identity")
    assert result.profile.shape == (13, 13)
    assert_allclose(result.profile[6, 6], result.statistic, atol=1e-5)
    assert abs(result.shifts[np.array(np.unravel_index(result.profile.argmax(), (13, 13)))]).max() <= 0.5


@pytest.mark.parametrize(
    "made",
    [
        {"symmetry": "transposed"},
        {"rotation": 12.0},
        {"shift": (2 * PITCH, -PITCH)},
        {"symmetry": "quarter turn", "rotation": -8.0, "scale": 1.06, "shift": (-PITCH, -2 * PITCH)},
    ],
)
def test_corruptions_are_found_and_undone(tissue, made):
    raster, xy, expression = tissue
    moved = Similarity.of(**made, center=xy.mean(axis=0))(xy)
    result = check(raster, moved, expression, pitch=PITCH)
    assert result.verdict == "misaligned", result.evidence
    assert "corrected for the search" in result.evidence
    assert rms(result.transformation(moved), xy) < 0.35


def test_spots_outside_the_image_are_a_case(tissue):
    raster, xy, expression = tissue
    moved = Similarity.of("half turn", shift=[5000, 0])(xy)  # all of them
    result = check(raster, moved, expression, pitch=PITCH)
    assert result.inside == 0
    assert result.verdict != "aligned"
    assert result.statistic < 0.05


def test_permuted_expression_is_not_aligned(tissue):
    raster, xy, expression = tissue
    for seed in range(3):
        permuted = expression[np.random.default_rng(seed).permutation(len(xy))]
        assert check(raster, xy, permuted, pitch=PITCH, random_state=seed).verdict != "aligned"


def test_a_blank_image_is_undecidable(tissue):
    _, xy, expression = tissue
    blank = FeatureRaster.of(lambda p: np.ones((len(p), 3), np.float32), (900.0, 900.0), 20.0, extent=100.0)
    result = check(blank, xy, expression, pitch=PITCH)
    assert result.verdict == "undecidable"
    assert result.displacement < 1e-9


def test_few_spots_are_undecidable(tissue):
    raster, xy, expression = tissue
    result = check(raster, xy[:30], expression[:30], pitch=PITCH)
    assert result.verdict == "undecidable"
    assert result.evidence.startswith("only 30 spots")


# --- deformation


def test_a_warp_moves_by_averages_of_its_control_points():
    warp = Warp(np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]), 30.0, 0.0, 0.0)
    assert_allclose(warp(POINTS) - POINTS, np.tile([1, 0], (3, 1)))


def test_a_deformation_is_found_where_there_is_one(tissue):
    raster, xy, expression = tissue
    center, height = xy.mean(axis=0), np.ptp(xy[:, 1])
    bent = xy + np.column_stack([2.0 * PITCH * ((xy[:, 1] - center[1]) / (height / 2)) ** 2, np.zeros(len(xy))])
    warp = fit_warp(raster, bent, expression, pitch=PITCH)
    assert warp is not None
    assert rms(warp(bent), xy) < rms(bent, xy)
    assert fit_warp(raster, xy, expression[::-1].copy(), pitch=PITCH) is None


# --- verbs


@pytest.fixture
def flipped():
    adata = synthetic(220, random_state=1)
    adata.obsm["truth"] = adata.obsm["spatial"].copy()
    adata.obsm["spatial"] = adata.obsm["spatial"].max(axis=0) - adata.obsm["spatial"]
    return adata


def test_align_writes_and_makes_features_and_fits_stale(flipped):
    pp.extract_features(flipped)
    tl.fit(flipped, "idw")
    given = flipped.obsm["spatial"].copy()
    pp.align(flipped)
    assert rms(flipped.obsm["spatial"], flipped.obsm["truth"]) < 0.25
    assert_array_equal(flipped.obsm["spatial_before_align"], given)
    record = flipped.uns["sthisto"]["alignment"]["spatial"]
    assert record["verdict"].tolist() == ["misaligned"]
    assert record["best_statistic"] > record["statistic"]
    matrix = record["matrix"][0]
    assert_allclose(flipped.obsm["spatial"], given @ matrix[:, :2].T + matrix[:, 2])
    with pytest.raises(ValueError, match="moved"):
        tl.predict(flipped)
    with pytest.raises(ValueError, match=r"extracted before .* moved the spots"):
        tl.fit(flipped, "ridge")
    pp.extract_features(flipped)
    tl.fit(flipped, "ridge")


def test_undecidable_is_refused_unless_forced(flipped):
    blank = np.full((900, 900, 3), 240, np.uint8)
    before = flipped.copy()
    report = pp.check_alignment(flipped, image=blank)
    assert report["verdict"].tolist() == ["undecidable"]
    with pytest.raises(ValueError, match="cannot be decided from the data"):
        pp.align(flipped, image=blank)
    assert_array_equal(flipped.obsm["spatial"], before.obsm["spatial"])
    assert list(flipped.obsm) == list(before.obsm)
    pp.align(flipped, image=blank, force=True)
    assert "spatial_before_align" in flipped.obsm
