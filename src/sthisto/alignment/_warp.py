"""Smooth deformation on a coarse grid of control points, for sections that were stretched or torn."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from sthisto import grids
from sthisto.alignment._raster import FeatureRaster
from sthisto.alignment._statistic import BLOCK, HeldOutRidge, expression_factors

SPACING = 6.0  # pitches between control points
PENALTY = 0.1  # share of the variance that a mean square displacement of one pitch has to gain
MAX_MOVE = 2.0  # pitches
STEPS = (0.4, 0.2, 0.1)  # pitches
MAX_SPOTS = 1200
MIN_Z = 3.0  # standard errors over blocks that the held-out gain has to exceed

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Warp:
    """Displacement field: a Gaussian average of the displacements of control points.

    Attributes
    ----------
    points
        (k, 2) control points, pixels.
    moves
        (k, 2) their displacements, pixels.
    width
        Standard deviation of the Gaussian, pixels.
    gain, z
        Share of variance that held-out blocks gained, and this in standard errors over blocks.
    """

    points: Floats
    moves: Floats
    width: float
    gain: float
    z: float

    def __call__(self, xy: Floats) -> Floats:
        """Positions (n, 2), moved."""
        moved: Floats = xy + _weights(xy, self.points, self.width) @ self.moves
        return moved


def fit_warp(
    raster: FeatureRaster, xy: Floats, expression: NDArray[np.float32], *, pitch: float, random_state: int = 0
) -> Warp | None:
    """Fit a deformation, where blocks that took no part in it are predicted better under it.

    The deformation is fitted to the errors of a part of the blocks and scored on the others, five times in turn. Only
    where these gain more than three standard errors is it fitted to all blocks and returned.

    Parameters
    ----------
    raster, xy, expression, pitch, random_state
        As in :func:`check`, with ``xy`` at the best similarity transformation.
    """
    rows = np.sort(np.random.default_rng(random_state).permutation(len(xy))[:MAX_SPOTS])
    spots = xy[rows]
    ridge = HeldOutRidge.of(spots / pitch, expression_factors(expression[rows]), random_state=random_state)
    components, width = raster.kernel_components(random_state=random_state), 0.5 * SPACING * pitch
    points = _control_points(spots, SPACING * pitch)
    weights = _weights(spots, points, width)
    member, size = grids.blocks(spots / pitch, BLOCK)

    still = np.zeros((1, len(points), 2))
    about = ridge.errors(components.at(spots[None]))[0]

    def losses(moves: Floats) -> Floats:
        """Losses (c, n) of the spots under moves (c, k, 2), in pitches."""
        moved = components.at(spots + pitch * (weights @ moves))
        mean: Floats = ridge.spot_losses(moved, about) / ridge.factors.shape[1]
        return mean

    gains = np.empty(len(spots))
    for part in np.unique(ridge.fold):
        inside = ridge.fold == part
        moves = _descend(lambda m, fitted=~inside: losses(m)[:, fitted].sum(axis=1), still)  # type: ignore[misc]
        gains[inside] = (losses(still) - losses(moves))[0, inside]
    of_block = np.bincount(member, gains, len(size))
    z = of_block.sum() / (np.sqrt(((of_block - of_block.mean()) ** 2).sum()) or np.inf)
    if not z > MIN_Z:
        return None
    moves = _descend(lambda m: losses(m).sum(axis=1), still)
    return Warp(points, moves[0] * pitch, width, float(gains.sum()), float(z))


def _descend(error: Callable[[Floats], Floats], start: Floats) -> Floats:
    """Move one control point after the other as long as the error and the penalty of the moves (1, k, 2) fall."""

    def penalized(moves: Floats) -> Floats:
        return np.asarray(error(moves) + PENALTY * (moves**2).sum(axis=2).mean(axis=1))

    moves, best = start.copy(), float(penalized(start)[0])
    for step in STEPS:
        lower = True
        while lower:
            lower = False
            for point in range(moves.shape[1]):
                tried = np.repeat(moves, 4, axis=0)
                tried[:, point] += step * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
                tried = tried[np.linalg.norm(tried[:, point], axis=1) <= MAX_MOVE]
                values = penalized(tried)
                if len(values) and values.min() < best - 1e-6:
                    moves, best, lower = tried[values.argmin()][None], float(values.min()), True
    return moves


def _control_points(xy: Floats, spacing: float) -> Floats:
    """Points (k, 2) of a square grid that have spots within their cell."""
    low, high = xy.min(axis=0), xy.max(axis=0)
    number = np.maximum(np.ceil((high - low) / spacing).astype(np.intp), 1) + 1
    axes = [np.linspace(a, b, n) for a, b, n in zip(low, high, number, strict=True)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    near = (cdist(points, xy) <= spacing).any(axis=1)
    return np.asarray(points[near])


def _weights(xy: Floats, points: Floats, width: float) -> Floats:
    """Weights (n, k) of the control points, which sum to 1."""
    exponent = -0.5 * (cdist(xy, points) / width) ** 2
    kernel = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    weights: Floats = kernel / kernel.sum(axis=1, keepdims=True)
    return weights
