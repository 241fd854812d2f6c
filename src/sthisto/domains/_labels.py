"""Labels of domains: carried from points to spots, and compared with a reference."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from sthisto import grids


def carry(labels: Sequence[Any] | NDArray[Any], points: ArrayLike, spots: ArrayLike) -> NDArray[Any]:
    """Carry the labels of points to the spots: each point votes for the spot nearest to it.

    A dense map has several points around a spot, and one point's label is noisier than the label of most of them.
    Ties go to the label of the point nearest to the spot, and so does a spot that no point is nearest to.

    Parameters
    ----------
    labels
        Labels (m,) of the points.
    points
        Where the points are, (m, 2).
    spots
        Where the spots are, (n, 2), in the same unit.

    Returns
    -------
    Labels (n,) of the spots.

    Raises
    ------
    ValueError
        Labels that are missing, or not one a point.

    Examples
    --------
    >>> carry(["a", "a", "b", "b"], [[0, 0], [1, 0], [2, 0], [3, 0]], [[0.4, 0], [2.6, 0]]).tolist()
    ['a', 'b']
    """
    names, codes = _codes(labels, len(np.asarray(points)), "labels of points")
    at = grids.nearest(points, spots)[1][:, 0]
    nearest = grids.nearest(spots, points)[1][:, 0]
    votes = np.zeros((len(nearest), len(names)))
    np.add.at(votes, (at, codes), 1.0)
    votes[np.arange(len(nearest)), codes[nearest]] += 0.5
    carried: NDArray[Any] = names[votes.argmax(axis=1)]
    return carried


def agreement(found: Sequence[Any] | NDArray[Any], reference: Sequence[Any] | NDArray[Any]) -> float:
    """Compare domains with reference labels by the adjusted Rand index; spots without a reference label are left out.

    Parameters
    ----------
    found
        Domains (n,), none missing.
    reference
        Labels (n,) of the same spots, NaN or None where there is none.

    Returns
    -------
    1 for the same partition, 0 for what chance would give.

    Raises
    ------
    ValueError
        Domains that are missing, other numbers of spots, or no reference label at all.

    References
    ----------
    Hubert and Arabie 1985, doi:10.1007/BF01908075.

    Examples
    --------
    >>> agreement(["0", "0", "1", "1", "0"], ["L1", "L1", "WM", "WM", None])
    1.0
    """
    from sklearn.metrics import adjusted_rand_score  # noqa: PLC0415  importing sthisto stays cheap

    labels = pd.Series(list(reference), dtype=object)
    _, codes = _codes(found, len(labels), "domains")
    labelled = labels.notna().to_numpy()
    if not labelled.any():
        raise ValueError(f"none of the {len(labels)} spots has a reference label to compare its domain with.")
    return float(adjusted_rand_score(labels[labelled].astype(str), codes[labelled]))


def by_size(codes: NDArray[np.intp]) -> "pd.Categorical[str]":
    """Name clusters "0", "1", ... from the largest to the smallest."""
    found, at, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    rank = np.empty(len(found), dtype=int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(found))
    return pd.Categorical(rank[at].astype(str), categories=[str(number) for number in range(len(found))])


def _codes(labels: Sequence[Any] | NDArray[Any], n: int, what: str) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Names and numbers (n,) of labels, none of which may be missing."""
    column = pd.Series(list(labels), dtype=object)
    if len(column) != n:
        raise ValueError(f"{len(column)} {what}, but there are {n} of them to label.")
    missing = int(column.isna().sum())
    if missing:
        raise ValueError(f"{missing} of {n} {what} are NaN. Drop them before, or give them a label.")
    codes, names = pd.factorize(column, sort=False)
    return np.asarray(names), codes
