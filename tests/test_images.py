"""Pictures of every kind come out as the same RGB, and patches are what stands around a point."""

import contextlib
import gc
import os
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import anndata
import dask.array as da
import imagecodecs
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import map_coordinates
from skimage.data import immunohistochemistry
from skimage.measure import block_reduce
from skimage.transform import resize

from sthisto.images import Image, _image, _patches, check_scale, open_image, patch_batches, sample_patches

DATA = Path(__file__).parents[2] / "shared" / "data"
HEIGHT, WIDTH = 170, 130
few = settings(deadline=None, max_examples=25)


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    """Pixels without any structure, the same at every call."""
    rng = np.random.default_rng(0)
    return rng.random(shape) if dtype is float else rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


class Stored:
    """A chunked array that makes its pixels when asked and keeps account of the chunks that it had to decode."""

    dtype = np.dtype(np.uint8)

    def __init__(self, shape: tuple[int, int], chunks: tuple[int, int]):
        self.shape, self.chunks = (*shape, 3), (*chunks, 3)
        self.decoded: Counter[tuple[int, int]] = Counter()
        self.largest = 0

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        touched = [range(k.start // c, -(-k.stop // c)) for k, c in zip(key, self.chunks[:2], strict=True)]
        self.decoded.update((i, j) for i in touched[0] for j in touched[1])
        rows, columns = (np.arange(k.start, k.stop) for k in key)
        self.largest = max(self.largest, len(rows) * len(columns))
        value = (rows * 7 % 251).astype(np.uint8)[:, None] + (columns * 3 % 241).astype(np.uint8)
        return np.stack([value, value ^ 1, value ^ 2], axis=-1)

    def whole(self) -> np.ndarray:
        pixels = self[0 : self.shape[0], 0 : self.shape[1]]
        self.decoded.clear()
        self.largest = 0
        return pixels


# --- what a picture's numbers mean


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[True, False]]), [255, 0]),
        (np.array([[0.0, 0.5, 1.0]]), [0, 128, 255]),
        (np.array([[0.0, 1.0]], np.float16), [0, 255]),
        (np.array([[0, 128, 129, 65535]], np.uint16), [0, 0, 1, 255]),
        (np.array([[0, 128, 129, 65535]], ">u2"), [0, 0, 1, 255]),
        (np.arange(6, dtype=np.uint8).reshape(1, 6, 1), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_grey_of_any_type_is_eight_bits_three_times(pixels, expected):
    seen = open_image(pixels).read(0, 0, 1, 0, pixels.shape[1])
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen[0], np.repeat(expected, 3).reshape(-1, 3))


def test_sixteen_bits_are_divided_by_257_and_rounded():
    every = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(open_image(every).read(0, 0, 256, 0, 256)[..., 1], np.rint(every / 257))


@pytest.mark.parametrize(("channels", "mode"), [(2, "LA"), (4, "RGBA")])
def test_alpha_is_composited_over_white(channels, mode):
    pixels = noise(40, 50, channels)
    picture = PIL.Image.fromarray(pixels, mode) if mode == "LA" else PIL.Image.fromarray(pixels)
    white = PIL.Image.new("RGBA", picture.size, "white")
    expected = np.asarray(PIL.Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))
    seen = open_image(pixels).read(0, 0, 40, 0, 50)
    np.testing.assert_allclose(seen.astype(int), expected.astype(int), atol=1)
    np.testing.assert_array_equal(seen[pixels[..., -1] == 255], expected[pixels[..., -1] == 255])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_may_come_first(channels):
    pixels = noise(20, 30, channels)
    first = open_image(np.moveaxis(pixels, -1, 0))
    assert first.shape == (20, 30)
    np.testing.assert_array_equal(first.read(0, 3, 22, -2, 9), open_image(pixels).read(0, 3, 22, -2, 9))


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.zeros((4, 5), np.int64), "found int64"),
        (np.zeros((5, 6, 7), np.uint8), r"found an array of shape \(5, 6, 7\)"),
        (np.zeros((2, 50, 60), np.uint8), r"found an array of shape \(2, 50, 60\)"),
        (np.zeros(4, np.uint8), r"found an array of shape \(4,\)"),
        (np.zeros((0, 4), np.uint8), r"found an array of shape \(0, 4\)"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(pixels, problem):
    with pytest.raises(ValueError, match=problem):
        open_image(pixels)


@pytest.mark.parametrize("wrong", [-0.01, 1.01, np.nan])
def test_floats_outside_0_1_are_refused(wrong):
    pixels = np.full((4, 5), 0.5)
    pixels[2, 3] = wrong
    image = open_image(pixels)
    assert image.read(0, 0, 2, 0, 5).max() == 128  # the rule looks at what is read, and only refuses
    with pytest.raises(ValueError, match=r"be in \[0, 1\]"):
        image.read(0, 0, 4, 0, 5)


# --- the record


@given(st.integers(-30, 200), st.integers(0, 60), st.integers(-30, 160), st.integers(0, 60))
@few
def test_reading_is_slicing_a_picture_with_a_white_frame(y, height, x, width):
    pixels = noise(HEIGHT, WIDTH, 3)
    framed = np.pad(pixels, ((60, 100), (60, 100), (0, 0)), constant_values=255)
    seen = open_image(pixels).read(0, y, y + height, x, x + width)
    np.testing.assert_array_equal(seen, framed[60 + y : 60 + y + height, 60 + x : 60 + x + width])


def test_reading_hands_out_a_copy():
    pixels = noise(10, 10, 3)
    seen = open_image(pixels).read(0, 0, 10, 0, 10)
    seen[:] = 0
    assert pixels.any()


@pytest.mark.parametrize(
    ("levels", "scales", "mpp", "problem"),
    [
        (1, (), None, "1 levels, 0 scales"),
        (0, (), None, "0 levels"),
        (1, (0.0,), None, "scale has to be a positive number"),
        (1, (np.nan,), None, "scale has to be a positive number"),
        (1, (1.0,), -1.0, "mpp has to be a positive number"),
    ],
)
def test_a_record_that_cannot_be_is_refused(levels, scales, mpp, problem):
    with pytest.raises(ValueError, match=problem):
        Image((noise(4, 4),) * levels, scales, mpp, "")


def test_levels_come_finest_first_and_show_the_same():
    with pytest.raises(ValueError, match="finest first"):
        open_image([noise(10, 10), noise(20, 20)])
    with pytest.raises(ValueError, match="differ in proportion"):
        open_image([noise(100, 100), noise(50, 25)])


@pytest.mark.parametrize("max_side", [17, 64, 129])
@pytest.mark.parametrize("chunks", [None, (50, 130, 3)])
def test_thumbnail_by_bands_is_pillows_of_the_whole(max_side, chunks):
    pixels = noise(HEIGHT, WIDTH, 3)
    stored = pixels if chunks is None else zarr.array(pixels, chunks=chunks)
    with mock.patch.object(_image, "MIN_BLOCK", 16):
        seen, scale = open_image(stored, scale=0.5).thumbnail(max_side)
    size = round(WIDTH * max_side / HEIGHT), max_side
    expected = PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(seen, expected)
    assert scale == max_side / (HEIGHT / 0.5)


def test_thumbnail_is_never_larger_than_the_picture():
    pixels = noise(30, 20, 3)
    seen, scale = open_image(pixels, scale=0.1).thumbnail()
    np.testing.assert_array_equal(seen, pixels)
    assert scale == 0.1
    with pytest.raises(ValueError, match="at least 1; found 0"):
        open_image(pixels).thumbnail(0)


def test_thumbnail_reads_each_chunk_once_and_few_at_a_time():
    stored = Stored((3000, 900), (256, 256))
    open_image(stored).thumbnail(100)
    assert set(stored.decoded.values()) == {1}
    assert stored.largest == 512 * 900


def test_thumbnail_takes_a_coarse_level():
    fine, coarse = Stored((2000, 1000), (500, 500)), Stored((500, 250), (500, 500))
    seen, scale = open_image([fine, coarse]).thumbnail(250)
    assert seen.shape == (250, 125, 3)
    assert scale == 0.125
    assert not fine.decoded


# --- patches


@given(st.integers(1, 40), st.data())
@few
def test_a_patch_on_whole_pixels_is_the_slice_white_beyond_the_border(side, data):
    pixels = noise(HEIGHT, WIDTH, 3)
    x, y = (data.draw(st.integers(-30, edge)) for edge in (WIDTH, HEIGHT))
    framed = np.pad(pixels, ((80, 80), (80, 80), (0, 0)), constant_values=255)
    patch = sample_patches(open_image(pixels), [[x + side / 2, y + side / 2]], side, side)[0]
    np.testing.assert_array_equal(patch, framed[80 + y : 80 + y + side, 80 + x : 80 + x + side])


sixteenths = st.integers(-200, 16 * HEIGHT).map(lambda k: k / 16)  # places on, half-way between and off whole pixels


def moved(centre: float, side: float, grain: float) -> float:
    """Where the square around a point begins: on the nearest multiple of the grain."""
    return grain * np.floor((centre - side / 2) / grain + 0.5 + 1e-6)


@given(sixteenths, sixteenths, st.integers(2, 30), st.integers(1, 3))
@few
def test_growing_is_bilinear(x, y, side, growth):
    grey = noise(HEIGHT, WIDTH)
    patch = sample_patches(open_image(grey), [[x, y]], side, side * growth)[0, ..., 0]
    steps = (np.arange(side * growth) + 0.5) / growth - 0.5  # the centre of pixel i is i + 0.5
    framed = np.pad(grey, 60, constant_values=255).astype(float)
    at = np.meshgrid(*(60 + moved(centre, side, 1 / growth) + steps for centre in (y, x)), indexing="ij")
    np.testing.assert_allclose(patch, map_coordinates(framed, at, order=1), atol=1.01)


@given(sixteenths, sixteenths, st.floats(1, 120), st.integers(1, 40))
@few
def test_a_point_anywhere_moves_by_half_a_pixel_of_the_patch_at_most(x, y, side, input_size):
    """A ramp shows where the patch was cut, to the depth of its 8 bits."""
    ramp = np.add.outer(np.zeros(600), np.arange(600) // 4).astype(np.uint8)
    image = open_image([np.repeat(ramp[..., None], 3, axis=2)])
    patch = sample_patches(image, [[200 + x, 200 + y]], side, input_size)[0, ..., 0]
    centres = 200 + x + ((np.arange(input_size) + 0.5) / input_size - 0.5) * side
    shown = 4 * patch.mean(axis=0) + 2
    assert np.abs(shown - centres).max() <= side / input_size / 2 + 4


@pytest.mark.parametrize("side", [12, 24, 48, 96])
def test_where_a_point_lies_in_its_pixel_does_not_show(side):
    """At the patch's own scale a filter blurs between pixels and not on them, which features would notice."""
    image = open_image(noise(HEIGHT, WIDTH))
    offsets = np.stack(np.meshgrid(*[np.arange(8) / 8] * 2), axis=-1).reshape(-1, 2)
    sharpness = sample_patches(image, 60 + offsets, side, 12)[..., 0].std(axis=(1, 2))
    assert len(np.unique(sharpness)) <= 4  # those of the next pixel
    whole = sample_patches(image, [[60, 60], [60.5, 60]], side, 24)[..., 0].std(axis=(1, 2))
    assert whole.max() < 1.25 * whole.min()


def triangle(start: float, side: float, input_size: int, length: int) -> np.ndarray:
    """(field, length) weights by which pixels at 0.5, 1.5, ... make another row: linear, as wide as the reduction."""
    step = side / input_size
    centres = start + (np.arange(input_size) + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(step, 1), 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@given(sixteenths, sixteenths, st.floats(20, 79), st.integers(1, 20))
@few
def test_shrinking_is_antialiased(x, y, side, input_size):
    """First blocks from the picture's corner are averaged, then the triangle does the rest."""
    grey, frame = noise(HEIGHT, WIDTH), 192
    reduction = 2 ** int(np.log2(side / input_size)) if side > input_size else 1
    patch = sample_patches(open_image(grey), [[x, y]], side, input_size)[0, ..., 0]
    ends = [(frame, frame + -length % 64) for length in grey.shape]
    framed = np.pad(grey, ends, constant_values=255).astype(float)
    framed = np.pad(framed, ((0, frame), (0, frame)), constant_values=255)
    reduced = np.rint(block_reduce(framed, (reduction, reduction), np.mean))
    grain = min(1.0, side / input_size / reduction)
    down, across = (
        triangle(
            frame / reduction + moved(centre / reduction, side / reduction, grain), side / reduction, input_size, length
        )
        for centre, length in zip((y, x), reduced.shape, strict=True)
    )
    np.testing.assert_allclose(patch, down @ reduced @ across.T, atol=2)  # halves round either way, in three steps


def test_a_photograph_shrinks_as_scikit_image_has_it():
    """Another filter (Gaussian, then cubic or linear), hence close and not equal: no shift, no change of contrast."""
    picture = immunohistochemistry()  # 512 x 512
    patch = sample_patches(open_image(picture), [[256, 256]], 512, 128)[0].astype(float)
    expected = resize(picture, (128, 128), order=1, anti_aliasing=True, preserve_range=True)
    inner = np.s_[2:-2, 2:-2]
    assert np.abs(patch - expected)[inner].mean() < 2.2
    assert np.abs(np.roll(patch, 1, axis=1) - expected)[inner].mean() > 8


@given(sixteenths, sixteenths, st.integers(1, 20), st.sampled_from([1 / 3, 0.5, 1, 2, 4]))
@few
def test_patches_fit_together_without_a_seam(x, y, input_size, step):
    half = input_size * step  # in whole pixels of the patch or of the picture, to which patches move
    image = open_image(noise(HEIGHT, WIDTH, 3))
    whole = sample_patches(image, [[x, y]], 2 * half, 2 * input_size)[0]
    quarters = sample_patches(
        image, np.array([x, y]) + np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * half / 2, half, input_size
    )
    rows = [np.concatenate([quarters[k], quarters[k + 1]], axis=1) for k in (0, 2)]
    np.testing.assert_allclose(whole.astype(int), np.concatenate(rows).astype(int), atol=1)


@pytest.mark.parametrize(
    ("side", "input_size", "taken"),
    [(100, 101, 0), (100, 100, 0), (100, 51, 0), (100, 50, 1), (100, 26, 1), (100, 25, 2), (100, 1, 2), (100, 400, 0)],
)
def test_the_coarsest_level_with_the_detail_is_taken(side, input_size, taken):
    levels = [np.full((400 // k, 600 // k), 10 * k, np.uint8) for k in (1, 2, 4)]
    patch = sample_patches(open_image(levels), [[300, 200]], side, input_size)
    assert (patch == 10 * 2**taken).all()


def test_scale_turns_full_resolution_into_stored_pixels():
    pixels = noise(HEIGHT, WIDTH, 3)
    image = open_image(pixels, scale=0.25)
    assert image.shape == (HEIGHT * 4, WIDTH * 4)
    patch = sample_patches(image, [[40 * 4, 60 * 4]], 80, 20)[0]
    np.testing.assert_array_equal(patch, pixels[50:70, 30:50])


def test_levels_of_odd_size_stay_in_register():
    """A level of 650 pixels made from 1301 is half as fine, not 650 / 1301."""
    levels = [noise(1301, 999, 3), noise(650, 499, 3), noise(325, 250, 3)]
    assert open_image(levels, scale=0.5).scales == (0.5, 0.25, 0.125)
    fitted = open_image([noise(1000, 800), noise(300, 240)])
    assert fitted.scales == pytest.approx((1, 0.3))


def write_tiff(path: Path, pixels: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, pixels, **({"photometric": "rgb", "metadata": None} | options))
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One picture, stored in every way."""
    folder = tmp_path_factory.mktemp("stored")
    pixels = noise(HEIGHT, WIDTH, 3)
    tile = {"tile": (16, 32), "compression": "zlib"}
    zarr.create_array(folder / "v2.zarr", data=pixels, chunks=(40, 50, 3), zarr_format=2)
    sources = {
        "zarr": zarr.array(pixels, chunks=(33, 20, 3)),
        "zarr folder": folder / "v2.zarr",
        "zarr, channels first": zarr.array(pixels.transpose(2, 0, 1), chunks=(1, 64, 64)),
        "dask, odd chunks": da.from_array(pixels, chunks=((100, 1, 69), (13, 117), 3)),
        "tiles": write_tiff(folder / "tiles.tif", pixels, bigtiff=True, **tile),
        "strips": str(write_tiff(folder / "strips.tif", pixels, rowsperstrip=7, compression="lzw")),
        "planes": write_tiff(folder / "planes.tif", pixels.transpose(2, 0, 1), planarconfig="separate", **tile),
        "raw": write_tiff(folder / "raw.tif", pixels),
        "16 bit, big-endian": write_tiff(folder / "wide.tif", pixels.astype(np.uint16) * 257, byteorder=">", **tile),
        "pages": write_tiff(folder / "page.tif", pixels.transpose(2, 0, 1), photometric="minisblack", metadata={}),
        "png": folder / "picture.png",
    }
    PIL.Image.fromarray(pixels).save(folder / "picture.png")
    return open_image(pixels), {name: open_image(source) for name, source in sources.items()}


@given(
    arrays(float, st.tuples(st.integers(1, 8), st.just(2)), elements=st.floats(-50, 200)),
    st.floats(1, 120),
    st.integers(1, 40),
)
@settings(deadline=None, max_examples=10)
def test_what_is_stored_and_what_is_in_memory_agree_to_the_bit(stored, xy, side, input_size):
    in_memory, others = stored
    expected = sample_patches(in_memory, xy, side, input_size)
    with mock.patch.object(_image, "MIN_BLOCK", 32):
        for name, image in others.items():
            np.testing.assert_array_equal(sample_patches(image, xy, side, input_size), expected, err_msg=name)


@given(st.permutations(range(40)), st.integers(1, 50))
@few
def test_order_and_batch_size_do_not_matter(order, batch_size):
    image = open_image(zarr.array(noise(HEIGHT, WIDTH, 3), chunks=(64, 64, 3)))
    xy = np.random.default_rng(1).uniform(-10, HEIGHT, (40, 2))
    expected = sample_patches(image, xy, 30.5, 12)
    np.testing.assert_array_equal(sample_patches(image, xy[order], 30.5, 12), expected[order])
    batches = list(patch_batches(image, xy, 30.5, 12, batch_size=batch_size))
    assert [len(rows) for rows, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    rows = np.concatenate([rows for rows, _ in batches])
    np.testing.assert_array_equal(np.sort(rows), np.arange(40))
    np.testing.assert_array_equal(np.concatenate([patches for _, patches in batches]), expected[rows])


@pytest.mark.parametrize("chunks", [(256, 256), (7, 1800), (1024, 700), (3000, 1)])
@pytest.mark.parametrize("side", [40, 900])
def test_every_chunk_is_decoded_once(chunks, side):
    stored = Stored((2500, 1800), chunks)
    xy = np.random.default_rng(2).uniform(-60, 2600, (60, 2))
    patches = sample_patches(open_image(stored), xy, side, 20)
    assert set(stored.decoded.values()) == {1}
    np.testing.assert_array_equal(patches, sample_patches(open_image(stored.whole()), xy, side, 20))


def test_memory_holds_a_band_and_not_the_picture():
    stored = Stored((12000, 2000), (4, 2000))  # 72 MB of pixels
    xy = np.random.default_rng(3).uniform(0, 1, (400, 2)) * (2000, 12000)
    tracemalloc.start()
    for _ in patch_batches(open_image(stored), xy, 100, 20):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(stored.decoded.values()) == {1}
    assert peak < 20e6  # two bands are 6 MB, making one takes 3 times as much


def test_large_squares_are_not_all_held_at_once():
    read, resample = _patches._read, _patches.resized
    held: list[int] = []
    with (
        mock.patch.object(_patches, "_IN_FLIGHT", 2**23),
        mock.patch.object(_patches, "_read", lambda *how: (read(*how), held.append(1))[0]),
        mock.patch.object(_patches, "resized", lambda *how: (resample(*how), held.append(-1))[0]),
    ):
        sample_patches(open_image(noise(1000, 1000)), np.full((24, 2), 500.0), 1000, 600)  # 24 x 4 MB
    assert len(held) == 48
    assert np.cumsum(held).max() == 2


def test_no_points_give_no_patches():
    image = open_image(noise(10, 10, 3))
    assert sample_patches(image, np.empty((0, 2)), 4, 4).shape == (0, 4, 4, 3)
    assert list(patch_batches(image, np.empty((0, 2)), 4, 4)) == []


@pytest.mark.parametrize(
    ("xy", "options", "problem"),
    [
        ([1, 2], {}, r"found an array of shape \(2,\)"),
        ([[1, 2, 3]], {}, r"found an array of shape \(1, 3\)"),
        ([[1, np.nan], [1, 2]], {}, "1 of 2 points is not finite"),
        ([[1, 2]], {"side": 0}, "side has to be positive; found 0"),
        ([[1, 2]], {"side": np.nan}, "side has to be positive; found nan"),
        ([[1, 2]], {"input_size": -1}, "input_size has to be positive; found -1"),
        ([[1, 2]], {"batch_size": 0}, "batch_size has to be positive; found 0"),
    ],
)
def test_wrong_requests_are_refused_at_the_call(xy, options, problem):
    with pytest.raises(ValueError, match=problem):
        patch_batches(open_image(noise(10, 10, 3)), xy, **({"side": 4, "input_size": 4} | options))


# --- files


def whole(image: Image) -> np.ndarray:
    height, width = _image.level_size(image.levels[0])
    return image.read(0, 0, height, 0, width)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_is_rgb(tmp_path, mode):
    picture = PIL.Image.fromarray(noise(40, 30, 4)).convert("RGB" if mode in "1P" else "RGBA").convert(mode)
    picture.save(tmp_path / "picture.png")
    white = PIL.Image.new("RGBA", picture.size, "white")
    expected = PIL.Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    seen = whole(open_image(tmp_path / "picture.png"))
    np.testing.assert_allclose(seen.astype(int), np.asarray(expected).astype(int), atol=1 if "A" in mode else 0)


def test_transparent_palette_entries_are_white(tmp_path):
    picture = PIL.Image.fromarray(noise(8, 8)).quantize(4)
    picture.save(tmp_path / "picture.png", transparency=2)
    seen = whole(open_image(tmp_path / "picture.png"))
    assert (seen[np.asarray(picture) == 2] == 255).all()
    assert (seen[np.asarray(picture) == 1] != 255).any()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_png_of_16_bits_keeps_to_the_rule(tmp_path, channels):
    pixels = noise(30, 20, *channels, dtype=np.uint16)
    imagecodecs.imwrite(tmp_path / "deep.png", pixels)
    np.testing.assert_array_equal(whole(open_image(tmp_path / "deep.png")), whole(open_image(pixels)))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_as_stored_whatever_exif_says(tmp_path, mode):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    PIL.Image.fromarray(noise(40, 30, 3)).convert(mode).save(tmp_path / "picture.jpg", exif=exif)
    with PIL.Image.open(tmp_path / "picture.jpg") as stored:
        expected = np.asarray(stored.convert("RGB"))
    image = open_image(str(tmp_path / "picture.jpg"))
    assert (image.shape, image.mpp, image.source) == ((40, 30), None, str(tmp_path / "picture.jpg"))
    np.testing.assert_array_equal(whole(image), expected)


def test_slides_beyond_pillows_limit_open_without_a_warning(tmp_path):
    side = int((2.1 * PIL.Image.MAX_IMAGE_PIXELS) ** 0.5)
    PIL.Image.new("1", (side, side)).save(tmp_path / "slide.png")
    assert open_image(tmp_path / "slide.png").shape == (side, side)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK"])
def test_tiff_that_is_neither_grey_nor_rgb_becomes_rgb(tmp_path, mode):
    picture = PIL.Image.fromarray(noise(40, 30, 3)).convert(mode)
    picture.save(tmp_path / "picture.tif")
    np.testing.assert_array_equal(whole(open_image(tmp_path / "picture.tif")), picture.convert("RGB"))


def test_white_is_zero_tiff_is_turned_round(tmp_path):
    grey = noise(40, 30)
    write_tiff(tmp_path / "picture.tif", grey, photometric="miniswhite")
    np.testing.assert_array_equal(whole(open_image(tmp_path / "picture.tif"))[..., 0], 255 - grey)


def test_jpeg_tiles_come_as_rgb(tmp_path):
    across, down = np.meshgrid(np.arange(128, dtype=np.uint8), np.arange(128, dtype=np.uint8))
    smooth = np.stack([across, down, np.full_like(across, 200)], axis=-1)
    path = write_tiff(tmp_path / "slide.tif", smooth, tile=(64, 64), compression="jpeg")
    np.testing.assert_allclose(whole(open_image(path)).astype(int), smooth, atol=8)


def test_aperios_ycbcr_is_left_to_openslide(tmp_path, monkeypatch):
    """Its colors would be wrong here. (OpenSlide finds no Aperio slide in this file, either.)"""
    path = write_tiff(tmp_path / "slide.svs", noise(32, 32, 3), tile=(16, 16), compression="jpeg2000")
    assert open_image(path).shape == (32, 32)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(33003)
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r"slide.svs: .* needs OpenSlide.*sthisto\[slides\]"):
        open_image(path)


def test_tiles_left_out_are_glass(tmp_path):
    tile = noise(16, 16, 3)
    options = {"shape": (32, 32, 3), "dtype": np.uint8, "tile": (16, 16), "compression": "zlib"}
    path = write_tiff(tmp_path / "sparse.tif", iter([tile, None, None, tile]), **options)
    seen = whole(open_image(path))
    np.testing.assert_array_equal(seen[16:, 16:], tile)
    assert (seen[:16, 16:] == 255).all()


@pytest.mark.parametrize("sub", [True, False])
def test_pyramids_of_both_kinds(tmp_path, sub):
    pixels = noise(301, 259, 3)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib", "metadata": None}
        file.write(pixels, subifds=2 if sub else 0, **options)
        for k in (2, 4):
            file.write(pixels[: 301 // k * k : k, : 259 // k * k : k], subfiletype=1, **options)
    image = open_image(tmp_path / "slide.tif", scale=2)
    assert image.scales == (2, 1, 0.5)
    np.testing.assert_array_equal(image.read(2, 0, 75, 0, 64), pixels[:300:4, :256:4])


def test_plain_pixels_are_mapped_only_while_they_are_copied(tmp_path):
    """Else all that was ever read of a file of any size would count as memory of the process."""
    pixels = noise(3000, 2000, 3)
    tifffile.imwrite(tmp_path / "plain.tif", pixels, photometric="rgb")
    image = open_image(tmp_path / "plain.tif")
    for top in range(0, 3000, 500):
        np.testing.assert_array_equal(image.read(0, top, top + 500, 0, 2000), pixels[top : top + 500])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("what is mapped can be told on Linux")
    assert "plain.tif" not in maps.read_text()


def test_the_largest_picture_of_a_file_is_the_slide(tmp_path):
    pixels = noise(100, 90, 3)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(np.zeros((20, 50, 3), np.uint8), photometric="rgb", metadata=None)  # a label
        file.write(pixels, photometric="rgb", metadata=None)
    np.testing.assert_array_equal(whole(open_image(tmp_path / "slide.tif")), pixels)


OME = {"ome": True, "metadata": {"axes": "YXS"}}


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        (OME | {"metadata": {"PhysicalSizeX": 0.3}}, 0.3),
        (OME | {"metadata": {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}}, 0.5),
        (OME | {"metadata": {"PhysicalSizeX": 7, "PhysicalSizeXUnit": "pixel"}}, None),
        ({"description": "Aperio Image Library\n|AppMag = 20|MPP = 0.4990|Left = 3"}, 0.499),
        ({"resolution": (20000, 20000), "resolutionunit": "centimeter"}, 0.5),
        ({"resolution": (25400, 25400), "resolutionunit": "inch"}, 1.0),
        ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
        ({"resolution": (2, 2), "resolutionunit": "none"}, None),
        ({"resolution": (4, 4), "imagej": True, "metadata": {"unit": "um"}}, 0.25),
        (OME | {"metadata": {"PhysicalSizeX": "0,5"}}, 0.5),
        (OME | {"metadata": {"PhysicalSizeX": "0.0"}, "resolution": (20000, 20000), "resolutionunit": 3}, 0.5),
        (OME | {"metadata": {"PhysicalSizeX": "none"}}, None),
        ({"description": "Aperio Image Library\n|AppMag = 40|MPP = 0,2500|Left = 3"}, 0.25),
        ({"description": "Aperio Image Library\n|MPP = 1,500000"}, 1.5),
        ({"description": "Aperio Image Library\n|MPP = 0"}, None),
        ({}, None),
    ],
)
def test_the_pixel_size_a_tiff_states_is_of_its_own_pixels(tmp_path, options, mpp):
    path = write_tiff(tmp_path / "slide.tif", noise(32, 32, 3), **options)
    assert open_image(path).mpp == pytest.approx(mpp)
    assert open_image(path, scale=0.1).mpp == pytest.approx(None if mpp is None else mpp * 0.1)
    assert open_image(path, scale=0.1, mpp=0.7).mpp == 0.7


def depth_tags(bits):
    """Extra tags of a TIFF: its largest sample value is the white of so many bits."""
    return [(341, "H", 1, 2**bits - 1, True)]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("stated", ["tag", "ome", "values", "array"])
def test_white_of_16_bit_pixels_is_that_of_their_significant_bits(tmp_path, caplog, bits, stated):
    eight = noise(64, 64, 3)
    eight[0, 0] = 255
    pixels = np.rint(eight / 255 * (2**bits - 1)).astype(np.uint16)
    options = {
        "tag": {"extratags": depth_tags(bits)},
        "ome": OME | {"metadata": {"axes": "YXS", "SignificantBits": bits}},
    }
    path = write_tiff(tmp_path / "slide.tif", pixels, tile=(32, 32), **options.get(stated, {}))
    image = open_image(pixels if stated == "array" else path)
    assert np.abs(whole(image).astype(int) - eight).max() == 0
    guessed = stated in {"values", "array"} and bits < 16
    assert ("is taken for white" in caplog.text) == guessed


def test_white_of_packed_bits_is_that_of_the_file(tmp_path):
    """A scan of 4 bits per sample: white is 15."""
    PIL.Image.new("1", (9, 9), 1).save(tmp_path / "one.tif")
    assert (whole(open_image(tmp_path / "one.tif")) == 255).all()
    path = write_tiff(tmp_path / "four.tif", np.full((32, 32), 255, np.uint8), photometric="minisblack")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["BitsPerSample"].overwrite(4)
        file.pages[0].tags["StripByteCounts"].overwrite(512)
    image = open_image(path)
    assert image.white == 15
    assert (whole(image) == 255).all()


@pytest.mark.parametrize(
    ("extra", "last", "alpha"),
    [
        (1, "any", "premultiplied"),
        (2, "any", "straight"),
        (0, "any", "none"),
        (None, "any", "none"),
        (None, "mask", "straight"),
    ],
)
@pytest.mark.parametrize("tiled", [False, True])
def test_a_fourth_sample_is_alpha_where_the_file_or_its_values_say_so(tmp_path, caplog, extra, last, alpha, tiled):
    pixels = noise(64, 64, 4)
    pixels[:32, :, 3] = 0
    if last == "mask":
        pixels[32:, :, 3] = 255
    given = {} if extra is None else {"extrasamples": [extra]}
    path = write_tiff(tmp_path / "slide.tif", pixels, **({"tile": (32, 32)} if tiled else {}), **given)
    if extra is None:
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags["ExtraSamples"].overwrite(0)
    color, a = pixels[..., :3].astype(int), pixels[..., 3:].astype(int)
    expected = {
        "none": color,
        "straight": (color * a + 127) // 255 + 255 - a,
        "premultiplied": np.minimum(color + 255 - a, 255),
    }[alpha]
    np.testing.assert_array_equal(whole(open_image(path)), expected)
    assert ("does not state what its last sample is" in caplog.text) == (extra in {0, None})


def test_a_mask_is_not_taken_for_the_slide(tmp_path, caplog):
    """Neither a larger one of the same file nor one that is alone, by its name."""
    pixels, mask = noise(100, 90, 3), np.zeros((300, 270), np.uint16)
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif") as file:
        file.write(mask, photometric="minisblack", metadata={"Name": "cells"})
        file.write(pixels, photometric="rgb", metadata={"Name": "H&E"})
    np.testing.assert_array_equal(whole(open_image(tmp_path / "slide.ome.tif")), pixels)
    assert "'H&E' is taken for the slide, not the larger 'cells'" in caplog.text
    write_tiff(tmp_path / "mask.ome.tif", mask, photometric="minisblack", metadata={"Name": "Nuclei mask"})
    with pytest.raises(ValueError, match="its only image is 'Nuclei mask', by its name no slide"):
        open_image(tmp_path / "mask.ome.tif")


@pytest.mark.parametrize("compression", [1, 5, 8])
@pytest.mark.parametrize(("width", "height"), [(2**31, 2**31), (100, 4 * 10**9), (4 * 10**9, 4)])
@pytest.mark.parametrize("rows", [1, None])
def test_headers_that_announce_more_than_there_is_are_refused_at_once(tmp_path, compression, width, height, rows):
    path = write_tiff(tmp_path / "slide.tif", noise(32, 32), photometric="minisblack")
    with tifffile.TiffFile(path, mode="r+") as file:
        tags = {"ImageWidth": width, "ImageLength": height, "Compression": compression, "RowsPerStrip": rows or height}
        for name, value in tags.items():
            file.pages[0].tags[name].overwrite(value, dtype="I" if name != "Compression" else "H")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"slide\.tif .*(damaged|truncated|max_pixels)"):
        open_image(path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_images_to_be_decoded_whole_are_limited(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    PIL.Image.new("RGB", (300, 200)).save(path, **({"compression": "tiff_lzw"} if suffix == ".tif" else {}))
    with tifffile.TiffFile(path) if suffix == ".tif" else contextlib.nullcontext() as file:
        rows = file.pages[0].rowsperstrip if file else 200
    with pytest.raises(ValueError, match=rf"300 x {rows} pixels .* max_pixels is {300 * rows - 1}"):
        open_image(path, max_pixels=300 * rows - 1)
    assert open_image(path, max_pixels=300 * rows).shape == (200, 300)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "slide.tif")
    with pytest.raises(ValueError, match=r"slide\.tif is neither a file nor a folder"):
        open_image(tmp_path / "slide.tif")


def test_tensors_and_containers_are_images():
    pixels = noise(40, 30, 3)
    for tensor in (torch.tensor(pixels), torch.tensor(pixels).permute(2, 0, 1), torch.tensor(pixels / 255)):
        np.testing.assert_array_equal(whole(open_image(tensor)), pixels)
    data = xr.Dataset({"image": (("y", "x", "z", "channels"), pixels[:, :, None])}, attrs={"scale": 0.5})
    container = SimpleNamespace(data=data)  # as squidpy's ImageContainer has it
    image = open_image(container)
    np.testing.assert_array_equal(whole(image), pixels)
    assert image.scales == (0.5,)
    two = SimpleNamespace(data=data.assign(mask=data["image"]))
    with pytest.raises(ValueError, match=r"found \['image', 'mask'\]. Pass one of them, source\[name\]"):
        open_image(two)
    np.testing.assert_array_equal(whole(open_image(two.data["image"])), pixels)  # what the message advises
    with pytest.raises(TypeError, match="found dict"):
        open_image({"image": pixels})


def test_a_damaged_ome_description_costs_the_pixel_size_only(tmp_path, caplog):
    path = write_tiff(tmp_path / "slide.tif", noise(32, 32, 3), description="<OME><Image></OME>")
    assert open_image(path).mpp is None
    assert "OME description is damaged" in caplog.text


def test_a_tiff_is_closed_when_its_last_level_goes(tmp_path, monkeypatch):
    closed = []
    close = tifffile.TiffFile.close
    monkeypatch.setattr(tifffile.TiffFile, "close", lambda file: (closed.append(file.filename), close(file)))
    image = open_image(write_tiff(tmp_path / "slide.tif", noise(64, 64, 3), tile=(16, 16)))
    level = image.levels[0]
    del image
    gc.collect()
    assert not closed
    np.testing.assert_array_equal(level[:, :], noise(64, 64, 3))
    del level
    gc.collect()  # a file left open would warn here
    assert closed == ["slide.tif"]


def damaged(path: Path, how: str) -> Path:
    """A small picture of the kind that the suffix says, cut short or full of wrong bytes."""
    pixels = noise(200, 200, 3)
    if path.suffix == ".tif":
        write_tiff(path, pixels, tile=(64, 64), compression="zlib")
    else:
        PIL.Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "start": content[:40]}[how])
    return path


@pytest.mark.parametrize("how", ["half", "start"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_truncated_files_are_refused_at_once(tmp_path, suffix, how):
    with pytest.raises(ValueError, match=r"picture.*(truncated|could not be read)"):
        open_image(damaged(tmp_path / f"picture{suffix}", how))


def test_damage_inside_a_tiff_says_where(tmp_path):
    path = write_tiff(tmp_path / "slide.tif", noise(64, 64, 3), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[3]
    content = bytearray(path.read_bytes())
    content[start : start + 500] = bytes(500)
    path.write_bytes(content)
    image = open_image(path)
    np.testing.assert_array_equal(image.read(0, 0, 32, 0, 64), noise(64, 64, 3)[:32])
    with pytest.raises(OSError, match=r"rows 32 to 64, columns 32 to 64, level 0 of .*slide\.tif"):
        image.read(0, 32, 64, 32, 64)


def test_files_that_are_no_pictures_say_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("plain")
    (tmp_path / "slide.mrxs").write_bytes(b"\xff\xd8\xff")
    write_tiff(tmp_path / "stack.tif", noise(5, 20, 20), photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(
        FileNotFoundError, match=r"No image at .*missing\.tif; .* holds notes\.txt, slide\.mrxs, stack\.tif"
    ):
        open_image(tmp_path / "missing.tif")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_image(tmp_path / "nowhere" / "missing.tif")
    with pytest.raises(ValueError, match=r"notes\.txt starts with b'plain'"):
        open_image(tmp_path / "notes.txt")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r"slide.mrxs: .* needs OpenSlide.*sthisto\[slides\]"):
        open_image(tmp_path / "slide.mrxs")
    with pytest.raises(ValueError, match="one plane is wanted; found axes ZYX"):
        open_image(tmp_path / "stack.tif")
    with pytest.raises(ValueError, match="no zarr array or group"):
        open_image(tmp_path)


def ome_zarr(path: Path, *, version: str, axes: str, unit: str | None = "micrometer") -> np.ndarray:
    """An OME-Zarr image of two levels with 0.5 um pixels; its pixels, channels first."""
    pixels = noise(3, 40, 60)
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for k in (1, 2):
        expand = tuple(slice(None) if axis in "cyx" else None for axis in axes)
        group.create_array(str(k), data=pixels[:, ::k, ::k][expand])
        scale = [0.5 * k if axis in "yx" else 1 for axis in axes]
        datasets.append({"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    named = [{"name": axis} | ({"type": "space", "unit": unit} if unit and axis in "yx" else {}) for axis in axes]
    entry = {"multiscales": [{"axes": named, "datasets": datasets}]}
    group.attrs.update({"ome": entry | {"version": version}} if version == "0.5" else entry)
    return pixels


@pytest.mark.parametrize(
    ("version", "axes", "unit", "mpp"),
    [("0.4", "tczyx", "micrometer", 0.5), ("0.5", "cyx", "nanometer", 0.0005), ("0.5", "czyx", None, None)],
)
def test_ome_zarr(tmp_path, version, axes, unit, mpp):
    pixels = ome_zarr(tmp_path / "slide.zarr", version=version, axes=axes, unit=unit)
    image = open_image(tmp_path / "slide.zarr", scale=2)
    assert image.scales == (2, 1)
    assert image.mpp == (None if mpp is None else pytest.approx(mpp * 2))
    np.testing.assert_array_equal(image.read(1, 0, 20, 0, 30), np.moveaxis(pixels[:, ::2, ::2], 0, -1))


def test_a_stack_in_ome_zarr_is_refused(tmp_path):
    ome_zarr(tmp_path / "slide.zarr", version="0.4", axes="cyx")
    attributes = zarr.open_group(tmp_path / "slide.zarr", mode="a").attrs
    multiscales = attributes["multiscales"]
    multiscales[0]["axes"][0]["name"] = "z"
    attributes["multiscales"] = multiscales
    with pytest.raises(ValueError, match=r"One plane is wanted; found axes \['z', 'y', 'x'\] of shape \(3, 40, 60\)"):
        open_image(tmp_path / "slide.zarr")


def test_a_zarr_group_that_is_no_image_says_what_it_holds(tmp_path):
    ome_zarr(tmp_path / "sdata.zarr" / "images", version="0.4", axes="cyx")
    zarr.open_group(tmp_path / "sdata.zarr", mode="a", zarr_format=2)
    with pytest.raises(ValueError, match=r"Give the path of the image in it, of \['images'\]"):
        open_image(tmp_path / "sdata.zarr")


# --- arrays


def test_xarray_says_its_axes_by_name():
    pixels = noise(40, 30, 3)
    array = xr.DataArray(pixels.transpose(2, 0, 1)[None], dims=("z", "c", "y", "x"))
    np.testing.assert_array_equal(whole(open_image(array)), pixels)
    np.testing.assert_array_equal(whole(open_image(array[0, 0])), pixels[..., [0, 0, 0]])
    two = xr.DataArray(noise(2, 40, 30), dims=("c", "y", "x"))  # grey and alpha, which a bare (2, h, w) cannot say
    np.testing.assert_array_equal(whole(open_image(two)), whole(open_image(np.moveaxis(two.data, 0, -1))))
    with pytest.raises(ValueError, match=r"found \{'z': 2, 'y': 40, 'x': 30\}"):
        open_image(two.rename(c="z"))
    with pytest.raises(ValueError, match=r"found \{'c': 2, 'row': 40, 'x': 30\}"):
        open_image(two.rename(y="row"))


def test_multiscale_trees_and_lists():
    pixels = noise(3, 40, 60)
    levels = [xr.DataArray(pixels[:, ::k, ::k], dims=("c", "y", "x"), name="image") for k in (1, 2, 4)]
    tree = xr.DataTree.from_dict({f"scale{k}": level.to_dataset() for k, level in enumerate(levels)})
    for source in (tree, levels, tuple(level.data for level in levels)):
        image = open_image(source, scale=0.5)
        assert image.scales == (0.5, 0.25, 0.125)
        np.testing.assert_array_equal(image.read(2, 0, 10, 0, 15), np.moveaxis(pixels[:, ::4, ::4], 0, -1))
    with pytest.raises(ValueError, match=r"one image; found \['a', 'b'\]"):
        open_image(xr.Dataset({"a": levels[0], "b": levels[0]}))


def test_an_image_is_returned_as_it_is():
    image = open_image(noise(10, 10, 3), scale=0.5, mpp=0.3)
    assert open_image(image) is image
    assert (image.source, image.mpp) == ("", 0.3)
    assert open_image(image, mpp=0.4).mpp == 0.4
    with pytest.raises(ValueError, match=r"scale=0\.1 would contradict"):
        open_image(image, scale=0.1)


def test_what_is_neither_path_nor_array_is_refused():
    with pytest.raises(TypeError, match="found dict"):
        open_image({})


# --- whether points belong to the picture

TISSUE = np.full((300, 500, 3), 240, np.uint8)
TISSUE[20:80, 100:450] = (150, 90, 160)
ON_TISSUE = np.stack(np.meshgrid(np.linspace(110, 290, 10), np.linspace(25, 75, 6)), axis=-1).reshape(-1, 2)


def test_points_in_and_just_outside_the_picture_pass():
    image = open_image(TISSUE, scale=0.5)
    check_scale(image, ON_TISSUE * 2)
    check_scale(image, [[-9.9, -5.9], [1009.9, 605.9]])
    check_scale(image, np.empty((0, 2)))
    with pytest.raises(
        ValueError, match=r"1 of 2 points are outside .* 1000 wide and 600 high .* at scale 0\.5: x is -11 to"
    ):
        check_scale(image, [[-11, 0], [10, 10]])


def test_row_column_is_recognised_by_the_border():
    with pytest.raises(ValueError, match=r"1 of 2 points .* seems? to be \(row, column\)"):
        check_scale(open_image(TISSUE), [[250, 450], [10, 10]])


def test_row_column_is_recognised_by_the_tissue():
    image = open_image(TISSUE)
    check_scale(image, ON_TISSUE)
    with pytest.raises(ValueError, match=r"^0% of the points are on tissue, but 100% .* seems? to be \(row, column\)"):
        check_scale(image, ON_TISSUE[:, ::-1])


def test_doubtful_tissue_is_no_reason_to_refuse():
    left = np.full((300, 300, 3), 240, np.uint8)
    left[:, :150] = (150, 90, 160)
    here, there = [[50, 60]], [[200, 60]]  # on tissue as given; on tissue only when exchanged
    check_scale(open_image(left), here * 10 + there * 10)
    with pytest.raises(ValueError, match=r"^48% of the points are on tissue, but 100%"):
        check_scale(open_image(left), here * 10 + there * 11)
    black = np.where(left == 240, np.uint8(0), left)  # what scanners fill in is no tissue either
    with pytest.raises(ValueError, match=r"^48% of the points are on tissue, but 100%"):
        check_scale(open_image(black), here * 10 + there * 11)
    check_scale(open_image(np.zeros_like(left)), there * 10)


def test_points_of_a_larger_copy_are_recognised():
    with pytest.raises(ValueError, match=r"60 of 60 points .* scale=.* tissue_hires_scalef\), at most 0\.172"):
        check_scale(open_image(TISSUE), ON_TISSUE * 10)


def test_a_few_stray_points_are_no_matter_of_scale():
    with pytest.raises(ValueError, match=r"1 of 61 points .* was the image cropped\?"):
        check_scale(open_image(TISSUE), np.concatenate([ON_TISSUE, [[490, 600]]]))


# --- real sections


def section(name: str) -> tuple[Path, np.ndarray]:
    path = DATA / f"{name}.jpg"
    if not path.exists():
        pytest.skip(f"real sections are not here ({path.name})")
    return path, np.asarray(anndata.read_h5ad(path.with_suffix(".h5ad"), backed="r").obsm["spatial"], float)


def test_patches_of_a_real_section_show_tissue():
    path, xy = section("mob/MOB1")
    image = open_image(path)
    check_scale(image, xy)
    patches = sample_patches(image, np.floor(xy) + 0.5, 31, 31)
    x, y = np.floor(xy[7]).astype(int)
    np.testing.assert_array_equal(patches[7], whole(image)[y - 15 : y + 16, x - 15 : x + 16])
    assert patches.mean() < image.thumbnail(100)[0].mean() - 20  # tissue is darker than the slide at large
    shown = patches.mean(axis=(0, 1, 2))
    assert shown[1] < min(shown[0], shown[2])  # pink and violet: green is what stains take away


def test_a_slide_of_92_megapixels_opens():
    path, xy = section("her2st/C2")
    image = open_image(path)
    assert image.shape == (9911, 9274)
    check_scale(image, xy)
    with pytest.raises(ValueError, match="are outside the image"):
        check_scale(open_image(image.thumbnail(500)[0]), xy)
