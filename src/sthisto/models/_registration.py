"""Registration of sections of one tissue to each other, by their expression.

Serial sections show the same tissue rotated and shifted on the slide. Each section is moved rigidly (rotated, shifted,
perhaps flipped) onto another one such that the other's smoothed expression factors explain most of its own,

    explained variance(T) = sum_i (2 z_i . F(T p_i) - |F(T p_i)|^2) / sum_i |z_i|^2,

F being the other's factors smoothed over positions, zero outside: the share of z that F explains. Both sums are
correlations with a raster, so that all shifts of one rotation follow from one Fourier transform. A section of another
tissue has much the same poor fit in many places, and is recognized by that.

Sections are taken largest first. Each is tried on the few frames whose gene means are most like its own, and starts a
frame of its own where it fits none of them: several tissues and patients form groups, at a cost that grows with the
number of sections and not with that of its pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial.distance import cdist

MOST = 1000  # spots of a section that are used
LEAST = 20  # sections of fewer spots are not registered
N_FRAMES = 3  # that a section is tried on
PITCHES = 0.05  # arrays whose pitches differ by a larger share are not registered to each other
STEP = 0.5  # pitches between the points of the reference's raster
SMOOTHING = 2.0  # pitches
ANGLES = np.deg2rad(np.arange(0, 360, 10))
CLEARLY = 1.15  # the best explained variance over the best in quite another position; other tissues reach 1.05
ENOUGH = 0.15  # explained variance that is worth having

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RigidTransforms:
    """Rotation and shift of each section into its frame, within which positions compare."""

    frame: NDArray[np.int64]  # (s,) the section that it is registered to, itself where to none
    rotation: Floats  # (s, 2, 2), with reflection where a section is flipped
    shift: Floats  # (s, 2)

    @classmethod
    def identity(cls, s: int) -> "RigidTransforms":
        """Each section in a frame of its own."""
        return cls(np.arange(s), np.tile(np.eye(2), (s, 1, 1)), np.zeros((s, 2)))

    def apply(self, xy: Floats, section: int) -> Floats:
        """Positions (n, 2) of a section in its frame."""
        moved: Floats = xy @ self.rotation[section].T + self.shift[section]
        return moved


@dataclass(frozen=True)
class _Part:
    """As many spots of a section as are used."""

    xy: Floats  # (n, 2)
    z: Floats  # (n, f)
    smooth: Floats  # (n, f)

    @classmethod
    def of(cls, xy: Floats, z: Floats) -> "_Part":
        every = slice(None, None, -(-len(xy) // MOST))
        return cls(xy[every], z[every], _smooth(xy[every], z[every], xy[every]))


@dataclass(frozen=True)
class _Raster:
    """Smoothed factors of the reference on a raster, zero outside."""

    low: Floats  # (2,)
    values: Floats  # (h + 1, w + 1, f), the last row and column zero
    center: Floats  # (2,) of its spots

    @classmethod
    def of(cls, part: _Part) -> "_Raster":
        low = part.xy.min(axis=0) - 2
        size = np.ceil((part.xy.max(axis=0) + 2 - low) / STEP).astype(int) + 1
        x, y = (low[axis] + STEP * np.arange(size[axis]) for axis in range(2))
        raster = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        values = _smooth(part.xy, part.z, raster).reshape(size[1], size[0], -1)
        return cls(low, np.pad(values, ((0, 1), (0, 1), (0, 0))), part.xy.mean(axis=0))

    def explained_variance(self, xy: Floats, z: Floats) -> Floats:
        """Share of z (n, f) that the raster explains at each of several placements xy (..., n, 2)."""
        site = np.rint((xy - self.low) / STEP).astype(int)
        beyond = np.array(self.values.shape[1::-1]) - 1
        site = np.where(((site >= 0) & (site < beyond)).all(axis=-1, keepdims=True), site, beyond)
        there = self.values[site[..., 1], site[..., 0]]  # (..., n, f)
        share: Floats = (2 * (there * z).sum(axis=(-1, -2)) - (there**2).sum(axis=(-1, -2))) / (z**2).sum()
        return share


class _Search:
    """Explained variance of a section under all shifts at once, for one rotation after another."""

    def __init__(self, raster: _Raster, part: _Part) -> None:
        self.xy, self.z, self.raster = part.xy - part.xy.mean(axis=0), part.smooth, raster
        largest = 0.35 * np.ptp(part.xy, axis=0).max()
        self.shifts = STEP * np.arange(-np.floor(largest / STEP), np.floor(largest / STEP) + 1)
        widest = int(np.ceil(2 * np.linalg.norm(self.xy, axis=1).max() / STEP)) + 2
        size = [fft.next_fast_len(widest + each, real=True) for each in raster.values.shape[:2]]
        channels = np.concatenate([2 * raster.values, -(raster.values**2).sum(axis=-1, keepdims=True)], axis=-1)
        self.size, self.known = size, fft.rfft2(channels.astype(np.float32), size, axes=(0, 1))

    def best(self, rotation: Floats) -> tuple[float, Floats]:
        """Best explained variance of a rotation, and the shift from center to center that it takes."""
        at = (self.xy @ rotation.T + self.raster.center - self.raster.low) / STEP
        site = np.rint(at).astype(int)
        corner = site.min(axis=0)
        x, y = (site - corner).T
        spots = np.zeros((*self.size, self.z.shape[1] + 1), dtype=np.float32)
        np.add.at(spots, (y, x), np.column_stack([self.z, np.ones(len(self.z))]).astype(np.float32))
        product = (self.known * fft.rfft2(spots, axes=(0, 1)).conj()).sum(axis=-1)
        total = fft.irfft2(product, self.size)
        steps = np.rint(self.shifts / STEP).astype(int)
        table = total[np.ix_((steps + corner[1]) % self.size[0], (steps + corner[0]) % self.size[1])]
        row, column = np.unravel_index(int(table.argmax()), table.shape)
        return float(table[row, column] / (self.z**2).sum()), self.shifts[[column, row]]


def register_sections(
    xy: Floats, z: Floats, section: NDArray[np.int64], correlation: Floats | None = None, pitch_um: Floats | None = None
) -> RigidTransforms:
    """Find the transforms of sections from pooled spots: positions (n, 2), factors (n, f), section numbers (n,).

    Frames are tried in the order of the sections' ``correlation`` (s, s); those of another ``pitch_um`` (s,), NaN where
    it is not known, are not tried.
    """
    sizes = np.bincount(section)
    transforms = RigidTransforms.identity(len(sizes))
    correlation = np.zeros((len(sizes),) * 2) if correlation is None else correlation
    rasters: dict[int, _Raster] = {}
    if len(sizes) == 1:
        return transforms
    for each in sorted(np.flatnonzero(sizes >= LEAST), key=lambda each: -sizes[each]):
        rows = np.flatnonzero(section == each)
        part = _Part.of(xy[rows], z[rows])
        nearest = sorted(rasters, key=lambda other: -correlation[each, other])
        for other in [other for other in nearest if _comparable(pitch_um, each, other)][:N_FRAMES]:
            found = _search(rasters[other], part)
            if found is not None:
                transforms.frame[each] = other
                transforms.rotation[each], transforms.shift[each] = found
                break
        else:
            rasters[int(each)] = _Raster.of(part)
    return transforms


def _comparable(pitch_um: Floats | None, one: np.intp, other: int) -> bool:
    """Whether positions in pitches mean the same length in two sections, as far as is known."""
    return pitch_um is None or not abs(np.log(pitch_um[one] / pitch_um[other])) > PITCHES


def _search(raster: _Raster, part: _Part) -> tuple[Floats, Floats] | None:
    """Rotation and shift of the clearly best placement; None where there is none."""
    search = _Search(raster, part)
    best = sorted(((*search.best(rotation), rotation) for rotation in _rotations()), key=lambda each: -each[0])
    explained, offset, rotation = best[0]
    elsewhere = max(each for each, _, other in best if not _is_near(rotation, other))
    if explained < max(ENOUGH, CLEARLY * elsewhere):
        return None
    rotation, offset = _refine(raster, search.xy, search.z, rotation, offset)
    return rotation, raster.center + offset - rotation @ part.xy.mean(axis=0)


def _refine(raster: _Raster, xy: Floats, z: Floats, rotation: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """Smaller and smaller moves about the best placement, each kept where it explains more."""
    for angle, step in ((5.0, 0.5), (2.5, 0.5), (1.25, 0.25)):
        moves = [
            (_rotation(np.deg2rad(a)) @ rotation, offset + np.array([dx, dy]))
            for a in (-angle, 0, angle)
            for dx in (-step, 0, step)
            for dy in (-step, 0, step)
        ]
        explained = [raster.explained_variance(xy @ each.T + raster.center + moved, z) for each, moved in moves]
        rotation, offset = moves[int(np.argmax(explained))]
    return rotation, offset


def _rotations() -> Iterator[Floats]:
    """All rotations, face up and face down."""
    for flip in (1.0, -1.0):
        for angle in ANGLES:
            yield _rotation(angle) * [flip, 1.0]


def _rotation(angle: float) -> Floats:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _is_near(a: Floats, b: Floats) -> bool:
    """Whether two placements have the same face up and are less than 35 degrees apart."""
    between = a @ b.T
    return bool(np.linalg.det(between) > 0 and between[0, 0] > np.cos(np.deg2rad(35)))


def _smooth(xy: Floats, z: Floats, at: Floats) -> Floats:
    """Factors smoothed over positions, towards zero where there are no spots."""
    kernel = np.exp(-cdist(xy, xy, "sqeuclidean") / (2 * SMOOTHING**2)) + np.eye(len(xy))
    smooth: Floats = np.exp(-cdist(at, xy, "sqeuclidean") / (2 * SMOOTHING**2)) @ np.linalg.solve(kernel, z)
    return smooth
