"""Values per cell: tables, outlines and files of cells as the grid, in AnnData and SpatialData."""

import json
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import sthisto
from sthisto.tl._spot_means import match_spot_means

with warnings.catch_warnings():  # what its own dependencies warn of as they load
    warnings.simplefilter("ignore")
    import geopandas
    import shapely
    from spatialdata import SpatialData, read_zarr
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale, Translation

SHIFT = np.array([[11.0, -7.0], [-9.0, 4.0], [3.0, 12.0]])  # of cells from their spot, pixels


@pytest.fixture(scope="module")
def fitted(request):
    adata = sthisto.datasets.synthetic(80, n_genes=20, random_state=5)
    sthisto.pp.extract_features(adata)
    sthisto.tl.fit(adata, "ridge")
    return adata


@pytest.fixture(scope="module")
def xy(fitted):
    return np.concatenate([fitted.obsm["spatial"] + shift for shift in SHIFT])


def table(xy, **obs):
    names = pd.Index([f"cell_{n}" for n in range(len(xy))])
    return anndata.AnnData(obs=pd.DataFrame(obs, index=names), obsm={"spatial": xy})


def outlines(xy, side=6.0):
    boxes = shapely.box(*(xy - side / 2).T, *(xy + side / 2).T)
    return geopandas.GeoDataFrame({"kind": ["a", "b"] * (len(xy) // 2)}, geometry=boxes)


def qupath(path, frame, *, annotation=None):
    """Write outlines as QuPath does."""
    features = [
        {
            "type": "Feature",
            "id": f"id-{n}",
            "geometry": shapely.geometry.mapping(shape),
            "properties": {"objectType": "detection", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
        }
        for n, shape in enumerate(frame.geometry)
    ]
    if annotation is not None:
        region = {"type": "Feature", "geometry": shapely.geometry.mapping(annotation)}
        features.insert(0, region | {"properties": {"objectType": "annotation"}})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


# --- AnnData ---------------------------------------------------------------------------------------------------------


def test_a_table_of_cells_is_the_grid_of_its_points(fitted, xy):
    cells = table(xy, kind=["a", "b"] * (len(xy) // 2))
    before = cells.obs.copy()
    made = sthisto.tl.upsample(fitted, cells)
    assert_array_equal(made.X, sthisto.tl.upsample(fitted, xy).X)
    assert list(made.obs_names) == list(cells.obs_names)
    assert made.obs["kind"].tolist() == cells.obs["kind"].tolist()
    assert_array_equal(made.obs["nearest_spot"].astype(str), np.tile(fitted.obs_names, 3))
    assert cells.obs.equals(before)


def test_outlines_and_a_file_of_qupath_are_grids_too(fitted, xy, tmp_path):
    frame = outlines(xy)
    expected = sthisto.tl.upsample(fitted, xy)
    made = sthisto.tl.upsample(fitted, frame)
    assert_allclose(made.X, expected.X, rtol=1e-5, atol=1e-5)
    assert made.obs["kind"].tolist() == frame["kind"].tolist()
    path = qupath(tmp_path / "cells.geojson", frame, annotation=shapely.box(0, 0, 500, 500))
    read = sthisto.tl.upsample(fitted, path)
    assert_allclose(read.X, expected.X, rtol=1e-5, atol=1e-5)
    assert list(read.obs_names[:2]) == ["id-0", "id-1"]
    assert set(read.obs["classification"]) == {"Tumor"}


def test_cells_far_from_every_spot_are_left_out_on_request(fitted, xy):
    made = sthisto.tl.upsample(fitted, table(xy), max_distance=11.0)
    assert list(made.obs_names) == [f"cell_{n}" for n in range(len(fitted), 2 * len(fitted))]


def test_cells_of_several_sections_name_theirs():
    adata = sthisto.datasets.synthetic(40, n_genes=12, n_sections=2, random_state=6)
    sthisto.pp.extract_features(adata, library_key="library")
    sthisto.tl.fit(adata, "ridge", library_key="library")
    cells = table(adata.obsm["spatial"] + 5.0, library=adata.obs["library"].to_numpy().astype(str))
    made = sthisto.tl.upsample(adata, cells)
    assert made.obs["library"].tolist() == adata.obs["library"].tolist()
    one = adata[adata.obs["library"] == "synthetic_1"].copy()
    there = made.obs["library"] == "synthetic_1"
    assert_array_equal(made[there].obsm["spatial"], one.obsm["spatial"] + 5.0)
    assert list(made.obs_names[:1]) == ["synthetic_0_cell_0"]
    cells.obs["library"] = "elsewhere"
    with pytest.raises(ValueError, match="cells of grid= are in sections 'elsewhere'; adata has 'synthetic_0'"):
        sthisto.tl.upsample(adata, cells)
    with pytest.raises(ValueError, match="belong to one section, but adata has 2"):
        sthisto.tl.upsample(adata, table(adata.obsm["spatial"]))


# --- spot means ------------------------------------------------------------------------------------------------------


def test_cells_add_up_to_their_spot_in_proportion_to_their_areas(fitted, xy):
    area = np.random.default_rng(0).uniform(20, 200, len(xy))
    cells = table(xy, area_um2=area)
    made = sthisto.tl.upsample(fitted, cells, match_spot_means="area")
    spots = fitted.copy()
    sthisto.tl.predict(spots)
    share = area.reshape(3, -1) / area.reshape(3, -1).sum(axis=0)
    added = np.einsum("cs,csg->sg", share, made.X.reshape(3, len(fitted), -1))
    assert_allclose(added, np.maximum(spots.layers["sthisto"], 0), rtol=1e-3, atol=1e-4)
    equal = sthisto.tl.upsample(fitted, cells, match_spot_means=True)
    assert np.abs(made.X - equal.X).max() > 1e-3


def test_equal_areas_are_no_areas():
    random = np.random.default_rng(1)
    points, spots = random.uniform(0, 40, (300, 2)), random.uniform(5, 35, (9, 2))
    values, wanted = (random.uniform(size=(n, 4)).astype(np.float32) for n in (300, 9))
    options = {"pitch": 10.0, "diameter": 6.0}
    plain = match_spot_means(values, points, wanted, spots, **options)
    assert_allclose(match_spot_means(values, points, wanted, spots, weights=np.full(300, 7.0), **options), plain)


def test_area_needs_areas(fitted, xy, refuses):
    with refuses(fitted, ValueError, "needs the areas of the cells .columns: 'kind'.*'area_um2'"):
        sthisto.tl.upsample(fitted, table(xy, kind="a"), match_spot_means="area")
    with refuses(fitted, ValueError, "grid= is no table of cells"):
        sthisto.tl.upsample(fitted, 3, match_spot_means="area")
    with refuses(fitted, ValueError, "areas of cells are positive"):
        sthisto.tl.upsample(fitted, table(xy, area_um2=-1.0), match_spot_means="area")
    with refuses(fitted, ValueError, "match_spot_means='mean': expected True, False or 'area'"):
        sthisto.tl.upsample(fitted, 2, match_spot_means="mean")


def test_bad_cells_are_refused(fitted, xy, refuses, tmp_path):
    twice = table(xy)
    twice.obs_names = ["same"] * len(xy)
    with refuses(fitted, ValueError, "names of the cells of grid= are not unique: 'same'"):
        sthisto.tl.upsample(fitted, twice)
    frame = outlines(xy)
    frame.loc[3, "geometry"] = shapely.Polygon()
    with refuses(fitted, ValueError, "1 outlines of grid= are empty"):
        sthisto.tl.upsample(fitted, frame)
    with refuses(fitted, FileNotFoundError, "no.geojson"):
        sthisto.tl.upsample(fitted, tmp_path / "no.geojson")
    (tmp_path / "none.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    with refuses(fitted, ValueError, "no outlines in .*none.geojson, which has 0 objects"):
        sthisto.tl.upsample(fitted, tmp_path / "none.geojson")


# --- SpatialData -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdata(fitted):
    """The section with its cells as polygons at half of its scale."""
    spots = sthisto.datasets.synthetic(80, n_genes=20, random_state=5)
    pixels = spots.uns["spatial"]["synthetic_0"]["images"]["hires"]
    centers = spots.obsm["spatial"].copy()
    spots.uns, spots.obsm = {}, {}
    spots.obs["region"], spots.obs["id"] = "spots", np.arange(spots.n_obs)
    spots.obs["region"] = spots.obs["region"].astype("category")
    made = SpatialData(
        images={"he": Image2DModel.parse(np.moveaxis(pixels, -1, 0))},
        shapes={"spots": ShapesModel.parse(centers, geometry=0, radius=27.5)},
        tables={"table": TableModel.parse(spots, region="spots", region_key="region", instance_key="id")},
    )
    sthisto.pp.extract_features(made, pitch_um=100.0)
    sthisto.tl.fit(made, "ridge")
    return made


@pytest.fixture(scope="module")
def named(sdata, xy):
    frame = outlines(xy / 2, 3.0)
    frame.index = [f"id-{n}" for n in range(len(frame))]
    steps = {"global": Scale([2.0, 2.0], ("x", "y"))}
    sdata["nuclei"] = ShapesModel.parse(frame, transformations=steps)
    return sdata


def test_shapes_by_name_are_annotated(named, fitted, xy, tmp_path):
    made = sthisto.tl.upsample(named, "nuclei")
    assert_allclose(made["dense"].X, sthisto.tl.upsample(fitted, xy).X, rtol=1e-3, atol=1e-3)
    assert list(made.shapes) == ["nuclei"]
    assert made["dense"].obs["point"].tolist() == list(named["nuclei"].index)
    assert_allclose(made["dense"].obsm["spatial"], xy)
    made.write(tmp_path / "cells.zarr")
    again = read_zarr(tmp_path / "cells.zarr")
    assert again["nuclei"].geometry.geom_equals(named["nuclei"].geometry).all()
    assert_array_equal(again["dense"].X, made["dense"].X)
    element = sthisto.tl.upsample(named, named["nuclei"], match_spot_means="area")  # itself, too
    assert_allclose(element["dense"].obsm["spatial"], xy)


def test_outlines_that_are_no_element_are_in_the_coordinates_of_the_shapes(sdata, fitted, xy, tmp_path):
    frame = outlines(xy)
    for grid in (frame, qupath(tmp_path / "cells.geojson", frame)):
        made = sthisto.tl.upsample(sdata, grid, max_distance=12.0)
        near = sthisto.tl.upsample(fitted, xy, max_distance=12.0)
        assert 0 < near.n_obs < len(xy)
        assert_allclose(made["dense"].X, near.X, rtol=1e-3, atol=1e-3)
        assert len(made["cells"]) == near.n_obs
        assert_allclose(made["cells"].centroid.x, near.obsm["spatial"][:, 0])
        assert list(made["cells"].index) == made["dense"].obs["point"].tolist()


def test_nuclei_of_a_spatialdata_are_in_its_coordinates(tmp_path):
    adata = sthisto.datasets.synthetic(40, n_genes=12, mpp=1.0)
    pixels = adata.uns["spatial"]["synthetic_0"]["images"]["hires"]
    nuclei = sthisto.pp.find_nuclei(adata)
    spots = adata.copy()
    spots.uns, spots.obsm = {}, {}
    spots.obs["region"], spots.obs["id"] = "spots", np.arange(spots.n_obs)
    spots.obs["region"] = spots.obs["region"].astype("category")
    shapes = ShapesModel.parse(
        adata.obsm["spatial"] + 1000.0, geometry=0, radius=27.5, transformations={"hd": Identity()}
    )
    sdata = SpatialData(
        images={
            "he": Image2DModel.parse(
                np.moveaxis(pixels, -1, 0), transformations={"hd": Translation([1000.0, 1000.0], ("x", "y"))}
            )
        },
        shapes={"spots": shapes},
        tables={"table": TableModel.parse(spots, region="spots", region_key="region", instance_key="id")},
    )
    found = sthisto.pp.find_nuclei(sdata, mpp=1.0)
    assert_allclose(found.obsm["spatial"], nuclei.obsm["spatial"] + 1000.0)
    sthisto.pp.extract_features(sdata, mpp=1.0)
    sthisto.tl.fit(sdata, "ridge")
    made = sthisto.tl.upsample(sdata, found)
    assert_allclose(made["dense"].obsm["spatial"], found.obsm["spatial"])
    sthisto.pp.extract_features(adata)
    sthisto.tl.fit(adata, "ridge")
    assert_allclose(made["dense"].X, sthisto.tl.upsample(adata, nuclei).X, rtol=1e-3, atol=1e-3)
