"""Positions as they come: checked, sorted, found."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree


def positions(xy: ArrayLike, name: str = "xy") -> NDArray[np.float64]:
    array = np.asarray(xy, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} should have two columns, shape (n, 2); its shape is {array.shape}.")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(f"{bad.sum()} of {len(array)} rows of {name} are NaN or infinite: leave them out.")
    return array


def distinct(spots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions without those that are there before, sorted; complex numbers sort far faster than rows do."""
    place = np.sort(spots[:, 0] + 1j * spots[:, 1])
    place = place[np.diff(place, prepend=np.nan) != 0]
    return np.stack([place.real, place.imag], axis=1)


def length(value: float, name: str, *, or_zero: bool = False) -> float:
    if not (0 <= value < np.inf) or (value == 0 and not or_zero):
        raise ValueError(f"{name} should be a finite length{' or 0' if or_zero else ' above 0'}; got {value}.")
    return float(value)


def codes(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each row (i, j), in the order of i, then j: sorts far faster than rows do."""
    if not len(rows):
        return np.empty(0, dtype=np.int64)
    low, high = rows.min(axis=0), rows.max(axis=0)
    codes: NDArray[np.int64] = (rows[:, 0] - low[0]) * (high[1] - low[1] + 1) + rows[:, 1] - low[1]
    return codes


def unique_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.unique(codes(rows), return_index=True)[1]]


def reached(tree: cKDTree, points: NDArray[np.float64], max_distance: float) -> NDArray[np.bool_]:
    # the tree drops what is at its bound itself, which has to stay; 1e-150 can still be squared
    distance, _ = tree.query(points, distance_upper_bound=max_distance * (1 + 1e-9) + 1e-150, workers=-1)
    return np.asarray(distance <= max_distance)
