"""Registration of sections: known rotations are found, other tissues are left alone."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sthisto.models._registration import LEAST, STEP, _Part, _Raster, _Search, register_sections


def tissue(xy: NDArray[np.float64], random_state: int, noise: float) -> NDArray[np.float64]:
    """Factors of a random smooth tissue at xy, measured with noise."""
    rng = np.random.default_rng(random_state)
    waves, phase = rng.normal(scale=0.45, size=(2, 24)), rng.uniform(0, 2 * np.pi, 24)
    mix = rng.normal(size=(24, 4)) / 3
    return np.cos(xy @ waves + phase) @ mix + noise * np.random.default_rng(random_state + 1).normal(size=(len(xy), 4))


def square(side: int) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2).astype(float)


def rotation(degrees: float) -> NDArray[np.float64]:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])


@pytest.mark.parametrize(("degrees", "flip"), [(0, 1), (37, 1), (180, 1), (-92, -1)])
def test_a_rotated_and_shifted_section_is_registered(degrees: float, flip: int) -> None:
    first, second = square(14), square(12) + 0.7
    z = np.concatenate([tissue(first, 3, 0.3), tissue(second, 3, 0.3)])
    moved = (second * [flip, 1]) @ rotation(degrees).T + [40.0, -7.0]
    section = np.repeat([0, 1], [len(first), len(second)])
    transforms = register_sections(np.concatenate([first, moved]), z, section)
    assert transforms.frame.tolist() == [0, 0]
    error = np.linalg.norm(transforms.apply(moved, 1) - second, axis=1)
    assert np.median(error) < 0.75
    np.testing.assert_allclose(transforms.apply(first, 0), first)  # the reference stays
    np.testing.assert_allclose(transforms.rotation[1] @ transforms.rotation[1].T, np.eye(2), atol=1e-12)  # rigid


def test_another_tissue_stays_on_its_own() -> None:
    first, second = square(14), square(12)
    z = np.concatenate([tissue(first, 3, 0.3), tissue(second, 8, 0.3)])
    transforms = register_sections(np.concatenate([first, second]), z, np.repeat([0, 1], [len(first), len(second)]))
    assert transforms.frame.tolist() == [0, 1]
    np.testing.assert_array_equal(transforms.apply(second, 1), second)


def test_noise_is_not_registered() -> None:
    rng = np.random.default_rng(0)
    xy = np.concatenate([square(12), square(12)])
    transforms = register_sections(xy, rng.normal(size=(len(xy), 4)), np.repeat([0, 1], len(xy) // 2))
    assert transforms.frame.tolist() == [0, 1]


def test_the_largest_is_the_reference_and_few_spots_are_not_registered() -> None:
    small, large, tiny = square(12), square(14), square(4)
    assert len(tiny) < LEAST
    z = np.concatenate([tissue(each, 3, 0.2) for each in (small, large, tiny)])
    sizes = [len(small), len(large), len(tiny)]
    transforms = register_sections(np.concatenate([small, large, tiny]), z, np.repeat([0, 1, 2], sizes))
    assert transforms.frame.tolist() == [1, 1, 2]


def test_two_tissues_find_their_groups_and_the_likeliest_is_tried_first() -> None:
    """Four sections of two tissues; each tries one frame only, the one most like it."""
    sides, seeds = (14, 13, 12, 11), (3, 8, 3, 8)
    parts = [square(side) for side in sides]
    z = np.concatenate([tissue(xy, random_state, 0.2) for xy, random_state in zip(parts, seeds, strict=True)])
    section = np.repeat(range(4), [len(each) for each in parts])
    correlation = np.equal.outer(seeds, seeds).astype(float)
    assert register_sections(np.concatenate(parts), z, section, correlation).frame.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("pitch_um", "expected"), [([100, 200], [0, 1]), ([100, 101], [0, 0]), ([100, np.nan], [0, 0])]
)
def test_arrays_of_another_pitch_are_not_registered(pitch_um: list[float], expected: list[int]) -> None:
    first, second = square(14), square(12)
    z = np.concatenate([tissue(first, 3, 0.2), tissue(second, 3, 0.2)])
    section = np.repeat([0, 1], [len(first), len(second)])
    transforms = register_sections(np.concatenate([first, second]), z, section, pitch_um=np.array(pitch_um))
    assert transforms.frame.tolist() == expected


def test_all_shifts_at_once_agree_with_one_at_a_time() -> None:
    part, around = _Part.of(square(9) * 1.03, tissue(square(9), 3, 0.2)), rotation(30)
    raster = _Raster.of(_Part.of(square(12), tissue(square(12), 3, 0.2)))
    search = _Search(raster, part)
    found, shift = search.best(around)
    site = np.rint((search.xy @ around.T + raster.center - raster.low) / STEP) * STEP + raster.low
    at = [
        raster.explained_variance(site + np.array([dx, dy]), search.z) for dx in search.shifts for dy in search.shifts
    ]
    assert found == pytest.approx(max(at), rel=1e-4)
    assert raster.explained_variance(site + shift, search.z) == pytest.approx(found, rel=1e-4)


def test_one_section_is_its_own_frame() -> None:
    xy = square(10)
    transforms = register_sections(xy, tissue(xy, 0, 0.1), np.zeros(len(xy), dtype=int))
    assert transforms.frame.tolist() == [0]
    np.testing.assert_array_equal(transforms.apply(xy, 0), xy)
