"""Slides of scanners, read by OpenSlide behind the same record as every image."""

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from sthisto.images import open_image, patch_batches, sample_patches
from sthisto.images._slides import open_slide

DATA = Path(__file__).parents[2] / "shared" / "data" / "slides"
openslide = pytest.importorskip("openslide")


def over_white(picture):
    """RGB of a region, by hand."""
    pixels = np.asarray(picture).astype(int)
    alpha = pixels[..., 3:]
    return (pixels[..., :3] * alpha + (255 - alpha) * 255 + 127) // 255


def smooth(height, width):
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([across % 256, down % 256, (across + down) // 8 % 256], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    """A slide of Trestle's kind, which OpenSlide knows by its software tag: three levels of JPEG tiles."""
    path = tmp_path_factory.mktemp("slides") / "slide.tif"
    pixels = smooth(2048, 3072)
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            file.write(
                pixels[::step, ::step],
                photometric="rgb",
                tile=(256, 256),
                compression="jpeg",
                software="MedScan",
                description="Background Color=ffffff;OverlapsXY= 0 0 0 0 0 0;Objective Power=20",
                resolution=(20000, 20000),
                resolutionunit="centimeter",
                metadata=None,
            )
    return path


def opened(path):
    """The image that OpenSlide gives, whatever the suffix."""
    from sthisto.images._image import Image  # noqa: PLC0415

    levels, stated = open_slide(path)
    scales = tuple(level.shape[0] / levels[0].shape[0] for level in levels)
    return Image(tuple(levels), scales, stated["mpp"], str(path))


def test_every_level_has_the_pixels_of_openslide(pyramid):
    slide, image = openslide.OpenSlide(pyramid), opened(pyramid)
    assert len(image.levels) == slide.level_count == 3
    assert image.shape == (2048, 3072)
    for level, (width, height) in enumerate(slide.level_dimensions):
        expected = over_white(slide.read_region((0, 0), level, (width, height)))
        np.testing.assert_array_equal(image.read(level, 0, height, 0, width), expected)
        corner = tuple(int(100 * slide.level_downsamples[level]) for _ in "xy")
        part = over_white(slide.read_region(corner, level, (60, 50)))
        np.testing.assert_array_equal(image.read(level, 100, 150, 100, 160), part)


def test_patches_come_from_the_level_that_has_the_detail(pyramid):
    image, slide = opened(pyramid), openslide.OpenSlide(pyramid)
    for level, step in enumerate((1, 2, 4)):
        [patch] = sample_patches(image, [[1024, 1024]], 128 * step, 128)
        corner = (1024 - 64 * step, 1024 - 64 * step)
        np.testing.assert_array_equal(patch, over_white(slide.read_region(corner, level, (128, 128))))


def test_memory_holds_a_band_and_not_the_slide(pyramid):
    image = opened(pyramid)
    xy = np.stack(np.meshgrid(np.arange(50, 3072, 100), np.arange(50, 2048, 100)), axis=-1).reshape(-1, 2)
    tracemalloc.start()
    for _ in patch_batches(image, xy, 100, 50):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3072 * 2048 * 3


def test_the_real_aperio_slide_is_the_same_by_both_readers():
    path = DATA / "CMU-1-Small-Region.svs"
    if not path.exists():
        pytest.skip("no real slides here")
    ours, theirs = open_image(path), opened(path)
    assert ours.mpp == theirs.mpp == 0.499
    assert ours.shape == theirs.shape == (2967, 2220)
    for level in range(len(theirs.levels)):
        height, width = theirs.levels[level].shape[:2]
        difference = np.abs(ours.read(level, 0, height, 0, width).astype(int) - theirs.read(level, 0, height, 0, width))
        assert difference.max() <= 3  # of two JPEG decoders
        assert difference.mean() < 0.1


def test_a_dicom_slide(tmp_path):
    """A real one, which lacks the type of its image: it is refused as it is, and read with the type put in."""
    source = DATA / "small.dcm"
    if not source.exists():
        pytest.skip("no real slides here")
    with pytest.raises(
        ValueError, match=r"small\.dcm: OpenSlide does not read this slide \(.*Couldn't get image flavor"
    ):
        open_image(source)
    content, kind = source.read_bytes(), b"ORIGINAL\\PRIMARY\\VOLUME\\NONE"
    at = content.index(b"\x08\x00\x16\x00UI")  # elements are sorted: (0008,0008) stands before (0008,0016)
    element = b"\x08\x00\x08\x00CS" + len(kind + b" ").to_bytes(2, "little") + kind + b" "
    (tmp_path / "slide.dcm").write_bytes(content[:at] + element + content[at:])
    image, slide = open_image(tmp_path / "slide.dcm"), openslide.OpenSlide(tmp_path / "slide.dcm")
    assert image.shape == (2638, 3236)
    assert image.mpp is None
    assert len(image.levels) == slide.level_count
    for level, (width, height) in enumerate(slide.level_dimensions):
        expected = over_white(slide.read_region((0, 0), level, (width, height)))
        np.testing.assert_array_equal(image.read(level, 0, height, 0, width), expected)
    [patch] = sample_patches(image, [[1000, 1000]], 224, 224)
    np.testing.assert_array_equal(patch, over_white(slide.read_region((888, 888), 0, (224, 224))))


def test_what_openslide_cannot_read_says_why(tmp_path):
    (tmp_path / "slide.mrxs").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"slide\.mrxs: OpenSlide does not read this slide \(.*\); convert"):
        open_image(tmp_path / "slide.mrxs")


@pytest.mark.parametrize("suffix", [".mrxs", ".ndpi", ".scn", ".dcm", ".vsi"])
def test_without_openslide_the_extra_is_named(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"slide{suffix}"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(ImportError, match=r"needs OpenSlide, which is missing: .*pip install 'sthisto\[slides\]'"):
        open_image(path)
