"""Spots near points, how far apart spots are, and which of them to hold out."""

import logging

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from sthisto.grids._lattice import Lattice
from sthisto.grids._positions import codes, distinct, length, positions, reached

logger = logging.getLogger("sthisto")


def nearest(points: ArrayLike, xy: ArrayLike, k: int = 1) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Distance to the ``k`` nearest spots of every point, and their rows, nearest first.

    On a lattice many spots are equally far. The spots are put in the order of their positions before the search, so
    that which of them are taken depends neither on the order of the spots nor on that of the points.

    Parameters
    ----------
    points
        (m, 2) pixels: query points.
    xy
        (n, 2) pixels: spots.
    k
        Spots for each point.

    Returns
    -------
    Distances (m, k) in pixels, and rows of ``xy`` (m, k).

    Raises
    ------
    ValueError
        Positions that are not finite, ``k`` below 1 or above the number of spots.

    Examples
    --------
    >>> distance, row = nearest([[0.0, 1.0]], [[0.0, 9.0], [0.0, 0.0], [3.0, 5.0]], k=2)
    >>> distance.tolist(), row.tolist()
    ([[1.0, 5.0]], [[1, 2]])
    """
    points, spots = positions(points, "points"), positions(xy)
    if not 1 <= k <= len(spots):
        raise ValueError(f"k should be from 1 to the number of spots, {len(spots)}; got {k}.")
    order = np.lexsort(spots.T)
    distance, row = cKDTree(spots[order]).query(points, k=np.arange(1, k + 1), workers=-1)
    return distance, order[row]


def within(points: ArrayLike, xy: ArrayLike, max_distance: float) -> NDArray[np.bool_]:
    """Which points are at most ``max_distance`` from any spot.

    Far from every measurement a prediction is an extrapolation, and off the tissue it means nothing. It is the
    distance mask of verde (Uieda 2018, doi:10.21105/joss.00957).

    Parameters
    ----------
    points
        (m, 2) pixels.
    xy
        (n, 2) pixels: spots; without any, no point is within.
    max_distance
        Pixels.

    Returns
    -------
    (m,) mask.

    Raises
    ------
    ValueError
        Positions that are not finite, or ``max_distance`` that is negative or not finite.

    Examples
    --------
    >>> within([[0.0, 0.0], [0.0, 3.0]], [[0.0, 1.0]], 1.5).tolist()
    [True, False]
    """
    tree = cKDTree(positions(xy))
    return reached(tree, positions(points, "points"), length(max_distance, "max_distance", or_zero=True))


def spacing(xy: ArrayLike) -> float:
    """Pitch of the array of the spots, pixels.

    The unit in which models count distance. The nearest neighbor is no measure of it: print jitter makes the median
    6 % too short on a Spatial Transcriptomics slide, and empty sites make it too long. Only spots that form no
    lattice, such as cells, get their median nearest-neighbor distance, which is logged.

    Parameters
    ----------
    xy
        (n, 2) pixels; a position that occurs twice counts once.

    Raises
    ------
    ValueError
        Positions that are not finite, or fewer than two different ones.

    Examples
    --------
    >>> round(spacing(Lattice.hexagonal(7.0).cover([[0.0, 0.0]], 20.0) @ Lattice.hexagonal(7.0).basis), 6)
    7.0
    >>> spacing([[0.0, 0.0], [0.0, 2.0], [5.0, 2.0]])
    2.0
    """
    spots = distinct(positions(xy))
    if len(spots) < 2:
        raise ValueError(f"a spacing needs at least two different positions; there are {len(spots)}.")
    try:
        return Lattice.fit(spots).pitch
    except ValueError as reason:
        median = float(np.median(nearest(spots, spots, k=2)[0][:, 1]))
        logger.info("spacing is the median nearest-neighbor distance, %.4g: %s", median, reason)
        return median


def hold_out(
    xy: ArrayLike, fraction: float = 0.5, *, block: float | None = None, random_state: int
) -> NDArray[np.bool_]:
    """Choose spots to hide, at random or in whole square blocks.

    A spot whose neighbors are known is easy to guess, so a score on single hidden spots measures how well a method
    fills gaps. Hiding whole blocks removes the neighbors and scores longer distances, as
    ``BlockShuffleSplit`` of verde does (Uieda 2018, doi:10.21105/joss.00957).

    Parameters
    ----------
    xy
        (n, 2) pixels: spots.
    fraction
        Share of the spots to hide, between 0 and 1.
    block
        Side of the blocks in the units of ``xy``; None hides spots one by one.
    random_state
        Of the random choice.

    Returns
    -------
    (n,) mask, True where hidden: ``round(fraction * n)`` spots, or whole blocks in random order up to where their
    count of spots is closest to that, with at least one block hidden and one left.

    Raises
    ------
    ValueError
        ``fraction`` not between 0 and 1, ``block`` not positive, or all spots in one block.

    Examples
    --------
    >>> spots = [[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [11.0, 0.0]]
    >>> hold_out(spots, 0.5, block=5.0, random_state=0).tolist()
    [True, True, False, False]
    """
    spots, random = positions(xy), np.random.default_rng(random_state)
    check_fraction(fraction)
    if block is None:
        return random.permutation(len(spots)) < round(fraction * len(spots))
    member, size = blocks(spots, length(block, "block"))
    if len(size) < 2:
        width, height = np.ptp(spots, axis=0)
        raise ValueError(
            f"one block of side {block:g} holds all {len(spots)} spots, {width:g} wide and {height:g} high: choose "
            "smaller blocks."
        )
    order = random.permutation(len(size))
    missed = np.abs(np.cumsum(size[order])[:-1] - fraction * len(spots))
    return np.isin(member, order[: missed.argmin() + 1])


def check_fraction(fraction: float) -> None:
    """Refuse a share of spots that holds out all or none."""
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction should be between 0 and 1, so that some spots are held out and some are left; got {fraction}."
        )


def blocks(
    xy: NDArray[np.float64], side: float, *, offset: NDArray[np.float64] | float = 0.0
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Number (n,) of the square block that each spot is in, and spots (k,) of each block.

    Parameters
    ----------
    xy
        (n, 2) positions.
    side
        Side of the blocks in the units of ``xy``.
    offset
        (2,) by which the first block starts before the lowest coordinates.

    Examples
    --------
    >>> member, size = blocks(np.array([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0]]), 5.0)
    >>> member.tolist(), size.tolist()
    ([0, 0, 1], [2, 1])
    """
    cell = np.floor((xy - xy.min(axis=0) + offset) / side).astype(np.int64)
    _, member, size = np.unique(codes(cell), return_inverse=True, return_counts=True)
    return member.ravel(), size
