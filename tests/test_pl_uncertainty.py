"""Maps of image features and of standard deviations, read back from their artists."""

import matplotlib as mpl

mpl.use("Agg")

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.decomposition import PCA

from sthisto import pl
from sthisto.datasets import synthetic
from sthisto.pl._features import component_colors

EXTRAPOLATED = "extrapolated"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def adata():
    adata = synthetic(100, n_genes=10, n_sections=2)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(200, 3)) * [5, 3, 1.5]
    adata.obsm["X_histo"] = (hidden @ rng.normal(size=(3, 12)) + rng.normal(0, 0.1, (200, 12)) + 7).astype(np.float32)
    return adata


def section(adata, number):
    return adata[adata.obs["library"] == f"synthetic_{number}"]


def ranks(values):
    return values.argsort(axis=0).argsort(axis=0)


def test_features_are_their_first_components_as_colors(adata):
    axes = pl.features(adata, library_key="library", show=False)
    assert len(axes) == 4  # the picture and the colors of both sections
    for number, (picture, panel) in enumerate([axes[:2], axes[2:]]):
        one = section(adata, number)
        [cells] = panel.collections
        assert_allclose(cells.get_offsets(), one.obsm["spatial"], atol=1e-6)
        z = one.obsm["X_histo"].astype(float)
        pca = PCA(3).fit((z - z.mean(0)) / z.std(0))
        scores = pca.transform((z - z.mean(0)) / z.std(0))
        shown = cells.get_facecolors()[:, :3]
        for channel in range(3):
            up, down = ranks(scores[:, channel]), ranks(-scores[:, channel])
            order = ranks(shown[:, channel])
            assert (order == up).all() or (order == down).all()
        share = ", ".join(f"{part:.0%}" for part in pca.explained_variance_ratio_)
        assert panel.get_xlabel() == f"red, green, blue: {share} of variance"
        assert picture.images
        assert picture.get_title("left") == f"X_histo, synthetic_{number}"


def test_the_middle_color_is_the_median_and_outliers_do_not_move_it():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, 8)).astype(np.float32)
    values[:20] += 200  # a fold of the tissue
    rgb, share = component_colors(values, "here")
    assert_allclose(np.median(rgb, axis=0), 0.5)
    assert (np.ptp(np.percentile(rgb, [25, 75], axis=0), axis=0) > 0.2).all()  # the others are told apart
    assert (rgb.min() >= 0) & (rgb.max() <= 1)
    assert 0.9 < share[0] < 1
    again, _ = component_colors(values[:, ::-1], "here")
    assert_allclose(np.abs(again - 0.5), np.abs(rgb - 0.5), atol=1e-6)


def test_features_that_most_spots_share_have_colors_all_the_same():
    values = np.zeros((30, 5), np.float32)
    values[:5] = np.random.default_rng(0).normal(size=(5, 5))
    rgb, _ = component_colors(values, "here")
    assert np.isfinite(rgb).all()
    assert len(np.unique(rgb[5:], axis=0)) == 1
    assert len(np.unique(rgb, axis=0)) == 6


def test_features_that_cannot_be_drawn_are_refused(adata):
    one = section(adata, 0).copy()
    with pytest.raises(KeyError, match=r"no image features 'X_uni' in adata\.obsm \(found: "):
        pl.features(one, "X_uni", library_key="library")
    one.obsm["flat"] = np.tile(np.arange(100.0)[:, None], (1, 6))
    with pytest.raises(
        ValueError, match=r"obsm\['flat'\] of shape \(100, 6\) has fewer than three principal components"
    ):
        pl.features(one, "flat", library_key="library")
    one.obsm["none"] = np.ones((100, 6))
    with pytest.raises(ValueError, match="fewer than three principal components"):
        pl.features(one, "none", library_key="library")
    one.obsm["holes"] = np.full((100, 6), np.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pl.features(one, "holes", library_key="library")


def test_features_without_their_picture_and_in_given_axes(adata):
    one = section(adata, 0).copy()
    [panel] = pl.features(one, library_key="library", image=False, show=False)
    assert len(panel.collections[0].get_facecolors()) == 100
    figure, axes = plt.subplots(1, 2)
    assert pl.features(one, library_key="library", ax=axes, return_fig=True) is figure
    with pytest.raises(ValueError, match="ax holds 1 axes; this figure has 2 panels"):
        pl.features(one, library_key="library", ax=axes[0])


def dense_of(adata):
    """Points of one section as upsample gives them: the mean in X, its spread in a layer."""
    one = section(adata, 0)
    x = one.X.toarray()
    dense = ad.AnnData(x, var=one.var, obsm={"spatial": one.obsm["spatial"]}, layers={"std": 0.3 + x / 5})
    dense.obs["nearest_spot"] = one.obs_names.to_numpy()
    return dense


def test_uncertainty_is_drawn_in_the_units_of_the_expression(adata):
    dense = dense_of(adata)
    figure = pl.uncertainty(dense, ["region_00", "fine_01"], return_fig=True)
    panels, bars = figure.axes[:2], figure.axes[2:]
    for gene, ax in zip(["region_00", "fine_01"], panels, strict=True):
        [cells] = ax.collections
        values = dense[:, gene].layers["std"].ravel()
        assert_array_equal(cells.get_array(), values)
        assert_allclose([cells.norm.vmin, cells.norm.vmax], np.percentile(values, [1, 99]), rtol=1e-6)
        assert len(cells.get_paths()[0].vertices) == 7  # without gaps, though the width of a point is not known
        assert ax.get_title("left") == gene
    assert [ax.get_ylabel() for ax in bars] == ["std of expression"] * 2


def test_uncertainty_of_denoised_spots(adata):
    spots = section(adata, 0).copy()
    spots.layers["mine"], spots.layers["mine_std"] = spots.X.toarray(), spots.X.toarray() / 3
    [ax] = pl.uncertainty(spots, "fine_01", key="mine", library_key="library", show=False)
    assert_array_equal(ax.collections[0].get_array(), spots[:, "fine_01"].layers["mine_std"].ravel())
    [ax] = pl.uncertainty(spots, "fine_01", key="mine", library_key="library", relative=True, show=False)
    shares = ax.collections[0].get_array()
    assert_allclose(shares[spots[:, "fine_01"].X.toarray().ravel() > 1], 1 / 3, rtol=1e-5)


def test_ratios_to_nearly_zero_do_not_dominate_the_map(adata):
    dense = dense_of(adata)
    dense.X[:3, 0], dense.X[3:, 0] = 1e-9, 2.0
    dense.layers["std"][:, 0] = 0.5
    figure = pl.uncertainty(dense, dense.var_names[0], relative=True, return_fig=True)
    shares = figure.axes[0].collections[0].get_array()
    assert_allclose(shares, [0.5 / 0.1] * 3 + [0.25] * (dense.n_obs - 3), rtol=1e-6)
    assert figure.axes[1].get_ylabel() == "std / expression"
    dense.X[:, 0] = 0
    pl.uncertainty(dense, dense.var_names[0], relative=True, show=False)


def test_points_outside_the_training_domain_are_faint_and_hatched(adata):
    dense = dense_of(adata)
    dense.obs[EXTRAPOLATED] = dense.obsm["spatial"][:, 0] > np.median(dense.obsm["spatial"][:, 0])
    extrapolated = dense.obs[EXTRAPOLATED].to_numpy()
    [ax] = pl.uncertainty(dense, "fine_01", show=False)
    faint, hatching, sound = ax.collections
    values = dense[:, "fine_01"].layers["std"].ravel()
    assert_array_equal(faint.get_array(), values[extrapolated])
    assert_array_equal(sound.get_array(), values[~extrapolated])
    assert faint.norm is sound.norm
    assert hatching.get_hatch()
    assert_allclose(hatching.get_offsets(), dense.obsm["spatial"][extrapolated], atol=1e-6)
    assert "hatched: outside the training domain" in ax.get_xlabel()
    assert sound.get_agg_filter() is None
    pixels = np.ones((2, 2, 4)) * to_rgba("red")
    assert faint.get_agg_filter()(pixels, 100)[0][0, 0, 3] == 0.5
    dense.obs[EXTRAPOLATED] = False
    [ax] = pl.uncertainty(dense, "fine_01", show=False)
    assert ax.get_xlabel() == "uncertainty"


def test_uncertainty_that_is_not_there_is_refused(adata):
    dense = dense_of(adata)
    with pytest.raises(ValueError, match="no gene to draw"):
        pl.uncertainty(dense, [])
    with pytest.raises(KeyError, match=r"genes \['ACTB'\] are not in adata"):
        pl.uncertainty(dense, "ACTB")
    del dense.layers["std"]
    with pytest.raises(KeyError, match=r"expected 'std' and 'sthisto_std', found: \[\]"):
        pl.uncertainty(dense, "fine_01")
