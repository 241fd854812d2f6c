"""What squidpy and spatialdata-io read works as it comes: Space Ranger 1, 2, 3 and Visium HD, made here, and real ones.

The folders are written here as 10x documents them: a list of positions without a header (1), with one (2), a
probe-based CytAssist run (3), or bins with positions in parquet and the scale in the scale factors (HD).
"""

import gzip
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy import sparse

import sthisto
from sthisto import SpatialDataView as View
from sthisto import grids
from sthisto.cli import main

with warnings.catch_warnings():  # what their own dependencies warn of as they load
    warnings.simplefilter("ignore")
    import spatialdata_io
    import squidpy as sq

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the readers; ours are looked for below
    pytest.mark.filterwarnings("ignore:Converting `region_key"),
    pytest.mark.filterwarnings("ignore:Starting with ImageIO v3"),
    pytest.mark.filterwarnings("ignore:Variable names are not unique"),
    pytest.mark.filterwarnings("ignore:No full resolution image found"),
]

NAMES = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
HIRES, LOWRES = 0.5, 0.1


@dataclass(frozen=True)
class Layout:
    """How a version of Space Ranger writes the positions, and how its images come."""

    positions: str
    header: bool
    image: str = "image.tif"


LAYOUTS = {
    "1": Layout("tissue_positions_list.csv", header=False),
    "2": Layout("tissue_positions.csv", header=True),
    "3": Layout("tissue_positions.csv", header=True, image="image.btf"),
}


def barcodes(n):
    """Names as 10x has them: 16 bases and the number of the well."""
    return np.array(["".join("ACGT"[i // 4**k % 4] for k in range(16)) + "-1" for i in range(n)])


def write_counts(path, names, genes, counts):
    """A feature-barcode matrix in HDF5: genes by barcodes, by columns."""
    matrix = sparse.csc_matrix(counts.T)
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([b"tissue"])
        file.attrs["software_version"] = "spaceranger"
        group = file.create_group("matrix")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(matrix, part).astype(np.int32)
        group["shape"] = np.array(matrix.shape)
        group["barcodes"] = names.astype("S")
        for part, values in (
            ("id", [f"ENSG{i:011d}" for i in range(len(genes))]),
            ("name", genes),
            ("feature_type", ["Gene Expression"] * len(genes)),
            ("genome", ["GRCh38"] * len(genes)),
        ):
            group[f"features/{part}"] = np.array(values, dtype="S")


def write_images(folder, picture):
    """The smaller pictures that come with every run."""
    height, width = picture.shape[:2]
    for name, factor in (("hires", HIRES), ("lowres", LOWRES)):
        small = Image.fromarray(picture).resize((round(width * factor), round(height * factor)), Image.Resampling.BOX)
        small.save(folder / f"tissue_{name}_image.png")


def positions_of(adata):
    """Positions of the whole array: those under tissue, and one that is not, which the counts lack."""
    xy = adata.obsm["spatial"]
    table = pd.DataFrame({
        "barcode": adata.obs_names,
        "in_tissue": 1,
        "array_row": adata.obs["array_row"].to_numpy(),
        "array_col": adata.obs["array_col"].to_numpy(),
        "pxl_row_in_fullres": xy[:, 1],
        "pxl_col_in_fullres": xy[:, 0],
    })  # fmt: skip
    off = pd.DataFrame([["TTTTTTTT-1", 0, 77, 127, -5.0, -8.0]], columns=NAMES)
    return pd.concat([off, table.iloc[::-1]], ignore_index=True)  # in an order of its own


def section(array="hexagonal", n=100, random_state=5, **options):
    adata = sthisto.datasets.synthetic(n, n_genes=20, array=array, random_state=random_state, **options)
    adata.obs_names = barcodes(n)
    return adata, adata.uns["spatial"]["synthetic_0"]["images"]["hires"]


def visium_folder(root, adata, picture, layout):
    (root / "spatial").mkdir(parents=True)
    write_counts(
        root / "filtered_feature_bc_matrix.h5",
        adata.obs_names.to_numpy(),
        adata.var_names,
        adata.layers["counts"].toarray(),
    )
    positions_of(adata).to_csv(root / "spatial" / layout.positions, header=layout.header, index=False)
    write_images(root / "spatial", picture)
    scale = {"spot_diameter_fullres": 27.5, "fiducial_diameter_fullres": 40.0}
    scale |= {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": LOWRES}
    (root / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    tifffile.imwrite(root / layout.image, picture, bigtiff=layout.image.endswith("btf"), rowsperstrip=16)
    return root


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path):
    adata, picture = section()
    layout = LAYOUTS[request.param]
    return visium_folder(tmp_path / "outs", adata, picture, layout), adata, layout


def lognormalised(table):
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)


def features_of(adata, image, encoder):
    """What the encoder says of the spots where they are known to be."""
    bare = sc.AnnData(obs=adata.obs, obsm={"spatial": adata.obsm["spatial"]})
    sthisto.pp.extract_features(bare, encoder, image=image, mpp=2.0)
    return pd.DataFrame(bare.obsm["X_histo"], index=bare.obs_names)


def test_squidpy_with_the_image_that_came_with_it(folder, encoder):
    root, truth, _ = folder
    adata = sq.read.visium(root)
    lognormalised(adata)
    sthisto.pp.extract_features(adata, encoder)
    record = adata.uns["sthisto"]["features"]["X_histo"]
    assert [str(image) for image in record["image"]] == ["uns:hires"]
    assert_allclose(record["mpp"], 2.0, rtol=1e-3)  # hexagons are 100 um apart
    found = pd.DataFrame(adata.obsm["X_histo"], index=adata.obs_names).loc[truth.obs_names]
    for column in range(3):  # the sums of the colors; from a picture of half the size they are nearly the same
        assert np.corrcoef(found[column], features_of(truth, section()[1], encoder)[column])[0, 1] > 0.99
    sthisto.tl.fit(adata, "ridge")
    dense = sthisto.tl.upsample(adata, 2, encoder=encoder)
    assert dense.n_obs > 3 * adata.n_obs
    assert list(dense.uns["spatial"]) == ["tissue"]


def test_squidpy_with_the_full_resolution_image_noted(folder, encoder):
    root, truth, layout = folder
    adata = sq.read.visium(root, source_image_path=root / layout.image)
    lognormalised(adata)
    sthisto.pp.extract_features(adata, encoder)
    assert [Path(str(i)).name for i in adata.uns["sthisto"]["features"]["X_histo"]["image"]] == [layout.image]
    found = pd.DataFrame(adata.obsm["X_histo"], index=adata.obs_names).loc[truth.obs_names]
    assert_allclose(found, features_of(truth, section()[1], encoder), rtol=1e-6)


def test_spatialdata_io(folder, encoder):
    root, truth, layout = folder
    sdata = spatialdata_io.visium(root, dataset_id="tissue", fullres_image_file=layout.image)
    lognormalised(sdata["table"])
    with pytest.raises(KeyError, match=r"2 images|3 images|1 images"):  # hires lies there, too
        sthisto.pp.extract_features(sdata, encoder)
    sthisto.pp.extract_features(View(sdata, image_key="tissue_full_image"), encoder)
    found = pd.DataFrame(sdata["table"].obsm["X_histo"], index=sdata["table"].obs_names).loc[truth.obs_names]
    # The level that is fine enough for the encoder is read; spatialdata makes it of single pixels, so it is coarse.
    known = features_of(truth, section()[1], encoder)
    assert min(np.corrcoef(found[column], known[column])[0, 1] for column in known) > 0.98
    sthisto.pp.extract_features(View(sdata, image_key="tissue_hires_image"), encoder, key_added="small")
    assert np.corrcoef(sdata["table"].obsm["small"][:, 0], sdata["table"].obsm["X_histo"][:, 0])[0, 1] > 0.99
    sthisto.tl.fit(sdata, "ridge")
    made = sthisto.tl.upsample(sdata, 2, encoder=encoder)
    assert made["dense"].n_obs > 3 * truth.n_obs
    assert list(made.images) == ["tissue_full_image"]


def test_both_readers_give_the_same_map(folder, encoder):
    root, _, _ = folder
    adata, sdata = sq.read.visium(root), spatialdata_io.visium(root, dataset_id="t")
    for thing in (adata, View(sdata, image_key="t_hires_image")):
        lognormalised(adata if thing is adata else sdata["table"])
        sthisto.pp.extract_features(thing, encoder)
        sthisto.tl.fit(thing, "ridge")
    one, other = (sthisto.tl.upsample(thing, 2, encoder=encoder) for thing in (adata, sdata))
    assert_allclose(other["dense"].obsm["spatial"], one.obsm["spatial"], atol=1e-6)
    assert_allclose(other["dense"].X, one.X, rtol=1e-4, atol=1e-4)


def test_features_computed_elsewhere_come_by_their_key(folder, tmp_path):
    """A CSV by barcode, in an order of its own, as other tools leave it."""
    root, truth, _ = folder
    rng = np.random.default_rng(0)
    made = pd.DataFrame(rng.normal(size=(truth.n_obs, 6)), index=truth.obs_names)
    made.to_csv(tmp_path / "features.csv")
    adata = sq.read.visium(root)
    lognormalised(adata)
    adata.obsm["X_lazyslide"] = pd.read_csv(tmp_path / "features.csv", index_col=0).loc[adata.obs_names].to_numpy()
    sthisto.tl.fit(adata, "ridge", features_key="X_lazyslide")
    sthisto.tl.predict(adata)
    points = adata.obsm["spatial"][:7] + 3
    dense = sthisto.tl.upsample(adata, points, features=rng.normal(size=(7, 6)).astype(np.float32))
    assert dense.shape == (7, adata.n_vars)
    with pytest.raises(KeyError, match=r"has no record of sthisto.pp.extract_features.* pass features="):
        sthisto.tl.upsample(adata, 2)


# --- Visium HD -------------------------------------------------------------------------------------------------------

MPP, SIDE_UM = 0.5, 192  # 12 x 12 bins of 16 um


def pooled(counts, factor):
    """Counts (r, c, g) of square blocks of bins."""
    rows, columns, genes = counts.shape
    return counts.reshape(rows // factor, factor, columns // factor, factor, genes).sum(axis=(1, 3))


def write_bins(root, bin_um, counts, picture):
    """One binning: counts, positions of all bins in parquet, the scale in the scale factors."""
    folder = root / "binned_outputs" / f"square_{bin_um:03d}um"
    (folder / "spatial").mkdir(parents=True)
    rows, columns, genes = counts.shape
    row, column = (each.ravel() for each in np.indices((rows, columns)))
    step = bin_um / MPP
    names = np.array([f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)])
    place = pd.DataFrame(dict(zip(NAMES, [
        names, 1, row, column, 40 + (row + 0.5) * step, 60 + (column + 0.5) * step,
    ], strict=True)))  # fmt: skip
    place.to_parquet(folder / "spatial" / "tissue_positions.parquet")
    scale = {"spot_diameter_fullres": step, "bin_size_um": float(bin_um), "microns_per_pixel": MPP}
    scale |= {"tissue_hires_scalef": HIRES, "tissue_lowres_scalef": LOWRES, "regist_target_img_scalef": HIRES}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    write_images(folder / "spatial", picture)
    counts = counts.reshape(-1, genes)
    seen = counts.sum(axis=1) > 0  # the matrix is of the bins under tissue alone
    write_counts(
        folder / "filtered_feature_bc_matrix.h5", names[seen], [f"GENE{i}" for i in range(genes)], counts[seen]
    )


@pytest.fixture(scope="module")
def hd(tmp_path_factory):
    """A run of Visium HD: its truth falls from left to right, and so does what the picture shows."""
    root, rng = tmp_path_factory.mktemp("hd") / "outs", np.random.default_rng(0)
    bins = SIDE_UM // 2
    slope = np.linspace(0, 1, bins)[None, :, None] * np.ones((bins, 1, 1))
    rate = 0.4 * np.concatenate([slope, 1 - slope, 0 * slope + 0.5, slope**2, (1 - slope) ** 2], axis=2)
    counts = rng.poisson(rate)
    width, height = (round(SIDE_UM / MPP) + 2 * margin for margin in (60, 40))
    dark = np.clip((np.arange(width) - 60) / (width - 120), 0, 1) * 200
    picture = np.repeat((230 - dark)[None, :, None], height, axis=0) + rng.normal(0, 5, (height, width, 3))
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    for bin_um in (2, 8, 16):
        write_bins(root, bin_um, pooled(counts, bin_um // 2), picture)
    (root / "spatial").mkdir()
    write_images(root / "spatial", picture)
    (root / "microscope_image").mkdir()
    tifffile.imwrite(root / "microscope_image" / "image.btf", picture, bigtiff=True)
    layout = json.dumps({"file_format": "1.0", "transform": {}})
    matrices = {
        f"{one}_colrow_to_{other}_colrow": np.eye(3).tolist()
        for one, other in (
            ("cytassist", "spot"), ("spot", "cytassist"), ("microscope", "spot"), ("spot", "microscope"),
        )
    }  # fmt: skip
    metadata = {"hd_layout_json": layout, "transform_matrices": matrices}
    with h5py.File(root / "brain_feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps(metadata)
    return root


def small(**options):
    return {"patch_um": 16.0, **options}


@pytest.fixture(scope="module")
def read_hd(hd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdata = spatialdata_io.visium_hd(hd)
    lognormalised(sdata["square_016um"])
    return sdata


@pytest.fixture
def fitted_hd(read_hd, encoder):
    key = {"table_key": "square_016um"}
    sthisto.pp.extract_features(View(read_hd, image_key="brain_full_image", **key), encoder, **small())
    sthisto.tl.fit(View(read_hd, **key), "ridge")
    return read_hd


def test_visium_hd_knows_its_scale(fitted_hd):
    assert list(fitted_hd.tables) == ["square_002um", "square_008um", "square_016um"]
    record = fitted_hd["square_016um"].uns["sthisto"]["features"]["X_histo"]
    assert_allclose(record["mpp"], MPP, rtol=1e-6)  # nobody had to say it, and nothing was guessed


@pytest.mark.parametrize(("bin_um", "factor"), [(8, 2), (2, 8)])
def test_visium_hd_from_16_um_to_finer_bins(fitted_hd, encoder, bin_um, factor):
    """By the name of the finer table, or by splitting the coarse lattice: the same places, the same map."""
    coarse, options = View(fitted_hd, "square_016um"), {"encoder": encoder}
    fine = fitted_hd[f"square_{bin_um:03d}um"]
    named = sthisto.tl.upsample(coarse, f"square_{bin_um:03d}um", **options)
    assert list(named["dense"].obs_names) == list(fine.obs_names)
    assert_allclose(named["dense"].obsm["spatial"], fine.obsm["spatial"])
    split = grids.Lattice.fit(fitted_hd["square_016um"].obsm["spatial"]).split(factor)
    assert split.pitch == pytest.approx(bin_um / MPP)
    laid = sthisto.tl.upsample(coarse, split, **options)["dense"]
    at = grids.nearest(fine.obsm["spatial"], laid.obsm["spatial"])
    assert at[0].max() < 1e-6
    assert_allclose(laid.X[at[1][:, 0]], named["dense"].X, rtol=1e-3, atol=1e-3)
    slope = laid.to_df()["GENE0"]
    assert np.corrcoef(slope, laid.obsm["spatial"][:, 0])[0, 1] > 0.8  # a bin of 16 um has few counts
    sides = np.sqrt(named[next(iter(named.shapes))].area)
    assert_allclose(sides, bin_um / MPP, rtol=1e-6)


def test_visium_hd_as_anndata(hd, encoder):
    """squidpy reads a binning whose positions were put into a CSV, as people do."""
    folder = hd / "binned_outputs" / "square_016um"
    pd.read_parquet(folder / "spatial" / "tissue_positions.parquet").to_csv(
        folder / "spatial" / "tissue_positions.csv", index=False
    )
    adata = sq.read.visium(folder)
    lognormalised(adata)
    sthisto.pp.extract_features(adata, encoder, image=hd / "microscope_image" / "image.btf", **small())
    assert_allclose(adata.uns["sthisto"]["features"]["X_histo"]["mpp"], MPP)  # microns_per_pixel of the scale factors
    sthisto.tl.fit(adata, "ridge")
    dense = sthisto.tl.upsample(adata, grids.Lattice.fit(adata.obsm["spatial"]).split(2), encoder=encoder)
    assert dense.n_obs == 4 * adata.n_obs
    assert_array_equal(np.unique(dense.obs["distance_um"].round(3)), [5.657])  # half the diagonal of 8 um


# --- sthisto.read ----------------------------------------------------------------------------------------------------


def same_as_squidpy(adata, expected):
    assert_array_equal(adata.X.toarray(), expected.X.toarray())
    assert list(adata.obs_names) == list(expected.obs_names)
    assert list(adata.var_names) == list(expected.var_names)
    assert_allclose(adata.obsm["spatial"], expected.obsm["spatial"])
    for column in ("in_tissue", "array_row", "array_col"):
        assert_array_equal(adata.obs[column], expected.obs[column])
    assert list(adata.uns["spatial"]) == list(expected.uns["spatial"])
    [entry], [other] = adata.uns["spatial"].values(), expected.uns["spatial"].values()
    assert entry["scalefactors"] == other["scalefactors"]
    for size in ("hires", "lowres"):
        assert_array_equal(entry["images"][size], other["images"][size])


def test_every_version_is_read_as_by_squidpy(folder):
    root, _, layout = folder
    expected = sq.read.visium(root)
    same_as_squidpy(sthisto.read(root), expected)
    same_as_squidpy(sthisto.read(root.parent), expected)  # the folder that outs is in
    noted = sthisto.read(root, image=root / layout.image, library_id="mine")
    assert noted.uns["spatial"]["mine"]["metadata"]["source_image_path"] == str(root / layout.image)


def test_counts_in_matrix_market_form_and_no_hires_picture(folder):
    root, _, _ = folder
    expected = sthisto.read(root)
    mtx = root / "filtered_feature_bc_matrix"
    mtx.mkdir()
    scipy.io.mmwrite(mtx / "matrix.mtx", expected.X.T.astype(int))
    pd.Series(expected.obs_names).to_csv(mtx / "barcodes.tsv", header=False, index=False)
    features = pd.DataFrame({"id": expected.var["gene_ids"], "name": expected.var_names, "kind": "Gene Expression"})
    features.loc[len(features)] = ["CD3", "CD3", "Antibody Capture"]
    features.to_csv(mtx / "features.tsv", sep="\t", header=False, index=False)
    with (mtx / "matrix.mtx").open("r+") as file:
        text = file.read().replace(
            f"{expected.n_vars} {expected.n_obs} ", f"{expected.n_vars + 1} {expected.n_obs} ", 1
        )
        file.seek(0)
        file.write(text)
    for name in ("matrix.mtx", "barcodes.tsv", "features.tsv"):
        (mtx / f"{name}.gz").write_bytes(gzip.compress((mtx / name).read_bytes()))
        (mtx / name).unlink()
    (root / "filtered_feature_bc_matrix.h5").unlink()
    (root / "spatial" / "tissue_hires_image.png").unlink()
    adata = sthisto.read(root)
    assert_array_equal(adata.X.toarray(), expected.X.toarray())
    assert_array_equal(adata.obsm["spatial"], expected.obsm["spatial"])
    [(name, entry)] = adata.uns["spatial"].items()
    assert name == root.parent.name
    assert list(entry["images"]) == ["lowres"]


@pytest.mark.parametrize(("bin_um", "expected"), [(None, 16), (8, 8), (2, 2)])
def test_bins_of_visium_hd(hd, bin_um, expected):
    adata = sthisto.read(hd, bin_um=bin_um)
    same_as_squidpy(sthisto.read(hd / "binned_outputs" / f"square_{expected:03d}um"), adata)
    assert adata.uns["spatial"]["tissue"]["scalefactors"]["bin_size_um"] == expected
    assert_allclose(np.diff(np.unique(adata.obsm["spatial"][:, 0])), expected / MPP)


def test_what_is_missing_is_named(folder, hd, tmp_path):
    root, adata, _ = folder
    with pytest.raises(FileNotFoundError, match="no folder"):
        sthisto.read(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"no bins of 4 um \(found: '2', '8', '16'\)"):
        sthisto.read(hd, bin_um=4)
    with pytest.raises(ValueError, match=rf"matrix alone, .* It is in one: pass {root}"):
        sthisto.read(root / "filtered_feature_bc_matrix.h5")
    with pytest.raises(FileNotFoundError, match=r"no image lost\.tif"):
        sthisto.read(root, image="lost.tif")
    shutil.copy(root / "filtered_feature_bc_matrix.h5", tmp_path / "alone.h5")
    with pytest.raises(ValueError, match=r"Needed are filtered_feature_bc_matrix\.h5 .*, spatial/tissue_positions"):
        sthisto.read(tmp_path / "alone.h5")
    adata.write_h5ad(tmp_path / "section.h5ad")
    with pytest.raises(ValueError, match="read by anndata"):
        sthisto.read(tmp_path / "section.h5ad")
    for lost, match in (
        ("filtered_feature_bc_matrix.h5", "no filtered_feature_bc_matrix.h5 and no folder"),
        ("spatial/scalefactors_json.json", "no spatial/scalefactors_json.json"),
    ):
        (root / lost).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=match):
            sthisto.read(root)
        (tmp_path / "away").rename(root / lost)
    [positions] = (root / "spatial").glob("tissue_positions*")
    lines = positions.read_text().splitlines(keepends=True)
    positions.write_text("".join(lines[:50]))
    with pytest.raises(ValueError, match="spots of the matrix have no position"):
        sthisto.read(root)
    positions.unlink()
    with pytest.raises(FileNotFoundError, match=r"no spatial/tissue_positions\.parquet or"):
        sthisto.read(root)


def test_a_folder_in_the_shell_and_in_a_sheet(folder, tmp_path, capsys):
    root, adata, _ = folder
    options = ["--model", "idw", "--quiet"]
    assert main(["upsample", str(root), "-o", str(tmp_path / "dense.h5ad"), *options]) == 0
    assert capsys.readouterr().out.endswith(f"from {adata.n_obs} spots\n")
    assert main(["fit", str(root / "filtered_feature_bc_matrix.h5"), "-o", str(tmp_path / "f.h5ad"), *options]) == 2
    assert f"pass {root}." in capsys.readouterr().err
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("section,image,role,table,pitch_um\na,,measured,outs,100\nouts,,measured,,100\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["batch", str(sheet), "-o", str(tmp_path / "maps"), "--grid", "1", *options]) == 0
    assert sorted(each.name for each in (tmp_path / "maps").iterdir()) == ["a.h5ad", "fitted.h5ad", "outs.h5ad"]


# --- real folders ----------------------------------------------------------------------------------------------------


def test_a_real_folder_of_space_ranger_1(data, encoder):
    """100 nearly empty spots; its hires picture is black, so the lowres one is taken."""
    adata = sq.read.visium(data("visium_v1_tiny"))
    with pytest.warns(UserWarning, match="'hires' image .* is blank"):
        sthisto.pp.extract_features(adata, encoder)
    assert [str(image) for image in adata.uns["sthisto"]["features"]["X_histo"]["image"]] == ["uns:lowres"]
    assert np.isfinite(adata.obsm["X_histo"]).all()
    sdata = spatialdata_io.visium(data("visium_v1_tiny"), dataset_id="tiny")
    sthisto.pp.extract_features(View(sdata, image_key="tiny_lowres_image"), encoder)
    at = sdata["table"].obs_names.get_indexer(adata.obs_names)
    assert_allclose(sdata["table"].obsm["X_histo"][at], adata.obsm["X_histo"], rtol=1e-5)


def test_a_real_folder_of_space_ranger_3(data, encoder):
    """A table in Matrix Market form, for which the readers want scanpy's, and no hires picture."""
    folder = data("visium_v2_cytassist")
    adata = sthisto.read(folder)
    assert adata.shape == (2898, 19465)
    assert list(adata.uns["spatial"]) == ["visium_v2_cytassist"]
    sc.pp.filter_cells(adata, min_counts=20)
    sc.pp.filter_genes(adata, min_cells=adata.n_obs // 4)
    lognormalised(adata)
    sthisto.pp.extract_features(adata, encoder)
    sthisto.tl.fit(adata, "ridge", genes=adata.var_names[:10])
    dense = sthisto.tl.upsample(adata, 2, encoder=encoder)
    assert 3.5 * adata.n_obs < dense.n_obs < 4.5 * adata.n_obs


def test_real_folders_are_read(data):
    tiny = data("visium_v1_tiny")
    same_as_squidpy(sthisto.read(tiny), sq.read.visium(tiny))
    bins = sthisto.read(data("visium_hd"))  # loose files, as its source shares them
    assert bins.shape == (675, 18085)
    [entry] = bins.uns["spatial"].values()
    assert entry["scalefactors"]["bin_size_um"] == 16
