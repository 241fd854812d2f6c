"""Expression as a few factors, spots weighted by how well they were measured; sections one after another."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import softmax

from sthisto.models.gp import RANK

SMOOTHING = 1.5  # pitches, of the first smoothing that tells loud spots from quiet ones
LOUDEST = 5.0  # no spot counts for more than this many times the usual, or less than its inverse
TINY = np.finfo(np.float64).tiny

Floats = NDArray[np.float64]


def spot_variance(xy: Floats, y: Floats) -> Floats:
    """Mean square (n,) of a section's spots y (n, g) about their neighbours' mean."""
    k = min(13, len(xy))
    distance, near = cKDTree(xy).query(xy, k=range(2, k + 1))  # from the second: not itself
    weight = softmax(-(distance**2) / (2 * SMOOTHING**2), axis=1)
    around = (share @ y[others] for share, others in zip(weight, near, strict=True))
    return np.array([((own - mean) ** 2).mean() for own, mean in zip(y, around, strict=True)])


def relative(variance: Floats) -> Floats:
    """Variances (n,) in units of their geometric mean, none too loud."""
    variance = variance.clip(min=TINY)
    usual: Floats = variance / np.exp(np.log(variance).mean())
    return usual.clip(1 / LOUDEST, LOUDEST)


def leading(parts: Iterable[Floats], most: int) -> Floats:
    """Leading right singular vectors (d, q) of rows (n, d) that come in parts; never are all held at once."""
    rows, square = np.empty((0, 0)), np.empty((0, 0))
    for part in parts:
        rows = np.concatenate([rows, part]) if rows.size else part
        if len(rows) >= rows.shape[1]:  # the products of columns are fewer than the rows
            square, rows = rows.T @ rows + (square if square.size else 0), rows[:0]
    if square.size:
        values, vectors = np.linalg.eigh(square + rows.T @ rows)
        s, vt = np.sqrt(values[::-1].clip(min=0)), vectors.T[::-1]
    else:
        _, s, vt = np.linalg.svd(rows, full_matrices=False)
    # Contiguous, as it comes back from a file: another memory layout can change the last bit of a product.
    return np.ascontiguousarray(vt[: max(1, min(most, int((s > RANK * s[0]).sum())))].T)
