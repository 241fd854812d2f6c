"""Nuclei of images: where they are, how large, and whatever the scale, the tiles and the container."""

import anndata
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.spatial import cKDTree

import sthisto
from sthisto.images import _nuclei, find_nuclei, open_image

PINK, PURPLE = np.array([225, 150, 190]), np.array([70, 40, 120])


def stained(centers, axes=(8.0, 8.0), size=(400, 500)):
    """Ellipses of half axes along x and y, pixels, in pink tissue."""
    y, x = np.indices(size) + 0.5
    pixels = np.broadcast_to(PINK, (*size, 3)).copy()
    for cx, cy in centers:
        pixels[((x - cx) / axes[0]) ** 2 + ((y - cy) / axes[1]) ** 2 < 1] = PURPLE
    return pixels.astype(np.uint8)


CENTERS = np.array([[60.0, 50.0], [250.0, 60.0], [440.0, 90.0], [100.0, 300.0], [260.0, 220.0], [400.0, 340.0]])


def in_order(xy):
    return xy[np.lexsort(np.round(xy).T)]


def test_position_area_roundness_and_stain():
    nuclei = find_nuclei(open_image(stained(CENTERS)), 0.5)
    assert_allclose(in_order(nuclei.xy), in_order(CENTERS), atol=0.3)
    assert_allclose(nuclei.area_um2, np.pi * 8**2 * 0.25, rtol=0.06)
    assert_allclose(nuclei.roundness, 1, atol=0.06)
    stain = _nuclei.hematoxylin(np.array([[PURPLE]], np.uint8))[0, 0]
    assert_allclose(nuclei.hematoxylin, stain, rtol=0.1)
    spindles = find_nuclei(open_image(stained(CENTERS, (14.0, 5.0))), 0.5)
    assert_allclose(spindles.roundness, 5 / 14, atol=0.06)


def test_touching_nuclei_are_split_and_a_spindle_is_not():
    pair = np.array([[200.0, 200.0], [214.0, 200.0]])
    assert_allclose(in_order(find_nuclei(open_image(stained(pair)), 0.5).xy), in_order(pair), atol=1.0)
    assert len(find_nuclei(open_image(stained(CENTERS, (18.0, 6.0))), 0.5)) == len(CENTERS)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_finer_image_gives_the_same_nuclei(factor):
    pixels = stained(CENTERS)
    fine = open_image(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    coarse, found = find_nuclei(open_image(pixels), 0.5), find_nuclei(fine, 0.5 / factor)
    assert_allclose(found.xy / factor, coarse.xy, atol=0.5)
    assert_allclose(found.area_um2, coarse.area_um2, rtol=0.1)


def test_a_smaller_copy_counts_in_full_resolution_pixels():
    small = find_nuclei(open_image(stained(CENTERS), scale=0.25), 0.125)
    assert_allclose(in_order(small.xy / 4), in_order(CENTERS), atol=0.3)


@pytest.mark.parametrize("tile", [97, 150, 1024])
def test_tiles_do_not_show(monkeypatch, tile):
    pixels = sthisto.datasets.synthetic(20, mpp=1.0).uns["spatial"]["synthetic_0"]["images"]["hires"]
    whole = find_nuclei(open_image(pixels), 1.0)
    monkeypatch.setattr(_nuclei, "TILE", tile)
    tiled = find_nuclei(open_image(pixels), 1.0)
    assert len(whole) > 100
    assert_allclose(in_order(tiled.xy), in_order(whole.xy), atol=1e-9)


def test_nothing_but_nuclei_of_the_right_size_near_the_points():
    pixels = stained(CENTERS)
    pixels[200:203, 50:53] = PURPLE  # a speck
    assert len(find_nuclei(open_image(pixels), 0.5)) == len(CENTERS)
    assert len(find_nuclei(open_image(pixels), 0.5, min_area_um2=60)) == 0
    assert len(find_nuclei(open_image(pixels), 0.5, max_area_um2=40)) == 0
    near = find_nuclei(open_image(pixels), 0.5, near=CENTERS[:1] + 3, max_distance=10.0)
    assert_allclose(near.xy, CENTERS[:1], atol=0.3)


@pytest.mark.parametrize(
    ("mpp", "options", "message"),
    [
        (1.5, {}, r"1\.5 um per pixel, where a nucleus of 6 um has 4\.0 across.*full-resolution image"),
        (np.nan, {}, "nan um per pixel"),
        (0.5, {"min_area_um2": 50, "max_area_um2": 20}, "min_area_um2=50 and max_area_um2=20"),
    ],
)
def test_what_shows_no_nuclei_is_refused(mpp, options, message):
    with pytest.raises(ValueError, match=message):
        find_nuclei(open_image(stained(CENTERS)), mpp, **options)


def test_an_image_without_stain_is_refused():
    yellow = np.full((300, 300, 3), [240, 235, 60], np.uint8)
    with pytest.raises(ValueError, match="no hematoxylin"):
        find_nuclei(open_image(yellow), 0.5)


def test_most_nuclei_of_a_synthetic_section_are_found_where_they_are():
    adata = sthisto.datasets.synthetic(60, mpp=0.5)
    truth = adata.uns["synthetic"]["nuclei"]["synthetic_0"]
    truth = truth[cKDTree(adata.obsm["spatial"]).query(truth)[0] < 150]
    found = sthisto.pp.find_nuclei(adata).obsm["spatial"]
    apart = truth[cKDTree(truth).query(truth, k=2)[0][:, 1] > 16]  # 8 um: nuclei are strewn over each other
    assert (cKDTree(found).query(apart)[0] < 6).mean() > 0.8
    assert (cKDTree(adata.uns["synthetic"]["nuclei"]["synthetic_0"]).query(found)[0] < 8).mean() > 0.9


# --- the verb --------------------------------------------------------------------------------------------------------


def test_an_anndata_of_nuclei(refuses):
    adata = sthisto.datasets.synthetic(30, mpp=1.0)
    nuclei = sthisto.pp.find_nuclei(adata)
    assert nuclei.n_vars == 0
    assert list(nuclei.obs) == ["area_um2", "roundness", "hematoxylin"]
    distance = cKDTree(adata.obsm["spatial"]).query(nuclei.obsm["spatial"])[0]
    assert 50 < distance.max() <= 100  # the pitch
    diameter = nuclei.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"]
    assert_allclose(np.pi * diameter**2 / 4, np.median(nuclei.obs["area_um2"]), rtol=1e-5)
    assert adata.uns["spatial"]["synthetic_0"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(55)
    assert sthisto.pp.find_nuclei(adata, max_distance=20).n_obs < nuclei.n_obs
    with refuses(adata, ValueError, "no nuclei of 399 to 400 square um near the spots of section 'synthetic_0'"):
        sthisto.pp.find_nuclei(adata, min_area_um2=399.0)
    with refuses(adata, KeyError, "no column 'slice'"):
        sthisto.pp.find_nuclei(adata, library_key="slice")
    coarse = sthisto.datasets.synthetic(30, mpp=2.0)
    with refuses(coarse, ValueError, "2 um per pixel"):
        sthisto.pp.find_nuclei(coarse)


def test_the_image_of_the_features_is_taken(tmp_path):
    adata = sthisto.datasets.synthetic(30, mpp=1.0)
    expected = sthisto.pp.find_nuclei(adata).obsm["spatial"]
    Image.fromarray(adata.uns["spatial"].pop("synthetic_0")["images"]["hires"]).save(tmp_path / "full.png")
    sthisto.pp.extract_features(adata, image=tmp_path / "full.png", mpp=1.0)
    adata.uns["spatial"] = {}  # without any image of its own
    assert_array_equal(sthisto.pp.find_nuclei(adata).obsm["spatial"], expected)


def test_several_sections_and_files(tmp_path):
    adata = sthisto.datasets.synthetic(20, n_sections=2, mpp=1.0)
    nuclei = sthisto.pp.find_nuclei(adata, library_key="library")
    assert nuclei.obs["library"].cat.categories.tolist() == ["synthetic_0", "synthetic_1"]
    nuclei.write_h5ad(tmp_path / "nuclei.h5ad")
    again = anndata.read_h5ad(tmp_path / "nuclei.h5ad")
    assert_array_equal(again.obsm["spatial"], nuclei.obsm["spatial"])
    alone = sthisto.pp.find_nuclei(adata[adata.obs["library"] == "synthetic_1"].copy(), library_key="library")
    assert_array_equal(alone.obsm["spatial"], nuclei[nuclei.obs["library"] == "synthetic_1"].obsm["spatial"])
