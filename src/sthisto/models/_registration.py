"""Sections of one tissue laid over each other, by what was measured on them.

Serial sections show the same tissue turned and shifted on the slide. Where they do, a spot of one is nearly a
measurement of the other at the same place. Each section is moved rigidly (turned, shifted, perhaps flipped over) onto
another one so that smoothed expression factors agree best,

    agreement(T) = sum_i (2 z_i . F(T p_i) - |F(T p_i)|^2) / sum_i |z_i|^2,

F being the other's factors smoothed over its place, zero outside: the share of z that F explains. Both sums are
correlations with a raster, so that all shifts of one turn are had from one Fourier transform.
A section of another tissue finds much the same poor agreement in many places, and is recognised by that.

Sections are taken largest first. Each is tried on the few frames there are whose gene means are most like its own, and
opens a frame where it lies on none of them: several tissues and patients find their groups, at a cost that grows with
the number of sections and not with that of its pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial.distance import cdist

MOST = 1000  # spots of a section that are looked at
LEAST = 20  # fewer say nothing
TRIED = 3  # frames that a section is tried on
PITCHES = 0.05  # arrays whose pitches differ by a larger share do not lie over each other
STEP = 0.5  # pitches between the points of the reference's field
SMOOTHING = 2.0  # pitches
TURNS = np.deg2rad(np.arange(0, 360, 10))
CLEARLY = 1.15  # the best agreement over the best in quite another position; strangers reach 1.05
ENOUGH = 0.15  # agreement that is worth having

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RigidTransforms:
    """Where each section lies: those of one frame compare by place."""

    frame: NDArray[np.int64]  # (s,) the section that it lies on, itself where it lies on none
    turn: Floats  # (s, 2, 2)
    shift: Floats  # (s, 2)

    @classmethod
    def apart(cls, s: int) -> "RigidTransforms":
        """Each section in a frame of its own."""
        return cls(np.arange(s), np.tile(np.eye(2), (s, 1, 1)), np.zeros((s, 2)))

    def place(self, xy: Floats, section: int) -> Floats:
        """Positions (n, 2) of a section in its frame."""
        moved: Floats = xy @ self.turn[section].T + self.shift[section]
        return moved


@dataclass(frozen=True)
class _Part:
    """As many spots of a section as are looked at."""

    xy: Floats  # (n, 2)
    z: Floats  # (n, f)
    smooth: Floats  # (n, f)

    @classmethod
    def of(cls, xy: Floats, z: Floats) -> "_Part":
        every = slice(None, None, -(-len(xy) // MOST))
        return cls(xy[every], z[every], _smooth(xy[every], z[every], xy[every]))


@dataclass(frozen=True)
class _Field:
    """Smoothed factors of the reference on a raster, zero outside."""

    low: Floats  # (2,)
    values: Floats  # (h + 1, w + 1, f), the last row and column zero
    centre: Floats  # (2,) of its spots

    @classmethod
    def of(cls, part: _Part) -> "_Field":
        low = part.xy.min(axis=0) - 2
        size = np.ceil((part.xy.max(axis=0) + 2 - low) / STEP).astype(int) + 1
        x, y = (low[axis] + STEP * np.arange(size[axis]) for axis in range(2))
        raster = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        values = _smooth(part.xy, part.z, raster).reshape(size[1], size[0], -1)
        return cls(low, np.pad(values, ((0, 1), (0, 1), (0, 0))), part.xy.mean(axis=0))

    def agreement(self, xy: Floats, z: Floats) -> Floats:
        """Share of z (n, f) that the field explains at each of several placements xy (..., n, 2)."""
        site = np.rint((xy - self.low) / STEP).astype(int)
        beyond = np.array(self.values.shape[1::-1]) - 1
        site = np.where(((site >= 0) & (site < beyond)).all(axis=-1, keepdims=True), site, beyond)
        there = self.values[site[..., 1], site[..., 0]]  # (..., n, f)
        share: Floats = (2 * (there * z).sum(axis=(-1, -2)) - (there**2).sum(axis=(-1, -2))) / (z**2).sum()
        return share


class _Search:
    """Agreement of a section with a field under all shifts at once, for one turn after another."""

    def __init__(self, field: _Field, part: _Part) -> None:
        self.xy, self.z, self.field = part.xy - part.xy.mean(axis=0), part.smooth, field
        reach = 0.35 * np.ptp(part.xy, axis=0).max()
        self.shifts = STEP * np.arange(-np.floor(reach / STEP), np.floor(reach / STEP) + 1)
        widest = int(np.ceil(2 * np.linalg.norm(self.xy, axis=1).max() / STEP)) + 2
        size = [fft.next_fast_len(widest + each, real=True) for each in field.values.shape[:2]]
        channels = np.concatenate([2 * field.values, -(field.values**2).sum(axis=-1, keepdims=True)], axis=-1)
        self.size, self.known = size, fft.rfft2(channels.astype(np.float32), size, axes=(0, 1))

    def best(self, turn: Floats) -> tuple[float, Floats]:
        """Best agreement of a turn, and the shift from centre to centre that it takes."""
        at = (self.xy @ turn.T + self.field.centre - self.field.low) / STEP
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
    xy: Floats, z: Floats, section: NDArray[np.int64], likeness: Floats | None = None, pitch_um: Floats | None = None
) -> RigidTransforms:
    """RigidTransforms of sections from pooled spots: positions (n, 2) in pitches, factors (n, f), and section
    numbers (n,).


    RigidTransforms are tried in the order of ``likeness`` (s, s) of the sections; those of another ``pitch_um`` (s,), NaN where
    it is not known, are not.
    """
    sizes = np.bincount(section)
    frames = RigidTransforms.apart(len(sizes))
    likeness = np.zeros((len(sizes),) * 2) if likeness is None else likeness
    fields: dict[int, _Field] = {}
    if len(sizes) == 1:
        return frames
    for each in sorted(np.flatnonzero(sizes >= LEAST), key=lambda each: -sizes[each]):
        rows = np.flatnonzero(section == each)
        part = _Part.of(xy[rows], z[rows])
        alike = sorted(fields, key=lambda other: -likeness[each, other])
        for other in [other for other in alike if _comparable(pitch_um, each, other)][:TRIED]:
            found = _search(fields[other], part)
            if found is not None:
                frames.frame[each] = other
                frames.turn[each], frames.shift[each] = found
                break
        else:
            fields[int(each)] = _Field.of(part)
    return frames


def _comparable(pitch_um: Floats | None, one: np.intp, other: int) -> bool:
    """Whether positions in pitches mean the same length in two sections, as far as is known."""
    return pitch_um is None or not abs(np.log(pitch_um[one] / pitch_um[other])) > PITCHES


def _search(field: _Field, part: _Part) -> tuple[Floats, Floats] | None:
    """Turn and shift of the clearly best placement; None where there is none."""
    search = _Search(field, part)
    best = sorted(((*search.best(turn), turn) for turn in _turns()), key=lambda each: -each[0])
    agreement_found, offset, turn = best[0]
    elsewhere = max(each for each, _, other in best if not _alike(turn, other))
    if agreement_found < max(ENOUGH, CLEARLY * elsewhere):
        return None
    turn, offset = _refine(field, search.xy, search.z, turn, offset)
    return turn, field.centre + offset - turn @ part.xy.mean(axis=0)


def _refine(field: _Field, xy: Floats, z: Floats, turn: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """Smaller and smaller moves about the best placement, each kept where it agrees better."""
    for angle, step in ((5.0, 0.5), (2.5, 0.5), (1.25, 0.25)):
        moves = [
            (_turn(np.deg2rad(a)) @ turn, offset + np.array([dx, dy]))
            for a in (-angle, 0, angle)
            for dx in (-step, 0, step)
            for dy in (-step, 0, step)
        ]
        agreement = [field.agreement(xy @ each.T + field.centre + moved, z) for each, moved in moves]
        turn, offset = moves[int(np.argmax(agreement))]
    return turn, offset


def _turns() -> Iterator[Floats]:
    """All turns, face up and face down."""
    for flip in (1.0, -1.0):
        for angle in TURNS:
            yield _turn(angle) * [flip, 1.0]


def _turn(angle: float) -> Floats:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _alike(a: Floats, b: Floats) -> bool:
    """Whether two placements are face up or down alike and less than 35 degrees apart."""
    between = a @ b.T
    return bool(np.linalg.det(between) > 0 and between[0, 0] > np.cos(np.deg2rad(35)))


def _smooth(xy: Floats, z: Floats, at: Floats) -> Floats:
    """Factors smoothed over place, towards zero where there are no spots."""
    kernel = np.exp(-cdist(xy, xy, "sqeuclidean") / (2 * SMOOTHING**2)) + np.eye(len(xy))
    smooth: Floats = np.exp(-cdist(at, xy, "sqeuclidean") / (2 * SMOOTHING**2)) @ np.linalg.solve(kernel, z)
    return smooth
