"""The whole way as users go it: read, describe, fit, upsample, cluster, domains, pictures, and nothing between."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc

import sthisto
from sthisto import pl

with warnings.catch_warnings():  # what its own dependencies warn of as they load
    warnings.simplefilter("ignore")
    import spatialdata_plot  # noqa: F401  it gives SpatialData its .pl
    import squidpy as sq
    from spatialdata import SpatialData, read_zarr
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

FAST = {"epochs": 30, "hidden": 32, "dim": 8}
GENES = ["region_00", "fine_01"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def measured():
    adata = sthisto.datasets.synthetic(150, n_genes=30, random_state=3)
    assert "X_histo" not in adata.obsm
    return adata


def clusters(table):
    """What scanpy makes of a dense map, called as its tutorials call it."""
    sc.pp.pca(table, n_comps=10)
    sc.pp.neighbors(table)
    sc.tl.leiden(table, flavor="igraph", n_iterations=2)
    sc.tl.rank_genes_groups(table, "leiden")
    assert table.obs["leiden"].nunique() > 1
    assert table.obsm["X_pca"].shape == (table.n_obs, 10)
    names = table.uns["rank_genes_groups"]["names"]["0"]
    assert set(names) == set(table.var_names)


def follows_the_tissue(table, adata, key):
    """Whether domains tell the regions of the tissue, far better than chance."""
    found = sthisto.domains.carry(table.obs[key], table.obsm["spatial"], adata.obsm["spatial"])
    return sthisto.domains.agreement(found, adata.obs["region"]) > 0.2


def drawn(figure):
    """How many colors a figure shows."""
    figure.canvas.draw()
    return len(np.unique(np.asarray(figure.canvas.buffer_rgba()).reshape(-1, 4), axis=0))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of squidpy's use of matplotlib
@pytest.mark.filterwarnings("ignore::FutureWarning:squidpy")
def test_an_anndata_goes_the_whole_way(measured, tmp_path):
    measured.write_h5ad(tmp_path / "section.h5ad")
    adata = sc.read_h5ad(tmp_path / "section.h5ad")
    sthisto.pp.extract_features(adata)
    sthisto.tl.fit(adata)
    dense = sthisto.tl.upsample(adata, 2)
    assert dense.n_obs > 3 * adata.n_obs
    clusters(dense)
    sthisto.tl.spatial_domains(dense, "stagate", 4, params=FAST)
    assert follows_the_tissue(dense, adata, "spatial_domain")
    for figure in (
        pl.genes(adata, GENES, dense=dense, return_fig=True),
        pl.domains(dense, ["spatial_domain", "leiden"], return_fig=True),
        pl.features(adata, return_fig=True),
        pl.uncertainty(dense, GENES, return_fig=True),
    ):
        assert drawn(figure) > 20
    sq.pl.spatial_scatter(dense, shape="square", color=["spatial_domain", GENES[0]])
    assert drawn(plt.gcf()) > 20
    sc.pl.embedding(dense, "spatial", color="leiden", show=False)
    dense.write_h5ad(tmp_path / "dense.h5ad")
    again = sc.read_h5ad(tmp_path / "dense.h5ad")
    assert again.obs["spatial_domain"].tolist() == dense.obs["spatial_domain"].tolist()


def as_spatialdata(adata):
    """The section with an image of half its resolution, as readers lay it out."""
    picture = adata.uns["spatial"]["synthetic_0"]["images"]["hires"][::2, ::2]
    spots = ShapesModel.parse(adata.obsm["spatial"], geometry=0, radius=10.0)
    half = {"global": Scale([2.0, 2.0], ("x", "y"))}
    table = adata.copy()
    table.uns = {}
    table.obs["part"] = "spots"
    table.obs["part"] = table.obs["part"].astype("category")
    table.obs["spot"] = np.arange(adata.n_obs)
    return SpatialData(
        images={"he": Image2DModel.parse(np.moveaxis(picture, -1, 0), transformations=half)},
        shapes={"spots": spots},
        tables={"table": TableModel.parse(table, region="spots", region_key="part", instance_key="spot")},
    )


@pytest.mark.filterwarnings("ignore")  # of the libraries that write and draw; what comes of it is looked at
def test_a_spatialdata_goes_the_whole_way(measured, tmp_path):
    as_spatialdata(measured).write(tmp_path / "section.zarr")
    sdata = read_zarr(tmp_path / "section.zarr")
    sthisto.pp.extract_features(sdata)
    sthisto.tl.fit(sdata)
    dense = sthisto.tl.upsample(sdata, 2)
    sthisto.tl.rasterize(dense, GENES)
    table = dense["dense"]
    assert table.n_obs > 3 * measured.n_obs
    clusters(table)
    sthisto.tl.spatial_domains(dense, "stagate", 4, params=FAST)
    assert follows_the_tissue(table, measured, "spatial_domain")
    dense.write(tmp_path / "dense.zarr")
    again = read_zarr(tmp_path / "dense.zarr")
    assert again["dense"].obs["spatial_domain"].tolist() == table.obs["spatial_domain"].tolist()
    figure, axes = plt.subplots(1, 3)
    dense.pl.render_images("he").pl.show(ax=axes[0])
    dense.pl.render_shapes("spots_dense", color="spatial_domain").pl.show(ax=axes[1])
    dense.pl.render_images("spots_genes", channel=GENES[0]).pl.show(ax=axes[2])
    assert drawn(figure) > 20
    for figure in (pl.genes(sdata, GENES, dense=dense, return_fig=True), pl.domains(dense, return_fig=True)):
        assert drawn(figure) > 20
