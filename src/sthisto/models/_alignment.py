"""Sections of one tissue laid over each other, by what was measured on them.

Serial sections show the same tissue turned and shifted on the slide. Where they do, a spot of one is nearly a
measurement of the other at the same place. Each section is moved rigidly (turned, shifted, perhaps flipped over) onto
the largest one so that smoothed expression factors agree best,

    agreement(T) = sum_i (2 z_i . F(T p_i) - |F(T p_i)|^2) / sum_i |z_i|^2,

F being the reference's factors smoothed over its place, zero outside: the share of z that F explains. A section of
another tissue finds much the same poor agreement in many places, and is recognised by that: it stays on its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

MOST = 1000  # spots of a section that are looked at
LEAST = 20  # fewer say nothing
STEP = 0.5  # pitches between the points of the reference's field
SMOOTHING = 2.0  # pitches
TURNS = np.deg2rad(np.arange(0, 360, 10))
CLEARLY = 1.25  # the best agreement over the best in quite another position
ENOUGH = 0.15  # agreement that is worth having

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frames:
    """Where each section lies: those of one frame compare by place."""

    frame: NDArray[np.int64]  # (s,)
    turn: Floats  # (s, 2, 2)
    shift: Floats  # (s, 2)

    def place(self, xy: Floats, section: int) -> Floats:
        """Positions (n, 2) of a section in its frame."""
        moved: Floats = xy @ self.turn[section].T + self.shift[section]
        return moved


@dataclass(frozen=True)
class _Field:
    """Smoothed factors of the reference on a raster, zero outside."""

    low: Floats  # (2,)
    values: Floats  # (h + 1, w + 1, f), the last row and column zero

    @classmethod
    def of(cls, xy: Floats, z: Floats) -> "_Field":
        low = xy.min(axis=0) - 2
        size = np.ceil((xy.max(axis=0) + 2 - low) / STEP).astype(int) + 1
        x, y = (low[axis] + STEP * np.arange(size[axis]) for axis in range(2))
        raster = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        values = _smooth(xy, z, raster).reshape(size[1], size[0], -1)
        return cls(low, np.pad(values, ((0, 1), (0, 1), (0, 0))))

    def agreement(self, xy: Floats, z: Floats) -> Floats:
        """Share of z (n, f) that the field explains at each of several placements xy (..., n, 2)."""
        site = np.rint((xy - self.low) / STEP).astype(int)
        beyond = np.array(self.values.shape[1::-1]) - 1
        site = np.where(((site >= 0) & (site < beyond)).all(axis=-1, keepdims=True), site, beyond)
        there = self.values[site[..., 1], site[..., 0]]  # (..., n, f)
        share: Floats = (2 * (there * z).sum(axis=(-1, -2)) - (there**2).sum(axis=(-1, -2))) / (z**2).sum()
        return share


def lay_over(xy: Floats, z: Floats, section: NDArray[np.int64]) -> Frames:
    """Frames of sections from pooled spots: positions (n, 2) in pitches, factors (n, f), and section numbers (n,)."""
    sizes = np.bincount(section)
    reference = int(sizes.argmax())
    frame, turn, shift = np.arange(len(sizes)), np.tile(np.eye(2), (len(sizes), 1, 1)), np.zeros((len(sizes), 2))
    parts = [np.flatnonzero(section == each)[:: -(-size // MOST)] for each, size in enumerate(sizes)]
    if sizes[reference] >= LEAST and len(sizes) > 1:
        field = _Field.of(xy[parts[reference]], z[parts[reference]])
        centre = xy[parts[reference]].mean(axis=0)
        for each in (each for each, size in enumerate(sizes) if size >= LEAST and each != reference):
            rows = parts[each]
            found = _search(field, xy[rows], _smooth(xy[rows], z[rows], xy[rows]), centre)
            if found is not None:
                frame[each] = reference
                turn[each], shift[each] = found
    return Frames(frame, turn, shift)


def _search(field: _Field, xy: Floats, z: Floats, centre: Floats) -> tuple[Floats, Floats] | None:
    """Turn and shift of the clearly best placement; None where there is none."""
    reach = 0.35 * np.ptp(xy, axis=0).max()
    step = max(1.0, reach / 12)
    span = np.arange(-reach, reach + step / 2, step)
    offsets = np.stack(np.meshgrid(span, span), axis=-1).reshape(-1, 2)
    middle = xy.mean(axis=0)
    best: list[tuple[float, Floats, Floats]] = []
    for turn in _turns():
        moved = (xy - middle) @ turn.T + centre
        agreement = np.array([field.agreement(moved + offset, z) for offset in offsets])
        most = int(agreement.argmax())
        best.append((float(agreement[most]), turn, offsets[most]))
    best.sort(key=lambda each: -each[0])
    agreement_found, turn, offset = best[0]
    elsewhere = max(each for each, other, _ in best if not _alike(turn, other))
    if agreement_found < max(ENOUGH, CLEARLY * elsewhere):
        return None
    turn, offset = _refine(field, xy - middle, z, centre, turn, offset)
    return turn, centre + offset - turn @ middle


def _refine(  # noqa: PLR0917  a placement and what it is judged by
    field: _Field, xy: Floats, z: Floats, centre: Floats, turn: Floats, offset: Floats
) -> tuple[Floats, Floats]:
    """Smaller and smaller moves about the best placement, each kept where it agrees better."""
    for angle, step in ((5.0, 0.5), (2.5, 0.5), (1.25, 0.25)):
        moves = [
            (_turn(np.deg2rad(a)) @ turn, offset + np.array([dx, dy]))
            for a in (-angle, 0, angle)
            for dx in (-step, 0, step)
            for dy in (-step, 0, step)
        ]
        agreement = [field.agreement(xy @ each.T + centre + moved, z) for each, moved in moves]
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
