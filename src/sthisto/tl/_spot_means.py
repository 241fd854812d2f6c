"""Dense values that average, inside every spot's footprint, to the prediction at the spot.

A spot measures the mean over its disc, a model predicts at its centre: where expression bends, the two differ. What is
missing r of each footprint is spread over the points around, near ones taking more, and again until nothing is missing:

    y(p) += sum_s w(p, s) r_s / sum_s w(p, s),    w(p, s) = (1 - d)^4 (4 d + 1),  d = |p - s| / 1.5 pitches  (d < 1)

The weight is that of Wendland (1995, doi:10.1007/BF02123482), which ends smoothly. So the correction has no steps at
the edge of a footprint, and one that all spots need is the same everywhere. Values are kept at 0 or above; what that
leaves of the residual is corrected within the footprint, by a factor.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from sthisto import grids

SUPPORT = 1.5  # pitches
ROUNDS = 20
EXACT = 1e-7  # of the largest value
GENES = 64  # at once: the steps between are in float64

Floats = NDArray[np.float64]


def match_spot_means(
    values: NDArray[np.float32],
    points: Floats,
    at_spots: NDArray[np.float32],
    spots: Floats,
    *,
    pitch: float,
    diameter: float,
    weights: Floats | None = None,
) -> NDArray[np.float32]:
    """Correct dense values so that footprints average to the predictions at their spots.

    Parameters
    ----------
    values
        (m, g) non-negative, at the points.
    points
        (m, 2) pixels.
    at_spots
        (n, g) non-negative, of the spots.
    spots
        (n, 2) pixels.
    pitch, diameter
        Pixels: between spots, and of a footprint.
    weights
        (m,) positive, of the points in the means of footprints; None: all equal.

    Returns
    -------
    (m, g) non-negative. Footprints without a point ask for nothing.

    Examples
    --------
    >>> line = np.linspace(-0.2, 0.2, 5)
    >>> points = np.stack([line, 0 * line], axis=1)
    >>> dense = (line[:, None] ** 2).astype(np.float32)
    >>> spot = np.zeros((1, 2))
    >>> corrected = match_spot_means(dense, points, np.ones((1, 1), np.float32), spot, pitch=1.0, diameter=0.55)
    >>> float(corrected.mean().round(5))
    1.0
    """
    mean, held = _footprints(points, spots, diameter / 2, np.ones(len(points)) if weights is None else weights)
    share = _shares(points, spots[held], SUPPORT * pitch)
    made = np.empty_like(values)
    for start in range(0, values.shape[1], GENES):
        columns = slice(start, start + GENES)
        made[:, columns] = _corrected(values[:, columns].astype(np.float64), at_spots[held, columns], mean, share)
    return made


def _corrected(y: Floats, wanted: NDArray[np.float32], mean: sparse.csr_array, share: sparse.csr_array) -> Floats:
    """Spread what is missing until nothing is."""
    for _ in range(ROUNDS):
        missing = wanted - mean @ y
        if np.abs(missing).max(initial=0) <= EXACT * wanted.max(initial=0):
            break
        y = np.maximum(y + share @ missing, 0)
    within = (mean > 0).astype(np.float64)  # (n, m)
    there = mean @ y
    factor = np.divide(wanted, there, out=np.ones_like(there), where=there > 0)
    added = np.where(there > 0, 0, wanted)
    inside = np.asarray(within.sum(axis=0))[:, None] > 0
    return np.where(inside, y * (within.T @ factor) + within.T @ added, y)


def _footprints(
    points: Floats, spots: Floats, radius: float, weights: Floats
) -> tuple[sparse.csr_array, NDArray[np.intp]]:
    """Give the means (k, m) over the footprints that hold points, and whose they are (k,)."""
    distance, spot = (each[:, 0] for each in grids.nearest(points, spots))
    inside = np.flatnonzero(distance <= radius * (1 + 1e-9))
    held, row = np.unique(spot[inside], return_inverse=True)
    total = np.bincount(row, weights[inside])
    mean = sparse.csr_array((weights[inside] / total[row], (row, inside)), shape=(len(held), len(points)))
    return mean, held.astype(np.intp)


def _shares(points: Floats, spots: Floats, support: float) -> sparse.csr_array:
    """Weights (m, k) of the spots in what is added at a point, which add up to 1 wherever a spot is near."""
    near = cKDTree(points).sparse_distance_matrix(cKDTree(spots), support, output_type="coo_matrix")
    d = near.data / support
    weight = sparse.csr_array(((1 - d) ** 4 * (4 * d + 1), (near.row, near.col)), shape=(len(points), len(spots)))
    total = np.asarray(weight.sum(axis=1)).ravel()
    shares: sparse.csr_array = (
        sparse.diags_array(np.divide(1, total, out=np.zeros_like(total), where=total > 0)) @ weight
    )
    return shares
