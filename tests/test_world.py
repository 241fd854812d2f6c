"""Facts that contradict each other, labels, flags and records: refused, heeded, or named; nothing wrong in silence."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sthisto
from sthisto import _data, grids, pl, pp, tl
from sthisto.cli._steps import names_in
from sthisto.datasets import synthetic


@pytest.fixture(scope="module")
def _two():
    return synthetic(60, n_genes=12, n_sections=2)


@pytest.fixture
def two(_two):
    return _two.copy()


@pytest.fixture
def extract(encoder):
    return lambda adata, *given, **options: pp.extract_features(adata, *(given or (encoder,)), **options)


@pytest.fixture
def parts(two):
    """The two sections as objects of their own."""
    found = {}
    for name in two.uns["spatial"]:
        found[name] = two[two.obs["library"] == name].copy()
        found[name].uns = {"spatial": {name: two.uns["spatial"][name]}}
    return found


def entry_of(adata):
    return next(iter(adata.uns["spatial"].values()))


# --- scale -----------------------------------------------------------------------------------------------------------


def test_coordinates_multiplied_by_a_scale_factor(section, extract, refuses):
    entry_of(section)["scalefactors"]["spot_diameter_fullres"] = 27.5
    section.obsm["spatial"] = section.obsm["spatial"] * 0.25
    with refuses(section, ValueError, r"27.5 px wide .* and 12.5 px apart .* tissue_hires_scalef. Divide them by it"):
        extract(section)


def test_a_stale_resolution_of_the_file(section, extract, refuses):
    picture = entry_of(section)["images"]["hires"]
    stale = sthisto.images.open_image(picture, mpp=0.25)
    with refuses(section, ValueError, r"2 um/px by scalefactors\['microns_per_pixel'\]; 0.25 um/px by the image file"):
        extract(section, image=stale)
    with pytest.warns(UserWarning, match="0.25 um/px by the image file.* mpp= counts"):
        extract(section, image=stale, mpp=2.0)
    assert section.uns["sthisto"]["features"]["X_histo"]["mpp"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("value", "number"),
    [("0.5", 0.5), ("0,5", 0.5), (np.array([0.5]), 0.5), ([0.5], 0.5), (None, None), (np.array(None), None)],
)
def test_factors_of_other_writers(value, number):
    assert _data.factor_of({"a": value}, "a") == number


@pytest.mark.parametrize("value", ["half", -1, 0, np.nan, [1.0, 2.0]])
def test_factors_that_are_no_numbers(value):
    with pytest.raises(ValueError, match=r"scalefactors\['a'\] of section 's' is .* expected one positive number"):
        _data.factor_of({"a": value}, "a", section="s")


def test_a_dense_map_is_extracted_at_the_scale_of_its_section(section, encoder):
    del entry_of(section)["scalefactors"]["microns_per_pixel"]
    tl.fit(section, "ridge")
    dense = tl.upsample(section, 2, encoder=encoder)
    for options in ({}, {"mpp": 2.0}):
        pp.extract_features(dense, encoder, key_added="X_again", **options)
        assert dense.uns["sthisto"]["features"]["X_again"]["mpp"].tolist() == [2.0]


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["unique", "same", "first", None])
def test_sections_extracted_before_or_after_concatenation(parts, extract, merge):
    before = {name: part.copy() for name, part in parts.items()}
    for part in before.values():
        extract(part)
    joined = ad.concat(before, label="section", index_unique="-", uns_merge=merge)
    later = ad.concat(parts, label="section", index_unique="-", uns_merge="unique")
    extract(later, library_key="section")
    for adata in (joined, later):
        tl.fit(adata, "ridge", library_key="section")
        tl.predict(adata)
    np.testing.assert_allclose(joined.layers["sthisto"], later.layers["sthisto"], atol=1e-5)


def test_sections_of_different_encoders(parts, extract, refuses):
    first, second = parts.values()
    extract(first)
    extract(second, "handcrafted")
    both = ad.concat(parts, label="section", index_unique="-", uns_merge="unique")
    with refuses(both, ValueError, "were made differently .encoder 'colors' and 'handcrafted'"):
        tl.fit(both, "ridge", library_key="section")


def test_a_reference_of_another_encoder_or_patch(parts, encoder, extract, refuses):
    fitted, stained = parts.values()
    extract(fitted)
    tl.fit(fitted, "ridge")
    extract(stained, patch_um=60.0)
    with refuses(stained, ValueError, "were not made as those of the fit.*patch_um 100.0 and 60.0"):
        tl.predict(stained, reference=fitted)
    encoder.name = "other"
    extract(stained, encoder)
    encoder.name = "colors"
    with refuses(stained, ValueError, "encoder 'colors' and 'other'"):
        tl.upsample(stained, 2, reference=fitted)


def test_features_that_were_changed(section, refuses):
    section.obsm["X_histo"] = section.obsm["X_histo"] / section.obsm["X_histo"].std(axis=0)
    with refuses(section, ValueError, "was changed in 100 of 100 rows after sthisto.pp.extract_features"):
        tl.fit(section, "ridge")
    section.obsm["X_mine"] = section.obsm["X_histo"]
    tl.fit(section, "ridge", features_key="X_mine")  # under a name of their own they are the user's


def test_rows_may_be_taken_and_reordered(section):
    part = section[np.random.default_rng(0).permutation(100)[:60]].copy()
    tl.fit(part, "ridge")


# --- names, masks, flags ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [pd.RangeIndex(20), pd.Index(np.arange(20.0))])
def test_gene_names_that_are_numbers(section, encoder, names):
    tl.fit(section, "ridge")
    right = tl.upsample(section, 2, encoder=encoder).X
    section.var.index = names
    tl.fit(section, "ridge")
    np.testing.assert_array_equal(tl.upsample(section, 2, encoder=encoder).X, right)


def test_gene_names_that_are_missing(section):
    section.var.index = pd.Index([np.nan, *section.var_names[1:]], dtype=object)
    with pytest.raises(ValueError, match=r"1 of adata.var_names are missing .NaN., as after var.reset_index"):
        tl.fit(section, "ridge")


def test_a_mask_by_name(section, refuses):
    chosen = pd.Series(np.arange(100) < 60, index=section.obs_names)
    tl.fit(section, "ridge", train_on=chosen.sample(frac=1, random_state=0))
    assert set(section.uns["sthisto"]["fit"]["sthisto"]["spots"]) == set(section.obs_names[:60])
    with refuses(section, ValueError, "index differs from adata.obs_names"):
        tl.fit(section, "ridge", train_on=chosen.reset_index(drop=True))


@pytest.mark.parametrize("values", [[1, 0], [True, False], [1.0, 0.0]])
def test_spots_outside_the_tissue_are_left_out(section, encoder, values):
    left = section.obsm["spatial"][:, 0] < np.median(section.obsm["spatial"][:, 0])
    section.obs["in_tissue"] = np.where(left, *values)
    tl.fit(section, "ridge")
    assert set(section.uns["sthisto"]["fit"]["sthisto"]["spots"]) == set(section.obs_names[left])
    dense = tl.upsample(section, 2, encoder=encoder)
    assert dense.obsm["spatial"][:, 0].max() < section.obsm["spatial"][:, 0].max() - 50
    del section.obs["in_tissue"]
    section.obs["mine"] = np.where(left, *values)
    tl.fit(section, "ridge", train_on="mine")
    assert set(section.uns["sthisto"]["fit"]["sthisto"]["spots"]) == set(section.obs_names[left])


def test_array_numbers_that_are_placeholders(section, extract):
    section.obs["array_row"] = section.obs["array_col"] = 0
    extract(section)


# --- expression ------------------------------------------------------------------------------------------------------


def test_values_that_are_not_logarithmic(section, refuses):
    counts = section.layers["counts"].toarray().astype(np.float32)
    section.layers["soft"] = counts * np.float32(0.93)
    section.layers["scaled"] = counts / counts.sum(axis=1, keepdims=True) * 1e4
    with refuses(section, ValueError, "no log-normalized expression does: the logarithm was not taken|holds multiples"):
        tl.fit(section, "ridge", layer="soft")
    with refuses(section, ValueError, "goes up to .*: the logarithm was not taken"):
        tl.fit(section, "ridge", layer="scaled")


def test_values_in_sparse_blocks_of_dask(section):
    dask = pytest.importorskip("dask.array")
    tl.fit(section, "ridge")
    tl.predict(section)
    blocks = section.copy()
    dense = section.X.toarray() if sparse.issparse(section.X) else section.X
    blocks.X = dask.from_array(dense, chunks=(50, 60)).map_blocks(sparse.csr_matrix)
    tl.fit(blocks, "ridge")
    tl.predict(blocks)
    np.testing.assert_allclose(blocks.layers["sthisto"], section.layers["sthisto"], atol=1e-5)


# --- other schemas ---------------------------------------------------------------------------------------------------


def test_an_atlas_keeps_more_in_the_shared_slot(section, extract):
    entry = entry_of(section)
    entry["images"] = {"fullres": entry["images"]["hires"]}
    section.uns["spatial"] = {"is_single": np.True_, "synthetic_0": entry}
    before = section.obsm["X_histo"].copy()
    extract(section)  # "fullres" needs no factor
    np.testing.assert_array_equal(section.obsm["X_histo"], before)
    section.uns["spatial"] = {"is_single": np.True_}
    assert list(_data.read_sections(section)) == ["section"]


def test_an_image_of_a_name_of_its_own(section, extract):
    entry = entry_of(section)
    entry["images"] = {"downscaled_fullres": entry["images"]["hires"], "empty": np.array([])}
    entry["scalefactors"]["tissue_downscaled_fullres_scalef"] = "1.0"
    extract(section)
    assert section.uns["sthisto"]["features"]["X_histo"]["image"].tolist() == ["uns:downscaled_fullres"]


# --- options that would do nothing -----------------------------------------------------------------------------------


def test_options_that_the_fit_does_not_use(section, refuses):
    tl.fit(section, "idw")
    with refuses(section, ValueError, "library_key='nope': the model was fitted with one section"):
        tl.predict(section, library_key="nope")
    with refuses(section, ValueError, "features_key='nope': model 'idw' reads no image features"):
        tl.predict(section, features_key="nope")
    with refuses(section, ValueError, "features=: model 'idw' reads no image features"):
        tl.upsample(section, 2, features=np.zeros((3, 3), np.float32))
    for grid in (True, 2.5, "2"):
        with refuses(section, ValueError, "expected a whole number"):
            tl.upsample(section, grid)
    assert tl.upsample(section, 2.0).n_obs == tl.upsample(section, np.int64(2)).n_obs


def test_sites_between_the_spots_are_not_measured(section):
    tl.fit(section, "idw")
    split = tl.upsample(section, grids.Lattice.fit(section.obsm["spatial"]).split(2))
    assert not split.obs["measured"].any()  # sites of halved cells are off all spots
    refined = tl.upsample(section, 2)
    assert refined.obs["measured"].sum() == section.n_obs


def test_distances_are_known_without_features(section):
    del section.obsm["X_histo"], section.uns["sthisto"], section.obs["X_histo_settings"]
    tl.fit(section, "idw")
    assert tl.upsample(section, 2).obs["distance_um"].notna().all()


# --- stained sections ------------------------------------------------------------------------------------------------


def test_the_map_of_a_stained_section_runs_through_its_prediction(parts, encoder, extract):
    fitted, stained = parts.values()
    extract(fitted)
    extract(stained)
    for model in ("attention", "ridge"):
        tl.fit(fitted, model)
        predicted = tl.predict(stained, reference=fitted)
        dense = tl.upsample(stained, stained.obsm["spatial"], reference=fitted, encoder=encoder)
        np.testing.assert_allclose(dense.X, predicted.X, atol=1e-5)
        half = tl.upsample(stained, stained.obsm["spatial"][::2], reference=fitted, encoder=encoder)
        np.testing.assert_allclose(half.X, dense.X[::2], atol=1e-5)  # points do not depend on each other
        assert not dense.obs["measured"].any()
    predicted.obsm["spatial"] += 1  # shares nothing with the user's object
    assert not np.array_equal(predicted.obsm["spatial"], stained.obsm["spatial"])


def test_a_new_fit_forgets_what_was_tested_on_the_former(section):
    tl.fit(section, "ridge")
    tl.test_genes(section)
    assert section.var["sthisto_qvalue"].notna().all()
    tl.fit(section, "ridge", key_added="other")
    assert "sthisto_qvalue" in section.var
    tl.fit(section, "idw")
    assert not {"sthisto_pearson", "sthisto_qvalue"} & set(section.var)


# --- check -----------------------------------------------------------------------------------------------------------


def statuses(adata, **options):
    report = pp.check(adata, **options)
    return dict(zip(report["check"], report["status"], strict=True))


def test_a_section_as_it_should_be(section):
    tl.fit(section, "ridge")
    found = statuses(section)
    assert set(found.values()) == {"ok"}
    assert {"X", "array", "scale", "image", "tissue", "features X_histo", "fit sthisto"} <= set(found)


def test_each_contradiction_is_a_line(section, refuses):
    picture = entry_of(section)["images"]["hires"]
    entry_of(section)["scalefactors"]["spot_diameter_fullres"] = 500.0
    section.obsm["X_histo"] = section.obsm["X_histo"] + 1
    section.X = section.layers["counts"]
    found = statuses(section, image=sthisto.images.open_image(picture, mpp=9.0))
    assert found["spot diameter"] == found["features X_histo"] == found["scale"] == "contradictory"
    assert found["X"] == "guessed"
    white = np.full((3 * len(picture), *picture.shape[1:]), 244, np.uint8)
    white[-len(picture) :] = picture
    assert statuses(section, image=white)["tissue"] == "contradictory"
    del section.uns["spatial"]
    assert statuses(section)["image"] == "missing"


def test_the_spots_over_the_image(section):
    section.obsm["spatial"][:3] -= 5000
    [ax] = pl.spots(section, show=False)
    assert ax.get_title() == "synthetic_0: 3 of 100 spots outside the image"
    assert len(ax.collections[0].get_offsets()) == 100


# --- text, numbers and lazy tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_gene_lists_of_other_editors(tmp_path, coding):
    path = tmp_path / "genes.txt"
    path.write_text("# Größe\nregion_00\nfine_01\n", encoding=coding)
    assert names_in(str(path)) == ["region_00", "fine_01"]


def test_seeds_of_numpy(section):
    for seed in (1, np.int64(1)):
        tl.spatial_domains(section, "stagate", 3, params={"epochs": 2}, random_state=seed, key_added=f"d{type(seed)}")
    columns = [column for column in section.obs if column.startswith("d<")]
    assert section.obs[columns[0]].tolist() == section.obs[columns[1]].tolist()


def test_an_object_read_lazily(section, tmp_path):
    pytest.importorskip("xarray")
    section.write_zarr(tmp_path / "section.zarr")
    lazy = ad.experimental.read_lazy(tmp_path / "section.zarr")
    with pytest.raises(ValueError, match=r"Load it: adata = adata.to_memory\(\)"):
        tl.fit(lazy, "ridge")
