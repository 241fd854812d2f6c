"""Plots of SpatialData are those of its tables, with the images of its elements."""

import matplotlib as mpl

mpl.use("Agg")

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import EllipseCollection, PathCollection
from numpy.testing import assert_allclose, assert_array_equal

import sthisto
from sthisto import pl

with warnings.catch_warnings():  # of its dependencies while they load
    warnings.simplefilter("ignore")
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

GENES = ["region_00", "fine_01"]
SPOT_RADIUS = 13.75


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def spatialdata_of(adata, names, library_key=None):
    """A table that annotates circles, with an image for each section."""
    table = adata.copy()
    sections = table.obs[library_key].astype(str).to_numpy() if library_key else np.full(table.n_obs, names[0])
    shapes, images = {}, {}
    for section in names:
        image = adata.uns["spatial"][section]["images"]["hires"]
        system = {section: Identity()}
        images[f"he_{section}"] = Image2DModel.parse(np.moveaxis(image, -1, 0), transformations=system)
        xy = table.obsm["spatial"][sections == section]
        shapes[section] = ShapesModel.parse(xy, geometry=0, radius=SPOT_RADIUS, transformations=system)
    ids = np.zeros(table.n_obs, int)
    for section in names:
        ids[sections == section] = np.arange((sections == section).sum())
    table.uns, table.obsm = {}, {}
    table.obs["shapes"] = sections
    table.obs["shapes"] = table.obs["shapes"].astype("category")
    table.obs["id"] = ids
    table = TableModel.parse(table, region=list(names), region_key="shapes", instance_key="id")
    return SpatialData(images=images, shapes=shapes, tables={"table": table})


@pytest.fixture(scope="module")
def fitted():
    adata = sthisto.datasets.synthetic(80, n_genes=12, random_state=3)
    sdata = spatialdata_of(adata, ["synthetic_0"])
    sthisto.pp.extract_features(sdata, mpp=2.0)
    sthisto.tl.fit(sdata, "idw")
    sthisto.tl.predict(sdata)
    return adata, sdata, sthisto.tl.upsample(sdata, 2)


def test_genes_of_a_spatialdata_and_its_dense_map(fitted):
    adata, sdata, dense = fitted
    before = set(sdata.tables["table"].uns)
    axes = pl.genes(sdata, GENES, dense=dense, show=False)
    assert len(axes) == 4
    [spots], [points] = axes[0].collections, axes[1].collections
    assert isinstance(spots, EllipseCollection)
    assert_allclose(spots.get_offsets(), adata.obsm["spatial"])
    assert_allclose(spots.get_widths(), 2 * SPOT_RADIUS)
    assert isinstance(points, PathCollection)
    assert len(points.get_offsets()) == dense.tables["dense"].n_obs
    height, width, _ = adata.uns["spatial"]["synthetic_0"]["images"]["hires"].shape
    assert_allclose(axes[0].images[0].get_extent(), [0, width, height, 0])
    assert set(sdata.tables["table"].uns) == before


def test_every_other_plot_of_a_spatialdata(fitted):
    _, sdata, dense = fitted
    view = sthisto.SpatialDataView(sdata, table_key="table", image_key="he_synthetic_0")
    image, colors = pl.features(view, show=False)
    assert image.images
    assert len(colors.collections[0].get_facecolors()) == 80
    assert len(pl.uncertainty(dense, GENES, show=False)) == 2
    assert len(pl.uncertainty(sdata, GENES, show=False)) == 2
    [panel] = pl.domains(view, "region", show=False)
    assert panel.get_title() == "region"
    with pytest.raises(ValueError, match="fitted in one step"):
        pl.history(sdata)
    with pytest.raises(TypeError, match="genes= is a SpatialData"):
        pl.genes(sdata, dense)


def test_several_regions_are_sections():
    pair = sthisto.datasets.synthetic(40, n_genes=10, n_sections=2)
    sdata = spatialdata_of(pair, ["synthetic_0", "synthetic_1"], "library")
    axes = pl.genes(sdata, "fine_01", show=False)
    assert [ax.get_title("left") for ax in axes] == ["fine_01, synthetic_0", "fine_01, synthetic_1"]
    for ax, name in zip(axes, ["synthetic_0", "synthetic_1"], strict=True):
        picture = pair.uns["spatial"][name]["images"]["hires"]
        assert_array_equal(ax.images[0].get_array(), picture)
