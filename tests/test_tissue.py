"""Points over the tissue of a picture that has no spots."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.spatial import KDTree

import sthisto
from sthisto.images import check_tissue, is_blank, open_image, tissue_points, tissue_share

DATA = Path(__file__).parents[2] / "shared" / "data"
PINK = (205, 130, 190)


def slide(glass=245, size=(300, 400), box=(60, 220, 80, 320)):
    """A rectangle of tissue on glass: rows and columns from, to."""
    pixels = np.full((*size, 3), glass, np.uint8)
    pixels[box[0] : box[1], box[2] : box[3]] = PINK
    return pixels


def inside(points, box=(60, 220, 80, 320)):
    x, y = points.T
    return (y >= box[0]) & (y < box[1]) & (x >= box[2]) & (x < box[3])


def all_sites(pitch, size=(300, 400)):
    rows, columns = np.indices((int(size[0] // pitch), int(size[1] // pitch))).reshape(2, -1)
    return (np.column_stack([columns, rows]) + 0.5) * pitch


@settings(max_examples=30, deadline=None)
@given(
    pitch=st.sampled_from([10.0, 17.0, 20.0, 40.0]),
    glass=st.integers(170, 255),
    scale=st.sampled_from([1.0, 0.5, 0.1]),
)
def test_points_are_the_sites_on_tissue_whatever_the_lamp_and_the_scale(pitch, glass, scale):
    points = tissue_points(open_image(slide(glass), scale=scale), pitch / scale)
    sites = all_sites(pitch)
    deep = [inside(sites + np.array([dx, dy])) for dx in (-pitch, 0, pitch) for dy in (-pitch, 0, pitch)]
    found = {tuple(np.round(point * scale / pitch, 3)) for point in points}
    assert {tuple(np.round(site / pitch, 3)) for site in sites[np.all(deep, axis=0)]} <= found
    assert found <= {tuple(np.round(site / pitch, 3)) for site in sites[np.any(deep, axis=0)]}
    assert_array_equal(points, points[np.lexsort(points.T)])  # row by row


def test_a_picture_without_glass_is_tissue_throughout():
    noise = np.random.default_rng(0).integers(-25, 25, (200, 260, 1))
    pixels = np.clip(np.array(PINK) + noise, 0, 255).astype(np.uint8)
    assert len(tissue_points(open_image(pixels), 20.0)) == 10 * 13


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: pixels[5:9].fill(20),  # the black border of a scan
        lambda pixels: pixels[250:270, 40:200].fill(130),  # a grey shadow, as of a fiducial
        lambda pixels: pixels[10:14, 10:14].__setitem__(slice(None), PINK),  # dust
    ],
    ids=["border", "shadow", "dust"],
)
def test_what_is_no_tissue_is_left_out(spoil):
    pixels = slide()
    clean = tissue_points(open_image(pixels), 10.0)
    spoil(pixels)
    assert_array_equal(tissue_points(open_image(pixels), 10.0), clean)


def test_grey_pictures_have_tissue_too():
    pixels = slide()[..., 1]
    assert inside(tissue_points(open_image(pixels), 20.0)).all()


@pytest.mark.parametrize("pitch", [0.0, -1.0, np.nan, np.inf, 301.0])
def test_a_pitch_that_is_none(pitch):
    with pytest.raises(ValueError, match="distance apart, at most the 300"):
        tissue_points(open_image(slide()), pitch)


@pytest.mark.parametrize("value", [255, 240, 0])
def test_an_empty_slide_is_refused(value):
    with pytest.raises(ValueError, match="no tissue in the image given of 400 x 300 px"):
        tissue_points(open_image(np.full((300, 400, 3), value, np.uint8)), 20.0)


def test_a_synthetic_section_is_covered_where_its_spots_are():
    adata = sthisto.datasets.synthetic(100)
    pixels = adata.uns["spatial"]["synthetic_0"]["images"]["hires"]
    points = tissue_points(open_image(pixels), 25.0)
    assert KDTree(points).query(adata.obsm["spatial"])[0].max() < 40
    assert KDTree(adata.obsm["spatial"]).query(points)[0].max() < 50  # px: a spot's pitch


@pytest.mark.parametrize("name", ["MOB1", "MOB2", "C2"])
def test_real_sections_are_covered_where_their_spots_are(name):
    folder = DATA / ("mob" if name.startswith("MOB") else "her2st")
    if not folder.exists():
        pytest.skip("the real sections are not here")
    spots = ad.read_h5ad(folder / f"{name}.h5ad").obsm["spatial"]
    pitch = sthisto.grids.spacing(spots)
    points = tissue_points(open_image(folder / f"{name}.jpg"), pitch / 2)
    assert (KDTree(points).query(spots)[0] < 0.75 * pitch).mean() > 0.98
    assert (KDTree(spots).query(points)[0] < pitch * 1.2).mean() > 0.98


@pytest.mark.parametrize("value", [0, 128, 255])
def test_one_color_is_blank_whatever_its_form(value):
    pixels = np.full((60, 80, 3), value, np.uint8)
    noisy = np.clip(pixels + np.random.default_rng(0).integers(-3, 4, pixels.shape), 0, 255).astype(np.uint8)
    opaque = np.dstack([pixels, np.full((60, 80), 255, np.uint8)])
    assert all(is_blank(open_image(image)) for image in (pixels, opaque, pixels / 255, noisy))
    pixels[20:40, 20:40] = 180
    assert not is_blank(open_image(pixels))


def test_share_of_points_on_tissue():
    pixels = np.full((300, 400, 3), 244, np.uint8)
    pixels[:, :200] = [180, 110, 170]
    image = open_image(pixels)
    xy = np.column_stack([np.linspace(5, 395, 40), np.full(40, 150.0)])
    assert tissue_share(image, xy) == pytest.approx(0.5, abs=0.03)
    assert tissue_share(image, xy + np.array([200, 0])) < 0.03
    assert tissue_share(image, [[-50, 10], [100, 10]]) == 0.5


def test_points_of_another_place_of_the_image_are_doubted():
    """Counted from the bottom or the right, in micrometers, of another image; and not where all is well."""
    pixels = np.full((600, 800, 3), 244, np.uint8)
    pixels[40:300, 60:400] = [180, 110, 170]
    image = open_image(pixels)
    x, y = np.meshgrid(np.arange(80, 380, 20.0), np.arange(60, 280, 20.0))
    xy = np.column_stack([x.ravel(), y.ravel()])
    assert check_tissue(image, xy, 0.5) == ""
    assert "with y counted from the bottom" in check_tissue(image, xy * [1, -1] + [0, 600])
    assert "with x counted from the right" in check_tissue(image, xy * [-1, 1] + [800, 0])
    assert "with coordinates in micrometers turned into pixels" in check_tissue(image, xy * 0.4, 0.4)
    assert check_tissue(image, xy * 0.4) == ""
    assert check_tissue(image, xy + np.array([300, 200])).startswith("3% of the points are on tissue, which covers 19%")
    assert check_tissue(open_image(np.full((300, 400, 3), [180, 110, 170], np.uint8)), xy) == ""  # tissue throughout


def test_checks_of_a_large_array_are_cheap(monkeypatch):
    pixels = np.full((4100, 6000, 3), 244, np.uint8)
    pixels[:2000] = [180, 110, 170]
    image = open_image(pixels)
    seen = []
    read = type(image).read
    monkeypatch.setattr(type(image), "read", lambda self, level, *box: (seen.append(box), read(self, level, *box))[1])
    assert tissue_share(image, [[3000, 1000], [3000, 3000]]) == 0.5
    assert not is_blank(image)
    assert sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in seen) < pixels.shape[0] * pixels.shape[1] / 8
