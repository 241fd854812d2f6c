"""A SpatialData gives what the same section gives as an AnnData, wherever its image lies, and takes the results up."""

import subprocess
import sys
import warnings
from collections import Counter

import dask.array
import geopandas
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

import sthisto
from sthisto import SpatialDataView as View
from sthisto import grids
from sthisto.images import open_image

with warnings.catch_warnings():  # what its own dependencies warn of as they load
    warnings.simplefilter("ignore")
    from spatialdata import SpatialData, bounding_box_query, get_element_instances, read_zarr
    from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel, TableModel
    from spatialdata.transformations import (
        Affine,
        Identity,
        Scale,
        get_transformation,
        remove_transformation,
        set_transformation,
    )

pytestmark = [
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding"),
    pytest.mark.filterwarnings("ignore:The table is annotating"),  # what is refused here, spatialdata warns of
]
PICTURE = "synthetic_0"


def picture_of(adata, library=PICTURE):
    return adata.uns["spatial"][library]["images"]["hires"]


def table_of(adata, region="spots", ids=None):
    table = adata.copy()
    table.uns, table.obsm = {}, {}
    table.obs["region"] = np.broadcast_to(region, adata.n_obs)
    table.obs["region"] = table.obs["region"].astype("category")
    table.obs["id"] = np.arange(adata.n_obs) if ids is None else ids
    regions = sorted(set(np.ravel(region)))
    return TableModel.parse(table, region=regions, region_key="region", instance_key="id")


def image_of(pixels, steps=None, levels=None):
    return Image2DModel.parse(np.moveaxis(pixels, -1, 0), scale_factors=levels, transformations=steps)


def circles(xy, steps=None):
    return ShapesModel.parse(xy, geometry=0, radius=5.0, transformations=steps)


def sdata_of(adata, *, spots=None, steps=None, **images):
    """The section as SpatialData, with its own picture as ``he`` where no other is given."""
    elements = {"shapes": {"spots": circles(adata.obsm["spatial"])}} if spots is None else spots
    pictures = images or {"he": image_of(picture_of(adata), steps)}
    return SpatialData(images=pictures, tables={"table": table_of(adata)}, **elements)


def turned(degrees, *, flip=False, shift=(0.0, 0.0), scale=1.0):
    """Affine map from image pixels to a coordinate system."""
    c, s = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    matrix = np.array([[c, -s, shift[0]], [s, c, shift[1]], [0, 0, 1]]) @ np.diag([-1 if flip else 1, 1, 1])
    return Affine(matrix, ("x", "y"), ("x", "y"))


@pytest.fixture
def extract(encoder):
    return lambda thing, **options: sthisto.pp.extract_features(thing, encoder, **{"pitch_um": 100.0, **options})


@pytest.fixture
def upsample(encoder):
    return lambda thing, *grid, **options: sthisto.tl.upsample(thing, *grid, encoder=encoder, **options)


@pytest.fixture
def sdata(section, extract):
    """The section with one image and features."""
    made = sdata_of(section)
    extract(made)
    return made


@pytest.fixture
def unchanged(refuses):
    """Give a context in which an error has to come that changes neither the table nor which elements there are."""

    def context(sdata, error, match, table="table"):
        return refuses(sdata.tables[table], error, match)

    return context


# --- the same as AnnData ---------------------------------------------------------------------------------------------


def in_circles(xy):
    return {"shapes": {"spots": circles(xy)}}


def in_squares(xy):
    frame = geopandas.GeoDataFrame(geometry=shapely.box(*(xy - 3).T, *(xy + 3).T))
    return {"shapes": {"spots": ShapesModel.parse(frame)}}


def in_points(xy):
    return {"points": {"spots": PointsModel.parse(xy)}}


@pytest.mark.parametrize("spots", [in_circles, in_squares, in_points])
def test_features_are_those_of_the_table_as_anndata(section, extract, spots):
    sdata = sdata_of(section, spots=spots(section.obsm["spatial"]))
    extract(sdata)
    table = sdata["table"]
    assert_allclose(table.obsm["X_histo"], section.obsm["X_histo"], rtol=1e-6)
    assert list(table.obsm) == ["X_histo"]
    assert "spatial" not in table.uns  # the picture is there already
    assert table.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["sdata:he"]


def test_labels_are_places_too(section, extract):
    xy = np.floor(section.obsm["spatial"]) + 0.5
    pixels = np.zeros(picture_of(section).shape[:2], np.int32)
    for number, (x, y) in enumerate(xy.astype(int)):
        pixels[y - 1 : y + 2, x - 1 : x + 2] = number + 1
    labels = Labels2DModel.parse(pixels)
    made = SpatialData(
        images={"he": image_of(picture_of(section))},
        labels={"spots": labels},
        tables={"table": table_of(section, ids=np.arange(100) + 1)},
    )
    section.obsm["spatial"] = xy
    extract(made, mpp=2.0)
    extract(section, mpp=2.0)
    assert_allclose(made["table"].obsm["X_histo"], section.obsm["X_histo"], rtol=1e-6)


def test_rows_find_their_shapes_by_index_and_not_by_order(section, extract):
    order = np.random.default_rng(0).permutation(100)
    frame = circles(section.obsm["spatial"])
    sdata = sdata_of(section, spots={"shapes": {"spots": frame.iloc[order]}})
    extract(sdata)
    assert_allclose(sdata["table"].obsm["X_histo"], section.obsm["X_histo"], rtol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_a_scaled_image_is_one_with_its_scale(section, extract, factor):
    whole = picture_of(section)
    small = ndimage.zoom(whole, (factor, factor, 1), order=1)
    own = np.array(small.shape[:2]) / whole.shape[:2]
    sdata = sdata_of(section, small=image_of(small, {"global": Scale(1 / own, ("y", "x"))}))
    extract(sdata)
    section.uns["spatial"][PICTURE] = {
        "images": {"hires": small},
        "scalefactors": {"tissue_hires_scalef": float(np.sqrt(own.prod()))},
    }
    extract(section)
    agree = np.corrcoef(sdata["table"].obsm["X_histo"][:, 0], section.obsm["X_histo"][:, 0])[0, 1]
    assert agree > 0.995
    assert_allclose(sdata["table"].uns["sthisto"]["features"]["X_histo"]["mpp"], [2.0], rtol=1e-3)


@pytest.mark.parametrize("degrees", [0, 90, 217])
@pytest.mark.parametrize("flip", [False, True])
def test_spots_are_laid_onto_an_image_that_lies_askew(section, extract, degrees, flip, upsample):
    """Sums over a patch stay when picture and positions turn together, up to what the patch's corners cut."""
    onto = turned(degrees, flip=flip, shift=(300.0, -150.0), scale=0.4)  # image to global, where the spots have to lie
    matrix = onto.to_affine_matrix(("x", "y"), ("x", "y"))
    there = section.obsm["spatial"] @ matrix[:2, :2].T + matrix[:2, 2]
    frame = circles(there / [3.0, 3.0], {"global": Scale([3.0, 3.0], ("x", "y"))})
    sdata = sdata_of(section, spots={"shapes": {"spots": frame}}, steps={"global": onto})
    extract(sdata)
    table = sdata["table"]
    assert_allclose(table.obsm["X_histo"], section.obsm["X_histo"], rtol=0.01)
    # a unit of the shapes is 3 / 0.4 pixels of the image
    assert_allclose(table.uns["sthisto"]["features"]["X_histo"]["mpp"], [2.0 * 3 / 0.4], rtol=1e-6)
    sthisto.tl.fit(sdata, "ridge")
    sthisto.tl.fit(section, "ridge")
    lattice = grids.Lattice.fit(frame.geometry.get_coordinates().to_numpy())
    made, like = upsample(sdata, lattice), upsample(section, 1)
    dense = made["dense"]
    near = grids.nearest(dense.obsm["spatial"] * 3.0, there)  # the map comes back to where the shapes are
    on = near[0][:, 0] < 0.1
    assert on.sum() == 100
    spots = grids.nearest(like.obsm["spatial"], section.obsm["spatial"])[1][:, 0]
    expected = np.full((100, 20), np.nan)
    expected[spots[like.obs["measured"]]] = like.X[like.obs["measured"]]
    agree = np.corrcoef(dense.X[on].ravel(), expected[near[1][on, 0]].ravel())[0, 1]
    assert agree > 0.995


@pytest.mark.parametrize("model", ["ridge", "idw"])
def test_the_whole_way_is_that_of_anndata(section, sdata, model, upsample):
    genes = list(section.var_names[:12])
    for thing in (sdata, section):
        sthisto.tl.fit(thing, model, genes=genes)
        sthisto.tl.predict(thing)
    table = sdata["table"]
    assert_allclose(table.layers["sthisto"], section.layers["sthisto"], rtol=1e-5, atol=1e-6)
    assert table.var["sthisto_modelled"].sum() == 12
    reports = [
        sthisto.tl.evaluate(thing, model, counts_layer="counts", n_repeats=1, split="random")
        for thing in (sdata, section)
    ]
    scores = [report.query("metric == 'pearson'")["value"] for report in reports]
    assert_allclose(*scores, rtol=1e-4, atol=1e-5)
    made, dense = (upsample(thing, 2) for thing in (sdata, section))
    assert_allclose(made["dense"].X, dense.X, rtol=1e-5, atol=1e-5)
    assert_allclose(made["dense"].layers["std"], dense.layers["std"], rtol=1e-5, atol=1e-5)
    assert_allclose(made["dense"].obsm["spatial"], dense.obsm["spatial"])


def test_a_section_that_was_only_stained(sdata, section):
    sthisto.tl.fit(sdata, "ridge")
    there = sthisto.tl.predict(section, reference=sdata)
    made = sthisto.tl.predict(View(sdata, table_key="table"), reference=sdata)
    assert_allclose(made.X, there.X, rtol=1e-5, atol=1e-6)
    sdata["predicted"] = made  # it annotates the same shapes
    assert_array_equal(get_element_instances(sdata["spots"]), sdata["predicted"].obs["id"])
    assert_allclose(made.obsm["spatial"], section.obsm["spatial"])


def test_several_regions_are_sections_with_an_image_each(sections, encoder, upsample):
    names = sections.obs["library"].astype(str).to_numpy()
    xy = sections.obsm["spatial"]
    table = table_of(sections, region=names)
    made = SpatialData(
        images={f"{n}_he": image_of(picture_of(sections, n), {n: Identity()}) for n in np.unique(names)},
        shapes={
            n: ShapesModel.parse(
                xy[names == n], geometry=0, radius=5, index=np.flatnonzero(names == n), transformations={n: Identity()}
            )
            for n in np.unique(names)
        },
        tables={"table": table},
    )
    sthisto.pp.extract_features(made, encoder, pitch_um=100.0)
    assert_allclose(made["table"].obsm["X_histo"], sections.obsm["X_histo"], rtol=1e-6)
    for thing, key in ((made, None), (sections, "library")):
        sthisto.tl.fit(thing, "ridge", library_key=key)
    dense, like = upsample(made, 2), upsample(sections, 2)
    assert_allclose(dense["dense"].X, like.X, rtol=1e-5, atol=1e-5)
    assert sorted(dense.shapes) == ["synthetic_0_dense", "synthetic_1_dense"]
    assert sorted(dense.images) == ["synthetic_0_he", "synthetic_1_he"]
    both = {n: f"{n}_he" for n in np.unique(names)}
    sthisto.pp.extract_features(View(made, image_key=both), encoder, key_added="X_again")
    assert_array_equal(made["table"].obsm["X_again"], made["table"].obsm["X_histo"])
    with pytest.raises(ValueError, match=r"library_key='kind': the table annotates 2 elements .*each a section of its"):
        sthisto.pp.extract_features(made, encoder, library_key="kind")


def test_the_image_of_the_features_is_taken_again(section, extract, upsample):
    """Among several images none has to be named twice."""
    other = np.full((60, 60, 3), 200, np.uint8)
    sdata = sdata_of(section, he=image_of(picture_of(section)), other=image_of(other))
    extract(View(sdata, image_key="he"))
    sthisto.tl.fit(sdata, "ridge")
    sthisto.tl.fit(section, "ridge")
    made = upsample(sdata, 2)
    assert_allclose(made["dense"].X, upsample(section, 2).X, rtol=1e-5, atol=1e-5)
    assert list(made.images) == ["he"]


def test_models_that_read_pixels_read_them_from_the_image_of_the_fit(section):
    askew = turned(30, shift=(70.0, 10.0))
    matrix = askew.to_affine_matrix(("x", "y"), ("x", "y"))
    there = section.obsm["spatial"] @ matrix[:2, :2].T + matrix[:2, 2]
    white = np.random.default_rng(0).integers(100, 255, (700, 900, 3), dtype=np.uint8)  # any other picture
    pictures = {"he": image_of(picture_of(section), {"global": askew}), "white": image_of(white, {"global": askew})}
    sdata = sdata_of(section, spots={"shapes": {"spots": circles(there)}}, **pictures)
    small = {
        "epochs": 5,
        "learning_rate": 1e-3,
        "input_size": 16,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "head_width": 8,
        "mlp": 32,
    }
    options = {"params": small, "genes": ["region_00", "fine_01"]}
    with pytest.raises(KeyError, match=r"2 images share a coordinate system with .* where one is wanted"):
        sthisto.tl.fit(sdata, "histogene", **options)
    found = {}
    for image in ("he", "white"):
        sthisto.tl.fit(View(sdata, image_key=image), "histogene", **options)
        sthisto.tl.predict(View(sdata, image_key=image))
        found[image] = sdata["table"].to_df("sthisto")[options["genes"]]
    sthisto.tl.fit(section, "histogene", **options)
    sthisto.tl.predict(section)
    expected = section.to_df("sthisto")[options["genes"]]
    apart = np.abs(found["white"] - expected).max().max()
    assert apart > 0.1
    assert np.abs(found["he"] - expected).max().max() < 0.2 * apart


def test_features_from_elsewhere_need_no_image(section, upsample):
    """LazySlide, TRIDENT or a CSV: a matrix in ``obsm`` under any key."""
    made = SpatialData(shapes={"tiles": circles(section.obsm["spatial"])}, tables={"t": table_of(section, "tiles")})
    made["t"].obsm["X_uni"] = section.to_df().iloc[:, :5].set_axis([f"uni_{i}" for i in range(5)], axis=1)
    sthisto.tl.fit(made, "ridge", features_key="X_uni")
    sthisto.tl.predict(made)
    assert np.isfinite(made["t"].layers["sthisto"]).all()
    points = section.obsm["spatial"][:7]
    look = made["t"].obsm["X_uni"].to_numpy()[:7]
    dense = upsample(made, points, features=look)["dense"]
    assert_allclose(dense.X, made["t"].layers["sthisto"][:7], rtol=1e-5, atol=1e-5)


def test_a_picture_beside_the_object(section, extract, tmp_path, upsample):
    """A whole-slide file that was never imported: the shapes' coordinates are its pixels."""
    from PIL import Image  # noqa: PLC0415

    path = tmp_path / "he.png"
    Image.fromarray(picture_of(section)).save(path)
    made = SpatialData(shapes={"spots": circles(section.obsm["spatial"])}, tables={"table": table_of(section)})
    extract(made, image=path)
    assert_array_equal(made["table"].obsm["X_histo"], section.obsm["X_histo"])
    sthisto.tl.fit(made, "ridge")
    sthisto.tl.fit(section, "ridge")
    made = upsample(made, 2)
    assert_allclose(made["dense"].X, upsample(section, 2).X, rtol=1e-5, atol=1e-5)


def test_a_cropped_object(sdata, section, extract):
    """A query moves the crop's own origin and says so in its transformation."""
    low, high = section.obsm["spatial"].min(0) - 60, section.obsm["spatial"].max(0) + 60
    crop = bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=low, max_coordinate=high, target_coordinate_system="global"
    )
    assert crop["he"].shape != sdata["he"].shape
    extract(crop, key_added="X_crop")
    table = crop["table"]
    kept = [section.obs_names.get_loc(name) for name in table.obs_names]
    assert_allclose(table.obsm["X_crop"], section.obsm["X_histo"][kept], rtol=0.02)


# --- reading no more than is needed ----------------------------------------------------------------------------------


def counting(pixels, side, seen):
    """The picture in chunks that say when they are read."""

    def read(block, block_info=None):
        seen.append(block_info[0]["chunk-location"])
        return block

    whole = dask.array.from_array(np.moveaxis(pixels, -1, 0), chunks=(3, side, side))
    return whole.map_blocks(read, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))


def test_the_level_that_is_fine_enough_is_read_and_only_where_spots_are(section, extract):
    pixels = picture_of(section)
    fine, coarse = [], []
    whole = np.kron(pixels, np.ones((4, 4, 1), np.uint8))
    made = Image2DModel.parse(counting(whole, 256, fine), scale_factors=[4], dims=("c", "y", "x"))
    made["scale1"]["image"].data = counting(pixels, 64, coarse)
    set_transformation(made, Scale([0.25, 0.25], ("x", "y")))
    few = section[:3].copy()
    sdata = sdata_of(few, he=made)
    fine.clear(), coarse.clear()
    extract(sdata, mpp=2.0)
    assert not fine
    again = [block for block, n in Counter(coarse).items() if n > 1]  # the first reading is the overview's
    assert 0 < len(again) < len(set(coarse))
    assert_allclose(sdata["table"].obsm["X_histo"], section.obsm["X_histo"][:3], rtol=1e-6)


@pytest.mark.parametrize("levels", [[2, 2], [2, 2, 2], [3]])
def test_levels_of_an_image_of_odd_size_show_the_same_places(levels):
    """Reduced levels are stretched: 168 pixels show what 674 did, and not 672 of them."""
    y, x = np.mgrid[:619, :674] + 0.5
    centre = np.array([640.0, 590.0])
    blob = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 9**2))
    image = open_image(image_of((255 * blob).astype(np.uint8)[..., None].repeat(3, axis=2), levels=levels))
    for level, scale in enumerate(image.scales):
        height, width = image.levels[level].shape[:2]
        light = image.read(level, 0, height, 0, width)[..., 0].astype(float)
        found = np.array(ndimage.center_of_mass(light))[::-1] + 0.5
        assert_allclose(found / scale, centre, atol=1.2)


def test_nothing_of_spatialdata_is_loaded_for_those_who_do_without(upsample):
    code = (
        "import sthisto, sys; a = sthisto.datasets.synthetic(60, n_genes=10);"
        "sthisto.tl.fit(a, 'idw'); sthisto.tl.upsample(a, 2); print('spatialdata' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# --- the dense map as SpatialData ------------------------------------------------------------------------------------


def hexagonal(random_state=1):
    return sthisto.datasets.synthetic(60, n_genes=10, random_state=random_state)


def square(rotation=0.0):
    return sthisto.datasets.synthetic(60, n_genes=10, array="square", rotation=rotation, random_state=1)


@pytest.mark.parametrize("make", [hexagonal, square, lambda: square(20.0)])
def test_cells_tile_the_map_and_the_table_annotates_them(make, upsample):
    section = make()
    made = sdata_of(section)
    sthisto.tl.fit(made, "idw")
    dense = upsample(made, 2)
    shapes, table = dense["spots_dense"], dense["dense"]
    assert_array_equal(get_element_instances(shapes), table.obs["point"])
    assert_allclose(shapes.centroid.get_coordinates(), table.obsm["spatial"], atol=1e-6)
    lattice = grids.Lattice.fit(section.obsm["spatial"]).refine(2)
    assert_allclose(shapes.area, abs(np.linalg.det(lattice.basis)), rtol=1e-3)
    assert shapely.union_all(shapes.buffer(1e-6)).area == pytest.approx(shapes.area.sum(), rel=1e-3)  # no overlap
    corners = {"hexagonal": 6, "square": 4}[lattice.kind]
    assert set(shapely.get_num_coordinates(shapes.geometry)) == {corners + 1}
    assert table.obs["measured"].sum() == section.n_obs


def test_dense_points_lie_where_the_measured_ones_do(section, extract, upsample):
    steps = {"global": Identity(), "slide": Scale([2.0, 2.0], ("x", "y"))}
    sdata = sdata_of(section, spots={"shapes": {"spots": circles(section.obsm["spatial"], steps)}})
    sthisto.tl.fit(sdata, "idw")
    dense = upsample(sdata, 2)
    sthisto.tl.rasterize(dense, "region_00")
    for name in ("spots_dense", "spots_genes"):
        assert set(get_transformation(dense[name], get_all=True)) == {"global", "slide"}


def test_pictures_of_genes_have_the_predicted_values_in_their_places(section, upsample):
    there = circles(section.obsm["spatial"], {"global": turned(25, shift=(9.0, 4.0), scale=1.7)})
    sdata = sdata_of(section, spots={"shapes": {"spots": there}})
    sthisto.tl.fit(sdata, "idw")
    genes = ["noise_04", "region_00"]
    made = upsample(sdata, 2)
    sthisto.tl.rasterize(made, genes)
    image, table = made["spots_genes"], made["dense"]
    assert image.coords["c"].values.tolist() == genes
    assert np.isfinite(image.data).all()
    axes = ("x", "y")
    of_image = get_transformation(image).to_affine_matrix(axes, axes)
    of_shapes = get_transformation(made["spots_dense"]).to_affine_matrix(axes, axes)
    matrix = np.linalg.inv(of_image) @ of_shapes
    at = np.floor(table.obsm["spatial"] @ matrix[:2, :2].T + matrix[:2, 2]).astype(int)
    assert_array_equal(image.data.compute()[:, at[:, 1], at[:, 0]].T, table[:, genes].X)
    assert_array_equal(image.data.compute()[:, 0, 0], 0)  # the tissue is round


def test_points_of_ones_own_are_squares(sdata, upsample):
    sthisto.tl.fit(sdata, "idw")
    xy = np.array([[100.0, 300.0], [130.0, 300.0], [400.0, 333.3]])
    made = upsample(sdata, xy)
    sthisto.tl.rasterize(made, ["region_00"])
    assert_allclose(made["dense"].obsm["spatial"], xy)
    assert_allclose(made["spots_dense"].bounds.iloc[0], [85, 285, 115, 315])


def test_a_finer_table_of_the_same_object_is_a_grid(section, extract, upsample):
    fine = grids.Lattice.fit(section.obsm["spatial"]).split(2)
    xy = fine.points(fine.cover(section.obsm["spatial"], 30))
    other = sthisto.datasets.synthetic(len(xy), n_genes=10)
    other.obs_names = [f"bin_{i}" for i in range(len(xy))]
    sdata = sdata_of(section)
    sdata["fine"] = circles(xy / 2, {"global": Scale([2.0, 2.0], ("x", "y"))})
    sdata["bins"] = table_of(other, "fine")
    extract(View(sdata, table_key="table"))
    sthisto.tl.fit(View(sdata, table_key="table"), "ridge")
    made = upsample(View(sdata, table_key="table"), "bins")
    sthisto.tl.rasterize(made, ["region_00"])
    assert list(made["dense"].obs_names) == list(other.obs_names)
    assert list(made.shapes) == ["fine"]
    sthisto.tl.fit(section, "ridge")
    assert_allclose(made["dense"].X, upsample(section, xy).X, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="max_distance= with grid='bins'"):
        upsample(View(sdata, table_key="table"), "bins", max_distance=3.0)
    with pytest.raises(KeyError, match=r"no table 'bin' in the SpatialData .found: 'table', 'bins'"):
        upsample(View(sdata, table_key="table"), "bin")


def test_it_is_written_and_read(sdata, tmp_path, upsample):
    sthisto.tl.fit(sdata, "ridge")
    made = upsample(sdata, 2)
    sthisto.tl.rasterize(made, ["region_00"])
    made.write(tmp_path / "dense.zarr")
    again = read_zarr(tmp_path / "dense.zarr")
    assert_array_equal(again["dense"].X, made["dense"].X)
    assert_array_equal(again["spots_genes"].data, made["spots_genes"].data)
    assert_allclose(again["spots_dense"].bounds, made["spots_dense"].bounds)
    sdata.write(tmp_path / "measured.zarr")
    stored = read_zarr(tmp_path / "measured.zarr")
    assert_array_equal(upsample(stored, 2)["dense"].X, made["dense"].X)


def test_a_fit_goes_to_another_machine(sdata, section, tmp_path):
    sthisto.tl.fit(sdata, "ridge")
    sthisto.tl.save(sdata, tmp_path / "fit.safetensors")
    other = sdata_of(section)
    other["table"].obsm["X_histo"] = section.obsm["X_histo"]
    sthisto.tl.load(tmp_path / "fit.safetensors", other)
    sthisto.tl.predict(sdata)
    sthisto.tl.predict(other)
    assert_allclose(other["table"].layers["sthisto"], sdata["table"].layers["sthisto"], rtol=1e-5, atol=1e-6)


# --- pictures line up ------------------------------------------------------------------------------------------------


def peaked(rotation=0.0):
    """A section whose one gene peaks where its white picture has a dark disc."""
    adata = sthisto.datasets.synthetic(150, n_genes=10, array="square", rotation=rotation, random_state=3)
    xy = adata.obsm["spatial"]
    top = xy[np.abs(xy - np.quantile(xy, [0.3], axis=0)).sum(axis=1).argmin()] + [3.0, -2.0]
    adata.X = np.repeat(3 * np.exp(-((xy - top) ** 2).sum(axis=1, keepdims=True) / 90.0**2), 10, axis=1)
    adata.X = adata.X.astype(np.float32)
    height, width = picture_of(adata).shape[:2]
    y, x = np.indices((height, width)) + 0.5
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[np.hypot(x - top[0], y - top[1]) < 15] = 0
    return adata, picture, top


def brightest(figure, ax):
    """Where on the axes the drawn color is lightest, in data coordinates: the middle of all such pixels."""
    figure.canvas.draw()
    grey = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float).sum(axis=2)
    box = ax.get_window_extent()
    height = grey.shape[0]
    part = grey[height - int(box.y1) + 3 : height - int(box.y0) - 3, int(box.x0) + 3 : int(box.x1) - 3]
    rows, columns = np.nonzero(part == part.max())
    middle = [int(box.x0) + 3 + columns.mean() + 0.5, int(box.y1) - 3 - rows.mean() - 0.5]
    return ax.transData.inverted().transform(middle)


@pytest.mark.filterwarnings("ignore")  # of the plotting libraries; what is drawn is looked at
@pytest.mark.parametrize(("rotation", "factor"), [(0.0, 0.5), (25.0, 1.0)])
def test_the_map_is_drawn_over_the_tissue(rotation, factor, upsample):
    import spatialdata_plot  # noqa: F401, PLC0415

    adata, picture, top = peaked(rotation)
    step = int(1 / factor)
    scaled = image_of(255 - picture[::step, ::step], {"global": Scale([step, step], ("x", "y"))})
    sdata = sdata_of(adata, he=scaled)
    sthisto.tl.fit(sdata, "idw")
    made = upsample(sdata, 2)
    sthisto.tl.rasterize(made, ["region_00"])
    pitch = grids.spacing(made["dense"].obsm["spatial"])
    drawn = {}
    for name in ("he", "shapes", "genes"):
        figure, ax = plt.subplots(figsize=(6, 6), dpi=100)
        ax.set_facecolor("black")
        if name == "he":
            made.pl.render_images("he").pl.show(ax=ax)
        elif name == "shapes":
            made.pl.render_shapes("spots_dense", color="region_00", cmap="gray").pl.show(ax=ax, colorbar=False)
        else:
            made.pl.render_images("spots_genes", channel="region_00", cmap="gray").pl.show(ax=ax, colorbar=False)
        ax.set_title(""), ax.set_facecolor("black")
        drawn[name] = brightest(figure, ax)
        plt.close(figure)
    for where in drawn.values():
        assert np.linalg.norm(where - top) < pitch / 2, drawn


# --- what is refused -------------------------------------------------------------------------------------------------


def test_two_tables_or_images_and_no_name(section, extract, unchanged):
    sdata = sdata_of(section, he=image_of(picture_of(section)), dapi=image_of(picture_of(section)[:50, :40]))
    sdata["cells"] = table_of(section)
    with unchanged(sdata, KeyError, "has 2 tables .'table', 'cells'.. Name one: sthisto.SpatialDataView"):
        extract(sdata)
    match = r"2 images share .*'he' \(652 x 649\), 'dapi' \(50 x 40\). Name one: sthisto.SpatialDataView"
    with unchanged(sdata, KeyError, match):
        extract(View(sdata, table_key="table"))
    with unchanged(sdata, KeyError, r"no image 'HE' in the SpatialData \(found: 'he' .652 x 649., 'dapi'"):
        extract(View(sdata, table_key="table", image_key="HE"))
    with unchanged(sdata, KeyError, "no table 'spots' in the SpatialData .found: 'table', 'cells'"):
        extract(View(sdata, table_key="spots"))
    extract(View(sdata, table_key="table", image_key="he"))
    assert "X_histo" not in sdata["cells"].obsm


def test_stains_of_many_channels_are_no_candidates(section, extract):
    many = Image2DModel.parse(np.zeros((6, 80, 80), np.uint8))
    sdata = sdata_of(section, he=image_of(picture_of(section)), cycif=many)
    extract(sdata)
    with pytest.raises(ValueError, match=r"An image is .* found an array of shape \(80, 80, 6\)"):
        extract(View(sdata, image_key="cycif"))


def test_no_table_and_no_image(section, extract, unchanged):
    bare = SpatialData(shapes={"spots": circles(section.obsm["spatial"])}, tables={"table": table_of(section)})
    with unchanged(bare, KeyError, "0 images share a coordinate system with 'spots' .*the SpatialData has no images"):
        extract(bare)
    with pytest.raises(KeyError, match=r"has 0 tables .nothing.. Name one: sthisto.SpatialDataView"):
        extract(SpatialData(shapes={"spots": circles(section.obsm["spatial"])}))


def test_a_table_that_annotates_no_shapes(section, extract, unchanged):
    sdata = sdata_of(section)
    del sdata["table"].uns["spatialdata_attrs"]
    with unchanged(sdata, ValueError, "table 'table' annotates no shapes.* sdata.set_table_annotates_spatialelement"):
        extract(sdata)
    sdata = sdata_of(section)
    del sdata.shapes["spots"]
    with unchanged(sdata, ValueError, "table 'table' annotates 'spots', which is not there .found: nothing."):
        extract(sdata)


def test_rows_without_a_shape(section, extract, unchanged):
    frame = circles(section.obsm["spatial"])
    sdata = sdata_of(section, spots={"shapes": {"spots": frame.iloc[:90]}})
    with unchanged(
        sdata, ValueError, "table 'table' annotates 10 of 100 places that 'spots' does not have, such as 90"
    ):
        extract(sdata)
    frame.index = [0, *range(99)]
    sdata = sdata_of(section, spots={"shapes": {"spots": frame}})
    with unchanged(sdata, ValueError, "the index of 'spots' is not unique"):
        extract(sdata)


@pytest.mark.parametrize("element", ["spots", "he"])
def test_a_missing_transformation(sdata, extract, unchanged, element):
    remove_transformation(sdata[element], "global")
    with unchanged(sdata, ValueError, f"'{element}' has no transformation, so where it is is unknown"):
        extract(View(sdata, image_key="he"))


@pytest.mark.parametrize("matrix", [np.diag([1.0, 0.0, 1.0]), np.diag([np.nan, 1.0, 1.0])])
def test_a_transformation_that_cannot_be_undone(sdata, extract, unchanged, matrix):
    set_transformation(sdata["he"], Affine(matrix, ("x", "y"), ("x", "y")))
    with unchanged(sdata, ValueError, "the transformation of 'he' to 'global' cannot be undone"):
        extract(sdata)


def test_transformations_that_contradict_each_other(sdata, extract, unchanged):
    set_transformation(sdata["spots"], Identity(), "slide")
    set_transformation(sdata["he"], Scale([1.0001, 1.0001], ("x", "y")), "slide")
    extract(sdata)  # rounding is not a contradiction
    set_transformation(sdata["he"], Scale([1.1, 1.1], ("x", "y")), "slide")
    with unchanged(sdata, ValueError, "of 'spots' and 'he' contradict each other: through 'slide' .* up to 5.* px"):
        extract(sdata)
    remove_transformation(sdata["he"], "slide")
    extract(sdata)


def test_an_image_in_another_coordinate_system(section, extract, unchanged):
    sdata = sdata_of(section, steps={"elsewhere": Identity()})
    with unchanged(sdata, KeyError, "0 images share a coordinate system with 'spots' .'global'.*has 'he' .652 x 649."):
        extract(sdata)
    match = "'he' is in 'elsewhere' and 'spots' in 'global': without a coordinate system in common"
    with unchanged(sdata, ValueError, match):
        extract(View(sdata, image_key="he"))


def test_spots_outside_the_image(section, extract, unchanged):
    sdata = sdata_of(section, steps={"global": Scale([0.1, 0.1], ("x", "y"))})
    with unchanged(sdata, ValueError, "points are outside the image"):
        extract(sdata)


def test_a_picture_and_a_name(sdata, extract, unchanged):
    with unchanged(sdata, ValueError, "image= with image_key='he': pass an image or name one, not both"):
        extract(View(sdata, image_key="he"), image=np.zeros((9, 9, 3), np.uint8))


def test_images_of_genes_that_were_not_fitted(sdata, upsample):
    sthisto.tl.fit(sdata, "idw", genes=["region_00"])
    dense = upsample(sdata, 2)
    with pytest.raises(KeyError, match=r"genes 'nonsense' are not in the map .*'region_00'"):
        sthisto.tl.rasterize(dense, ["region_00", "nonsense"])
    assert "spots_genes" not in dense.images
    with pytest.raises(KeyError, match=r"no table .dense. in the SpatialData"):
        sthisto.tl.rasterize(sdata, "region_00")


def test_the_table_alone_does_not_know_its_image(sdata, section, upsample):
    sthisto.tl.fit(sdata, "ridge")
    table = sdata["table"]
    table.obsm["spatial"] = section.obsm["spatial"]
    with pytest.raises(KeyError, match="taken from the image 'he' of a SpatialData: pass that and not its table"):
        upsample(table, 2)
