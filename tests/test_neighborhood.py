"""Next door: scanpy and squidpy run on the maps as on measured sections."""

import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image as Pillow

from sthisto import grids, pp, tl
from sthisto.datasets import synthetic

with warnings.catch_warnings(action="ignore"):  # of docrep, when squidpy is loaded
    import squidpy as sq

pytestmark = [
    pytest.mark.filterwarnings("ignore:Calling `spatial_neighbors` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The set_bad function:PendingDeprecationWarning"),
]


@pytest.fixture(scope="module", params=["uns", "array", "path"])
def dense(request, encoder, tmp_path_factory):
    """A map of more than 9 000 points, of a section whose picture is in uns, passed as an array, or as a path."""
    section = synthetic(400, n_genes=15, random_state=8)
    options = {"pitch_um": 100.0}
    if request.param != "uns":
        picture = section.uns.pop("spatial")["synthetic_0"]["images"]["hires"]
        path = tmp_path_factory.mktemp("picture") / "section.png"
        Pillow.fromarray(picture).save(path)
        options["image"] = picture if request.param == "array" else path
    pp.extract_features(section, encoder, **options)
    tl.fit(section, "ridge")
    again = {"image": options["image"]} if request.param == "array" else {}
    made = tl.upsample(section, 5, encoder=encoder, **again)
    made.uns["origin"] = request.param
    return made


def test_clusters_and_a_gapless_map(dense):
    assert dense.n_obs > 9000
    sc.pp.pca(dense, n_comps=8)
    # Approximate neighbors, the default above 8192 rows, take numba most of a minute to compile: once is enough.
    sc.pp.neighbors(dense, **({} if dense.uns["origin"] == "uns" else {"transformer": "sklearn", "method": "gauss"}))
    sc.tl.leiden(dense, flavor="igraph", n_iterations=2, directed=False)
    assert dense.obs["leiden"].nunique() > 1
    sq.gr.spatial_neighbors(dense, n_neighs=6, coord_type="generic")
    own = dense.obsp["spatial_distances"].data
    assert np.median(own) == pytest.approx(grids.spacing(dense.obsm["spatial"]))
    ax = sq.pl.spatial_scatter(dense, shape="square", color="leiden", return_ax=True)
    [squares] = [drawn for drawn in ax.collections if len(drawn.get_paths()) == dense.n_obs]  # beside the legend's
    corners = squares.get_paths()[0].get_extents()
    [library] = dense.uns["spatial"]
    factors = dense.uns["spatial"][library]["scalefactors"]
    pitch = factors["spot_diameter_fullres"]
    assert pitch == pytest.approx(grids.spacing(dense.obsm["spatial"]))
    assert_allclose(corners.width, pitch * factors["tissue_hires_scalef"], rtol=1e-3)
    plt.close("all")


def test_two_maps_concatenate(sections, encoder, tmp_path):
    maps = {}
    for name in ("synthetic_0", "synthetic_1"):
        part = sections[sections.obs["library"] == name].copy()
        part.uns["spatial"] = {name: part.uns["spatial"][name]}
        tl.fit(part, "idw")
        maps[name] = tl.upsample(part, 2)
    both = ad.concat(maps, label="section", index_unique="-", uns_merge="unique", merge="same")
    assert both.n_obs == sum(part.n_obs for part in maps.values())
    assert both.obs_names.is_unique
    assert set(both.uns["spatial"]) == set(maps)
    assert {"array_row", "array_col", "measured", "nearest_spot", "distance_um"} <= set(both.obs)
    assert_array_equal(both.layers["std"][: maps["synthetic_0"].n_obs], maps["synthetic_0"].layers["std"])
    assert "kind" in both.var
    both.write_h5ad(tmp_path / "both.h5ad")
    assert ad.read_h5ad(tmp_path / "both.h5ad").shape == both.shape


def test_sections_of_one_fit_are_drawn_side_by_side(sections, encoder):
    tl.fit(sections, "ridge", library_key="library")
    dense = tl.upsample(sections, 2, encoder=encoder)
    gene = dense.var_names[0]
    axes = sq.pl.spatial_scatter(dense, shape="square", color=gene, library_key="library", return_ax=True)
    for name, ax in zip(("synthetic_0", "synthetic_1"), axes, strict=True):
        values = dense[dense.obs["library"] == name, gene].X.ravel()
        assert_allclose(np.sort(ax.collections[0].get_array()), np.sort(values))
    plt.close("all")


def test_scanpy_draws_the_map(section, encoder):
    tl.fit(section, "ridge")
    dense = tl.upsample(section, 2, encoder=encoder)
    sc.pp.pca(dense, n_comps=5)
    sc.pp.neighbors(dense, transformer="sklearn", method="gauss")
    sc.tl.leiden(dense, flavor="igraph", n_iterations=2, directed=False)
    sc.tl.rank_genes_groups(dense, "leiden", method="wilcoxon")
    assert set(dense.obsp) == {"distances", "connectivities"}
