"""Reading overlaps encoding; features are those of patches cut by hand; images that are too small."""

import threading

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from tqdm import tqdm

from sthisto import images, pp
from sthisto.encoders import _encode
from sthisto.encoders._encode import encode, prefetch

PICTURE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


def test_the_next_item_is_made_while_the_last_is_used():
    begun = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in prefetch(items()):
        if number + 1 < len(begun):
            assert begun[number + 1].wait(timeout=5)
        assert not any(event.is_set() for event in begun[number + 2 :])  # one ahead, so that memory holds two


def test_items_come_in_order_and_errors_at_their_place():
    assert list(prefetch(iter(range(20)))) == list(range(20))
    assert list(prefetch(iter(()))) == []

    def breaks():
        yield 1
        raise OSError("the disk is gone")

    given = prefetch(breaks())
    assert next(given) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(given)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_features_are_in_the_order_of_the_points(encoder, batch_size):
    xy = np.random.default_rng(1).uniform(0, 90, (30, 2))
    image = images.open_image(PICTURE)
    found = encode(image, xy, 16.0, encoder, batch_size=batch_size)
    assert_array_equal(found, encoder(images.sample_patches(image, xy, 16.0, encoder.input_size)), strict=True)


def test_work_can_start_anywhere():
    """The rest of the batches is that of the whole, also where the picture decides on the order."""
    rng = np.random.default_rng(2)
    for chunks in (None, (32, 40, 3)):
        stored = PICTURE if chunks is None else zarr.create_array({}, data=PICTURE, chunks=chunks)
        image, xy = images.open_image(stored), rng.uniform(0, 100, (50, 2))
        order = images.visiting_order(image, xy, 20.0, 8)
        whole = list(images.patch_batches(image, xy, 20.0, 8, batch_size=6))
        assert_array_equal(np.concatenate([rows for rows, _ in whole]), order)
        for first in (0, 6, 48, 50, 60):
            rest = list(images.patch_batches(image, xy, 20.0, 8, batch_size=6, first=first))
            assert len(rest) == len(whole[first // 6 :]) if first < 50 else rest == []
            for (rows, patches), (all_rows, all_patches) in zip(rest, whole[first // 6 :], strict=False):
                assert_array_equal(rows, all_rows)
                assert_array_equal(patches, all_patches)
    with pytest.raises(ValueError, match="first is a number of points to skip; found -1"):
        images.patch_batches(image, xy, 20.0, 8, first=-1)


def test_progress_counts_patches(encoder, capfd, monkeypatch):
    monkeypatch.setattr(_encode, "tqdm", lambda **options: tqdm(**options | {"disable": False}))
    encode(images.open_image(PICTURE), np.full((30, 2), 40.0), 16.0, encoder)
    shown = capfd.readouterr().err
    assert "colors features: 100%" in shown
    assert "30/30" in shown


def test_the_crop_of_the_papers_scripts(section, encoder):
    """50 full-resolution pixels are patch_um=50 * mpp, at any scale."""

    class Fifty(type(encoder)):
        input_size = 50

    picture = section.uns["spatial"]["synthetic_0"]["images"]["hires"]
    for mpp in (2.0, 1.9):
        pp.extract_features(section, Fifty(), image=picture, mpp=mpp, patch_um=50 * mpp)
        x, y = np.floor(section.obsm["spatial"][40] + 0.5).astype(int)
        crop = picture[y - 25 : y + 25, x - 25 : x + 25]
        assert crop.shape == (50, 50, 3)
        assert_array_equal(section.obsm["X_histo"][40], Fifty()(crop[None])[0])


def test_a_patch_larger_than_the_picture(section, encoder, refuses):
    picture = section.uns["spatial"]["synthetic_0"]["images"]["hires"]
    height, width = picture.shape[:2]
    side = 2.0 * max(height, width)
    message = (
        f"a patch of .* um is {side / 2 + 1:.0f} px at 2 um/px, but the image is only {width} wide and {height} high"
    )
    with refuses(section, ValueError, message):
        pp.extract_features(section, encoder, image=picture, mpp=2.0, patch_um=side + 2)
    pp.extract_features(section, encoder, image=picture, mpp=2.0, patch_um=side)
