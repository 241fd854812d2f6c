"""Laws of the synthetic sections: what is promised of the array, the picture, the counts and the truth."""

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import uniform_filter
from scipy.spatial import KDTree
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_predict

from sthisto.datasets import synthetic, synthetic_truth
from sthisto.datasets._synthetic import GLAND, KINDS, LAYER_EDGES, _Tissue


@pytest.fixture(scope="module")
def adata():
    return synthetic()


@pytest.fixture(scope="module")
def pair():
    return synthetic(150, n_sections=2, random_state=3)


def picture(adata, library="synthetic_0"):
    return adata.uns["spatial"][library]["images"]["hires"]


def test_what_is_in_the_object(adata):
    assert adata.shape == (200, 60)
    assert adata.X.format == adata.layers["counts"].format == "csr"
    assert adata.X.dtype == np.float32
    assert adata.obsm["spatial"].dtype == np.float64
    assert picture(adata).dtype == np.uint8
    assert list(adata.obs) == ["array_row", "array_col", "region", "library"]
    assert adata.obs["library"].cat.categories.tolist() == ["synthetic_0"]
    assert adata.obs_names.is_unique
    assert adata.var["kind"].value_counts().tolist() == [12] * 5
    assert "highly_variable" not in adata.var
    scales = adata.uns["spatial"]["synthetic_0"]["scalefactors"]
    assert scales["tissue_hires_scalef"] == 1
    assert scales["microns_per_pixel"] == 2
    assert_allclose(scales["spot_diameter_fullres"], 27.5)  # 55 µm


@given(
    n=st.integers(7, 80),
    array=st.sampled_from(["hexagonal", "square"]),
    pitch_um=st.floats(20, 300),
    px_a_pitch=st.floats(8, 25),
    rotation=st.floats(-180, 180),
    random_state=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_spots_form_the_array_that_was_asked_for(n, array, pitch_um, px_a_pitch, rotation, random_state):
    mpp = pitch_um / px_a_pitch
    adata = synthetic(
        n, n_genes=10, array=array, pitch_um=pitch_um, mpp=mpp, rotation=rotation, random_state=random_state
    )
    number = adata.obs[["array_row", "array_col"]].to_numpy()
    turn = np.exp(1j * np.deg2rad(rotation))
    if array == "hexagonal":
        assert ((number.sum(1) % 2) == 0).all()
        step = number @ [1j * np.sqrt(0.75), 0.5] * turn
    else:
        step = number @ [1j, 1] * turn
    xy = adata.obsm["spatial"]
    expected = np.stack([step.real, step.imag], axis=1) * px_a_pitch
    assert len(adata) == n
    assert_allclose(xy - xy.mean(0), expected - expected.mean(0), atol=1e-6)
    height, width, _ = picture(adata).shape
    assert (xy > 0).all()
    assert (xy < [width, height]).all()


def test_neighbors_are_one_pitch_apart(adata):
    distance, _ = KDTree(adata.obsm["spatial"]).query(adata.obsm["spatial"], k=2)
    assert_allclose(np.median(distance[:, 1]), 100 / 2.0)


def test_spots_lie_on_tissue_and_tissue_on_white():
    adata = synthetic(400, random_state=1)
    image = uniform_filter(picture(adata).astype(float), (3, 3, 0))
    column, row = np.floor(adata.obsm["spatial"]).astype(int).T
    green = image[..., 1]  # eosin and haematoxylin both absorb green
    assert green[row, column].max() < 225
    border = np.concatenate([green[:5].ravel(), green[-5:].ravel(), green[:, :5].ravel(), green[:, -5:].ravel()])
    assert border.min() > 225
    hollow = (green > 235).mean()
    assert 0.15 < hollow < 0.6


def test_maps_of_the_picture_are_the_maps_at_its_pixel_centres(adata):
    tissue = _Tissue(**adata.uns["synthetic"]["tissue"]["synthetic_0"])
    height, width, _ = picture(adata).shape
    row, col = np.random.default_rng(0).integers(0, (height, width), (50, 2)).T
    at_points = tissue.maps(np.stack([col + 0.5, row + 0.5], axis=1))[:3]
    assert_allclose(tissue.picture_maps(height, width)[:, row, col], at_points, atol=1e-4)


def test_x_is_log1p_of_counts_per_ten_thousand(adata):
    counts = adata.layers["counts"].toarray()
    assert_array_equal(counts, np.round(counts))
    assert (counts >= 0).all()
    assert_allclose(adata.X.toarray(), np.log1p(1e4 * counts / counts.sum(1, keepdims=True)), rtol=1e-5)


def test_depth_is_the_mean_of_the_counts():
    for depth in (50.0, 4000.0):
        total = synthetic(600, mpp=8, depth=depth, random_state=2).layers["counts"].sum(axis=1)
        assert_allclose(total.mean(), depth, rtol=0.1)


def test_a_spot_without_counts_is_zero_not_nan():
    adata = synthetic(50, mpp=8, depth=0.5)
    empty = np.asarray(adata.layers["counts"].sum(axis=1)).ravel() == 0
    assert empty.any()
    assert_array_equal(adata.X.toarray()[empty], 0)


def test_counts_scatter_about_the_truth():
    adata = synthetic(1500, mpp=8, depth=20_000, random_state=4)
    truth = np.expm1(synthetic_truth(adata).astype(float)) / 1e4
    counts = adata.layers["counts"].toarray()
    assert_allclose(truth.sum(1), 1, rtol=1e-5)
    expected = counts.sum(1, keepdims=True) * truth
    ratio = counts / expected
    assert_allclose(ratio.mean(0), 1, atol=5 * ratio.std(0).max() / np.sqrt(len(ratio)))
    negative_binomial = (0.1 + 1 / expected).mean(0)  # variance of the ratio at a dispersion of 0.1
    assert_allclose(ratio.var(0), negative_binomial, rtol=0.35)


def test_truth_at_the_spots_is_the_truth_at_their_positions(adata, pair):
    assert_array_equal(synthetic_truth(adata), synthetic_truth(adata, adata.obsm["spatial"]))
    second = (pair.obs["library"] == "synthetic_1").to_numpy()
    own = synthetic_truth(pair)[second]
    assert_array_equal(own, synthetic_truth(pair, library="synthetic_1"))
    assert_array_equal(own, synthetic_truth(pair, pair.obsm["spatial"][second], "synthetic_1"))
    assert not np.allclose(own, synthetic_truth(pair, pair.obsm["spatial"][second], "synthetic_0"), atol=0.1)


@given(random_state=st.integers(0, 100), angle=st.floats(0, 6.3))
@settings(max_examples=20, deadline=None)
def test_truth_is_continuous_and_point_by_point(adata, random_state, angle):
    xy = np.random.default_rng(random_state).uniform(0, 900, (30, 2))
    truth = synthetic_truth(adata, xy)
    near = synthetic_truth(adata, (xy + 0.01 * np.array([np.cos(angle), np.sin(angle)]))[::-1])[::-1]
    assert_allclose(near, truth, atol=0.02)
    assert_allclose(synthetic_truth(adata, xy[:1]), truth[:1], rtol=1e-6)


def test_truth_of_some_spots_and_genes(adata):
    part = adata[20:40, [5, 3, 30]].copy()
    assert_array_equal(synthetic_truth(part), synthetic_truth(adata)[20:40][:, [5, 3, 30]])


def test_noise_genes_follow_nothing_and_the_others_something(adata):
    spread = np.ptp(synthetic_truth(adata), axis=0)
    noise = (adata.var["kind"] == "noise").to_numpy()
    assert spread[noise].max() < 1e-5
    assert spread[~noise].min() > 0.3


def test_regions_have_markers_with_steep_borders(adata):
    truth = synthetic_truth(adata)[:, (adata.var["kind"] == "region").to_numpy()]
    regions = adata.obs["region"]
    mean = np.stack([truth[regions == region].mean(0) for region in regions.cat.categories])
    assert set(mean.argmax(0)) == set(range(5))
    tissue = _Tissue(**adata.uns["synthetic"]["tissue"]["synthetic_0"])
    gradient, gland = tissue.maps(adata.obsm["spatial"])[:2]
    assert_array_equal((regions == "gland").to_numpy(), gland > GLAND)
    layer = np.char.add("layer_", (1 + np.digitize(gradient, LAYER_EDGES)).astype(str))
    assert_array_equal(regions[gland < GLAND], layer[gland < GLAND])


def test_the_picture_tells_of_the_visible_genes_and_not_of_the_hidden():
    adata = synthetic(600, random_state=5)
    image = picture(adata).astype(np.float32)
    column, row = np.floor(adata.obsm["spatial"]).astype(int).T
    windows = [uniform_filter(layer, (size, size, 0)) for size in (25, 65) for layer in (image, image**2)]
    features = np.concatenate([window[row, column] for window in windows], axis=1)
    features = (features - features.mean(0)) / features.std(0)
    truth = synthetic_truth(adata)
    guess = cross_val_predict(
        Ridge(10.0), features, truth, cv=5
    )  # spots come row by row: folds are bands of the section
    r = {}
    for kind in KINDS[:-1]:
        genes = np.flatnonzero(adata.var["kind"] == kind)
        r[kind] = np.mean([np.corrcoef(guess[:, g], truth[:, g])[0, 1] for g in genes])
    assert min(r["region"], r["fine"], r["density"]) > 0.4, r
    assert r["hidden"] < 0.25, r


def test_sections_share_genes_and_differ_in_layout(pair):
    assert pair.obs["library"].value_counts().to_dict() == {"synthetic_0": 150, "synthetic_1": 150}
    first, second = (pair[pair.obs["library"] == name] for name in ("synthetic_0", "synthetic_1"))
    assert first.obsm["spatial"].max() > second.obsm["spatial"].min()
    assert picture(pair).shape != picture(pair, "synthetic_1").shape
    # where the two tissues are alike they express alike
    truth, region = synthetic_truth(pair), pair.obs["region"].to_numpy()
    genes = (pair.var["kind"] == "region").to_numpy()
    for name in ("layer_1", "layer_3", "gland"):
        one, other = (
            truth[(region == name) & (pair.obs["library"] == library).to_numpy()][:, genes].mean(0)
            for library in ("synthetic_0", "synthetic_1")
        )
        assert np.corrcoef(one, other)[0, 1] > 0.8


def test_sections_differ_in_stain():
    adata = synthetic(40, n_genes=10, n_sections=6)
    nuclei = []
    for name in adata.uns["spatial"]:
        absorbed = np.log(245 / (picture(adata, name)[..., 0] + 1.0))
        nuclei.append(np.log(np.percentile(absorbed[absorbed > 0.2], 99)))  # whatever there is of each tissue
    assert np.std(nuclei) > 0.05  # 0.02 where all are stained alike


def test_the_first_section_does_not_depend_on_the_number_of_sections(pair):
    alone = synthetic(150, random_state=3)
    first = pair[pair.obs["library"] == "synthetic_0"]
    assert_array_equal(alone.layers["counts"].toarray(), first.layers["counts"].toarray())
    assert_array_equal(alone.obs_names, first.obs_names)
    assert_array_equal(picture(alone), picture(pair))


def test_the_scale_of_the_picture_changes_nothing_else():
    fine, coarse = synthetic(60, mpp=2), synthetic(60, mpp=5)
    assert_array_equal(fine.layers["counts"].toarray(), coarse.layers["counts"].toarray())
    assert_allclose(np.divide(picture(fine).shape[:2], picture(coarse).shape[:2]), 2.5, rtol=0.01)


def test_seeds():
    state = np.random.get_state()[1].copy()  # noqa: NPY002  the global state is what must not move
    one, again, other = synthetic(40, random_state=8), synthetic(40, random_state=8), synthetic(40, random_state=9)
    assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert_array_equal(one.X.toarray(), again.X.toarray())
    assert_array_equal(picture(one), picture(again))
    assert not np.array_equal(one.X.toarray(), other.X.toarray())


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("format", ["h5ad", "zarr"])
def test_truth_survives_a_file(pair, tmp_path, format):
    path = tmp_path / f"pair.{format}"
    getattr(pair, f"write_{format}")(path)
    back = getattr(ad, f"read_{format}")(path)
    assert_array_equal(synthetic_truth(back), synthetic_truth(pair))
    assert_array_equal(picture(back), picture(pair))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_spots": 6},
        {"n_genes": 9},
        {"n_sections": 0},
        {"pitch_um": 0.0},
        {"mpp": -1.0},
        {"depth": float("nan")},
        {"array": "triangular"},
    ],
)
def test_what_cannot_be_made_is_refused(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values()).replace("triangular", "'triangular'")):
        synthetic(**wrong)


def test_truth_that_is_not_known_is_refused(adata, pair):
    with pytest.raises(KeyError, match="no 'synthetic' in"):
        synthetic_truth(ad.AnnData(np.zeros((2, 2))))
    with pytest.raises(KeyError, match="no section 'other'"):
        synthetic_truth(adata, library="other")
    with pytest.raises(ValueError, match="several sections"):
        synthetic_truth(pair, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        synthetic_truth(adata, np.zeros(3))
    renamed = adata[:, :3].copy()
    renamed.var_names = ["a", *renamed.var_names[1:]]
    with pytest.raises(KeyError, match=r"\['a'\]"):
        synthetic_truth(renamed)
