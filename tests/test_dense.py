"""Dense features against sums over the picture by hand; one pass a tile; no border shows; glass is not worth a pass."""

import anndata
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sthisto import images, pp, tl
from sthisto.encoders._encode import DenseTiles, Tiling, encode

few = settings(deadline=None, max_examples=30)
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (150, 170, 3), np.uint8)


class Blocks:
    """Tokens that are the mean color of their own pixels: what a window ought to hold can be said without tiles."""

    name, input_size, stride, patch_um, dim, token_dim = "blocks", 32, 4, 64.0, 3, 3

    def __init__(self, context=0.0):
        self.context = context  # how much of the whole tile's color a token has: a network's tokens know their tile
        self.passes = 0

    def tokens(self, patches):
        self.passes += len(patches)
        side = self.input_size // self.stride
        own = patches.reshape(len(patches), side, self.stride, side, self.stride, 3).mean(axis=(2, 4))
        return (own + self.context * own.mean(axis=(1, 2), keepdims=True)).astype(np.float32)

    def __call__(self, patches):
        return self.tokens(patches).mean(axis=(1, 2))


def opened(picture=PICTURE):
    return images.open_image(picture, mpp=2.0)


def window_means(picture, xy, window, stride):
    """Mean over each window of the picture made of blocks, white beyond the border; pixel by pixel."""
    extrapolated = 20 * stride
    height, width = (-(-side // stride) * stride for side in picture.shape[:2])
    padded = np.full((height + 2 * extrapolated, width + 2 * extrapolated, 3), 255.0)
    padded[extrapolated : extrapolated + picture.shape[0], extrapolated : extrapolated + picture.shape[1]] = picture
    rows, columns = (side // stride for side in padded.shape[:2])
    blocks = padded.reshape(rows, stride, columns, stride, 3).mean(axis=(1, 3))
    flat = blocks.repeat(stride, 0).repeat(stride, 1)
    means = []
    for x, y in xy + extrapolated:
        inside = [
            np.clip(np.minimum(c + window / 2, np.arange(n) + 1) - np.maximum(c - window / 2, np.arange(n)), 0, None)
            for c, n in ((y, len(flat)), (x, flat.shape[1]))
        ]
        means.append(np.einsum("i,j,ijc->c", *inside, flat) / window**2)
    return np.array(means)


places = st.lists(st.tuples(st.floats(-20, 190), st.floats(-20, 170)), min_size=1, max_size=6, unique=True)


@given(places, st.floats(0.5, 50))
@few
def test_a_point_has_the_mean_of_its_window(xy, window):
    xy = np.array(xy)
    found = encode(opened(), xy, 32.0, Blocks(), window=window, batch_size=3)
    assert_allclose(found, window_means(PICTURE, xy, window, 4), atol=0.02)


@given(
    st.integers(1, 28),
    st.integers(1, 16),
    st.floats(10, 5000),
    st.floats(0.01, 2),
    st.lists(st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)), min_size=1, max_size=5),
)
@few
def test_weights_of_all_tiles_add_up_to_1(tokens, stride, side, share, xy):
    tiling = Tiling(side, share * side, tokens * stride, stride)
    points = np.array(xy)
    tiles, readers, which = tiling.reads(points)
    total = np.zeros(len(points))
    for k, tile in enumerate(tiles):
        weights = tiling.weights(points[readers[which == k]], tile)
        assert weights.max(initial=0) > 0
        np.add.at(total, readers[which == k], weights.sum(axis=1))
    assert_allclose(total, 1, atol=1e-4)


def test_a_patch_and_its_window_agree():
    """A window as large as the patch, on whole tokens, holds the tokens that the patch's mean is over."""
    xy = np.array([[32.0, 40.0], [60.0, 100.0], [80.0, 72.0], [4.0, 4.0]])
    assert_allclose(encode(opened(), xy, 32.0, Blocks(), window=32.0), encode(opened(), xy, 32.0, Blocks()), atol=1e-4)


def test_a_tile_and_its_patch_agree_where_tiles_do_not_overlap():
    """Also with tokens that know their tile: then no other tile has a say."""

    class Coarse(Blocks):
        stride = 16  # 2 x 2 tokens, which leave nothing to share

    encoder = Coarse(context=0.5)
    tiling = Tiling(32.0, 32.0, 32, 16)
    assert tiling.overlap == 0
    xy = tiling.centers(np.array([[0, 0], [1, 2], [3, 1]]))
    assert_allclose(encode(opened(), xy, 32.0, encoder, window=32.0), encode(opened(), xy, 32.0, encoder), atol=1e-4)


def test_features_do_not_depend_on_the_other_points():
    xy = RNG.uniform(0, 150, (300, 2))
    together = encode(opened(), xy, 32.0, Blocks(0.5), window=10.0)
    for rows in (slice(0, 1), slice(7, 90), RNG.permutation(300)):
        assert_allclose(encode(opened(), xy[rows], 32.0, Blocks(0.5), window=10.0), together[rows], rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_border_of_a_tile_shows(axis):
    """A walk uphill over several tiles whose tokens know the whole tile's height, 24 more from one to the next."""
    slope = np.arange(40, 210, dtype=np.uint8)
    hill = np.broadcast_to(slope if axis == 0 else slope[:, None], (170, 170))
    walk = np.full((401, 2), 70.0)
    walk[:, axis] = np.linspace(30, 130, 401)
    steps = np.diff(encode(opened(hill), walk, 32.0, Blocks(context=1.0), window=4.0)[:, 0]) / 0.25
    assert steps.min() > 0
    assert steps.max() < 1 + 24 / 8 + 0.1  # the hill's own, and a change of tile spread over the overlap of 8 pixels
    assert_allclose(steps.mean(), 2, rtol=0.1)


def test_tiles_cost_one_pass_each_however_many_points():
    encoder = Blocks()
    dense = np.stack(np.meshgrid(np.arange(20, 140, 1.0), np.arange(20, 130, 1.0)), axis=-1).reshape(-1, 2)
    encode(opened(), dense, 32.0, encoder, window=16.0, batch_size=7)
    tiles, _, _ = Tiling(32.0, 16.0, 32, 4).reads(dense)
    assert encoder.passes == len(tiles) == len(np.unique(tiles, axis=0)) == 7 * 6
    assert encoder.passes < len(dense) / 50


def test_tiles_that_no_point_needs_are_not_read():
    encoder = Blocks()
    encode(opened(), np.array([[12.0, 12.0]]), 32.0, encoder, window=4.0)  # inside a tile and in none of its overlaps
    assert encoder.passes == 1


def test_a_finer_picture_gives_the_same_features():
    fine = np.kron(PICTURE, np.ones((2, 2, 1), np.uint8))
    xy = RNG.uniform(20, 130, (20, 2))
    low = encode(opened(), xy, 32.0, Blocks(), window=10.0)
    assert_allclose(encode(images.open_image(fine), 2 * xy, 64.0, Blocks(), window=20.0), low, atol=0.5)


def test_order_of_visit_and_batches_do_not_matter():
    stored = zarr.create_array({}, data=PICTURE, chunks=(64, 50, 3))
    xy = RNG.uniform(0, 150, (200, 2))
    whole = encode(opened(), xy, 32.0, Blocks(0.5), window=10.0)
    for picture, size in ((stored, 1), (stored, 1000), (PICTURE, 5)):
        assert_allclose(encode(opened(picture), xy, 32.0, Blocks(0.5), window=10.0, batch_size=size), whole, rtol=1e-5)


def test_glass_is_not_worth_a_pass():
    slide = np.clip(RNG.normal([220, 207, 224], 2, (300, 300, 3)), 0, 255).astype(np.uint8)
    slide[:100, :100] = RNG.integers(0, 256, (100, 100, 3), np.uint8)
    xy = np.array([[50.0, 50.0], [200.0, 250.0], [98.0, 60.0]])
    encoder = Blocks()
    tiling = Tiling(32.0, 16.0, 32, 4)
    work = DenseTiles(opened(slide), xy, tiling, encoder, 4)
    features = np.zeros((3, 3), np.float32)
    assert [done for done, _ in work.steps(features, 0)][-1] == work.total
    assert 0 < work.n_background < work.total
    assert encoder.passes == work.total - work.n_background + 1  # one flat tile stands for all glass of one color
    assert_allclose(features[1], [220, 207, 224], atol=4.1)
    assert_allclose(features[[0, 2]], window_means(slide, xy[[0, 2]], 16.0, 4), atol=4)


def test_pale_tissue_and_dark_plain_tissue_are_no_glass():
    pale = np.clip(RNG.normal(225, 9, (150, 170, 3)), 0, 255).astype(np.uint8)
    for picture in (pale, np.full_like(PICTURE, 150)):
        encoder = Blocks()
        work = DenseTiles(opened(picture), np.array([[75.0, 75.0]]), Tiling(32.0, 16.0, 32, 4), encoder, 4)
        list(work.steps(np.zeros((1, 3), np.float32), 0))
        assert (work.n_background, encoder.passes) == (0, work.total)


def test_no_points():
    assert encode(opened(), np.empty((0, 2)), 32.0, Blocks(), window=10.0).shape == (0, 3)


@pytest.mark.parametrize("shape", [(1, 8, 8, 2), (1, 7, 8, 3), (1, 64, 3), (2, 8, 8, 3)])
def test_tokens_of_another_shape_are_refused(shape):
    class Wrong(Blocks):
        def tokens(self, patches):
            return np.zeros(shape, np.float32)

    with pytest.raises(ValueError, match=r"'blocks' gave tokens of shape .* for 1 patches; expected \(1, 8, 8, 3\)"):
        encode(opened(), np.array([[12.0, 12.0]]), 32.0, Wrong(), window=4.0)


# --- through the public verbs -----------------------------------------------------------------------------------------


def test_dense_features_of_spots(section):
    pp.extract_features(section, Blocks(), dense=True, window_um=40.0, key_added="X_dense")
    record = section.uns["sthisto"]["features"]["X_dense"]
    assert (record["dense"], record["window_um"], record["patch_um"]) == (True, 40.0, 64.0)
    picture = images.open_image(section.uns["spatial"]["synthetic_0"]["images"]["hires"])
    um = record["mpp"][0]
    by_hand = encode(picture, section.obsm["spatial"], 64.0 / um, Blocks(), window=40.0 / um)
    assert_array_equal(section.obsm["X_dense"], by_hand, strict=True)


def test_the_window_is_half_the_patch_where_nothing_is_said(section):
    for options in ({}, {"window_um": 24.0}):
        pp.extract_features(section, Blocks(), dense=True, patch_um=48.0, **options)
        assert section.uns["sthisto"]["features"]["X_histo"]["window_um"] == 24.0
    pp.extract_features(section, Blocks())
    assert "window_um" not in section.uns["sthisto"]["features"]["X_histo"]


def test_upsample_reads_the_same_tokens(section, tmp_path):
    """A point at a spot has the spot's features, hence its prediction, after a trip through a file too."""
    pp.extract_features(section, Blocks(0.5), dense=True)
    tl.fit(section, "ridge")
    tl.predict(section)
    section.write_h5ad(tmp_path / "section.h5ad")
    for fitted in (section, anndata.read_h5ad(tmp_path / "section.h5ad")):
        encoder = Blocks(0.5)
        dense = tl.upsample(fitted, section.obsm["spatial"], encoder=encoder)
        modelled = section.layers["sthisto"][:, section.var["sthisto_modelled"]]
        assert_allclose(dense.X, modelled, rtol=1e-4, atol=1e-5)
    fine = tl.upsample(section, 8, encoder=encoder)
    assert encoder.passes < fine.n_obs


def test_what_dense_refuses(section, encoder, refuses):
    with refuses(section, ValueError, "dense=True needs an encoder with tokens .*'colors' has none. Set"):
        pp.extract_features(section, encoder, dense=True)
    with refuses(section, ValueError, "'handcrafted' has none"):
        pp.extract_features(section, dense=True)
    for window in (0.0, -1.0, np.nan, np.inf):
        with refuses(section, ValueError, "window_um=.*: the side of the window in um is positive"):
            pp.extract_features(section, Blocks(), dense=True, window_um=window)
    with refuses(section, ValueError, "window_um=9 is for dense=True"):
        pp.extract_features(section, Blocks(), window_um=9.0)
