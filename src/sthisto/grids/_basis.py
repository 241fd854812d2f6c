"""Two vectors that span a lattice: their shortest form, and the site that is nearest."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

SIMILAR = 1.15  # lengths that differ by less count as equal when a lattice is named: MOB arrays are stretched by 1.11


def area(basis: NDArray[np.float64]) -> float:
    return float(abs(np.linalg.det(basis)))


def similar_lengths(*vectors: NDArray[np.float64]) -> bool:
    lengths = np.linalg.norm(vectors, axis=1)
    return bool(lengths.max() < SIMILAR * lengths.min())


def reduce(basis: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Shortest vectors of the lattice at an acute angle, and the integers that make them of ``basis`` (Lagrange)."""
    change = np.eye(2, dtype=np.int64)
    while True:
        a, b = change @ basis
        if b @ b < (1 - 1e-9) * (a @ a):
            change = change[::-1]
            continue
        times = (a @ b) / (a @ a)
        if abs(times) <= 0.5 + 1e-9:  # a hexagonal lattice is at 0.5, where rounding must not flip it for ever
            break
        change = change - np.outer([0, 1], np.rint(times).astype(np.int64) * change[0])
    change = change * np.array([[1], [-1 if a @ b < 0 else 1]])
    return change @ basis, change


def nearest_site(offset: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the indices, as floats, of the sites nearest to ``offset``; ``basis`` has to be of shortest vectors.

    The triangles that those make are not obtuse, so the nearest site is a corner of the cell, but not always the one
    that rounding the coordinates gives.
    """
    low = np.floor(offset @ np.linalg.inv(basis))
    site, least = low, np.full(len(low), np.inf)
    for corner in product((0, 1), repeat=2):
        tried = low + corner
        apart = offset - tried @ basis
        squared = np.einsum("ij,ij->i", apart, apart)
        site = np.where((squared < least)[:, None], tried, site)
        least = np.minimum(squared, least)
    return site
